"""System: a mistake on the command line is one readable line and exit code 2, and leaves nothing behind."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vae_ray import Experiment, TrainResult
from vae_ray.cli.main import main

HERE = "--workers.num=0"  # so that nothing needs Ray


def experiment_file(experiment: Experiment, tmp_path: Path) -> str:
    file = tmp_path / "mine.yaml"
    file.write_text(experiment.to_yaml())
    return str(file)


# --- mistakes -------------------------------------------------------------------------------------------

MISTAKES: list[tuple[str, list[str], str]] = [
    ("no command", [], "COMMAND"),
    ("unknown command", ["trian"], "'trian'"),
    ("no preset", ["train"], "PRESET"),
    ("unknown preset", ["train", "digit"], "did you mean 'digits'"),
    ("two presets", ["train", "digits", "mnist"], "'mnist'"),
    ("missing file", ["train", "no/such.yaml"], "no/such.yaml"),
    ("a directory for a file", ["train", "/"], "/: cannot be read"),
    ("unknown flag", ["train", "digits", "--resum"], "did you mean '--resume'"),
    ("unknown key", ["train", "digits", "--optim.lrr", "1"], "did you mean 'optim.lr'"),
    ("a key without its section", ["train", "digits", "--lr", "1"], "did you mean 'optim.lr'"),
    ("no value", ["train", "digits", "--optim.lr"], "needs a value"),
    ("bad number", ["train", "digits", "--optim.lr", "fast"], "optim.lr: got 'fast'"),
    ("bad range", ["train", "digits", "--optim.lr=-1"], "optim.lr: got '-1'"),
    (
        "bad choice",
        ["train", "digits", "--likelihood=poisson"],
        "likelihood: got 'poisson', should be one of bernoulli",
    ),
    (
        "a key of 0.1",
        ["train", "digits", "--model.likelihood=gaussian"],
        "does not exist any more; use 'likelihood.name'",
    ),
    ("a setting of another entry", ["train", "digits", "--likelihood.scale=1"], "--likelihood gaussian"),
    ("a setting of another network", ["train", "digits", "--model.network.top-dim=3"], "--model.network ladder"),
    ("nearly an entry", ["train", "digits", "--model.network=lader"], "did you mean 'ladder'"),
    ("no such module", ["train", "digits", HERE, "--model.network=no_such:net"], "there is no module 'no_such'"),
    ("no such function", ["train", "digits", HERE, "--model.network=json:net"], "the module 'json' has no 'net'"),
    ("no function", ["train", "digits", HERE, "--model.network=json:__name__"], "should be a function or a class"),
    ("no run to resume", ["resume", "no/such/run"], "run no/such/run: there is no run"),
    ("a preset to resume", ["resume", "digits"], "run digits: there is no run"),
    ("name with a path", ["train", "digits", "--name", "../up"], "run.name: got '../up'"),
    ("empty name", ["train", "digits", "--name", ""], "run.name: got ''"),
    ("storage on another planet", ["train", "digits", "--storage", "ftp://planet"], "or for example s3://BUCKET/runs"),
    ("password in the storage", ["train", "digits", "--storage", "s3://me:secret@bucket"], "contains credentials"),
    ("batch too large", ["train", "digits", HERE, "--training.global-batch-size=5000"], "at most the 1294"),
    ("all for validation", ["train", "digits", HERE, "--data.num-validation=1438"], "less than the 1438"),
    ("more workers than images", ["train", "digits", "--workers.num=65"], "workers.num: got 65"),
    ("missing data", ["train", "mnist", HERE, "--data.root=/no", "--data.download=no"], "/no/MNIST/raw/train"),
    ("key for another command", ["presets", "--optim.lr", "1"], "only train, resume, sweep take"),
    ("no such run", ["evaluate", "no/such/run"], "no/such/run"),
    ("no such run to draw", ["generate", "no/such/run", "--out", "x.png"], "no/such/run"),
    ("no out", ["generate", "run"], "--out"),
    ("dry run of a mistake", ["train", "digits", "--dry-run", "--run.seed=-1"], "run.seed: got '-1'"),
]


@pytest.mark.parametrize(("arguments", "said"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2_and_leaves_nothing(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vae-ray: ")
    assert err.count("\n") == 1
    assert said in err
    # the storage itself may have been made; no run in it
    assert [path for path in tmp_path.rglob("*") if path != tmp_path / "runs"] == []


MODEL_MISTAKES: list[tuple[list[str], str]] = [
    (["generate", "RUN", "--out", "no/such/place.png"], "--out: got 'no/such/place.png', cannot be written"),
    (["generate", "RUN", "--out", "x.png", "--num", "0"], "got 0, should be at least 1"),
    (["generate", "RUN", "--out", "x.png", "--num", "many"], "'many'"),
    (["reconstruct", "RUN", "--out", "x.png", "--num", "-2"], "got -2, should be at least 1"),
    (["interpolate", "RUN", "--out", "x.png", "--steps", "1"], "steps: got 1"),
    (["interpolate", "RUN", "--out", "x.png", "--method", "cubic"], "'cubic', should be one of linear, spherical"),
    (["interpolate", "RUN", "--out", "x.png", "--num", "0"], "got 0, should be at least 1"),
    (["evaluate", "RUN", "--split", "validation"], "'validation'"),
    (["evaluate", "RUN/checkpoints"], "checkpoints"),
    (["evaluate", "RUN", "--optim.lr", "1"], "only train, resume, sweep take"),
]


@pytest.mark.parametrize(("arguments", "said"), MODEL_MISTAKES, ids=[" ".join(m[0]) for m in MODEL_MISTAKES])
def test_a_mistake_with_a_model_is_one_line_and_exit_code_2(
    arguments: list[str],
    said: str,
    trained_run: TrainResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([argument.replace("RUN", str(trained_run.run_dir)) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["train", "x" * 300]),
        pytest.param(["evaluate", "x" * 300]),
        ["train", "digits", HERE, "--storage", "x" * 300],
    ],
    ids=["preset", "run", "storage"],
)
def test_a_name_too_long_for_a_file_is_a_mistake(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_empty_preset_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", ""]) == 2
    assert "''" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "digits", HERE, "--workers.device=cuda", "--storage", str(tmp_path)]) == 2
    assert "workers.device: got 'cuda', but this machine has no GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_storage_that_is_a_file_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["train", "digits", HERE, "--storage", str(tmp_path / "file")]) == 2
    assert "run.storage: got" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_mistake_has_the_same_end_in_a_process_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vae_ray", "train", "digit", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "vae-ray: preset 'digit' does not exist; did you mean 'digits'?\n"
    assert list(tmp_path.iterdir()) == []


# --- failures and interrupts ----------------------------------------------------------------------------


def test_a_run_that_fails_is_one_line_and_exit_code_1(
    quick: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", experiment_file(quick, tmp_path), "--json", "--optim.lr=1e30", "--optim.warmup-steps=0"]
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vae-ray: epoch 1, step ")
    assert "the loss or its gradient is not finite; the batch is in " in err
    assert err.count("\n") == 1


def test_an_interrupt_is_exit_code_130(
    quick: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vae_ray.runs.train.train", interrupted)
    assert main(["train", experiment_file(quick, tmp_path)]) == 130
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "vae-ray resume" in err
