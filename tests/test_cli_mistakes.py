"""System: a mistake on the command line is one readable line and exit code 2, and leaves nothing behind."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_cli import experiment_file
from vae_ray import Experiment, TrainResult
from vae_ray.cli.main import main

HERE = "--workers.num=0"  # so that nothing needs Ray


MISTAKES: list[tuple[list[str], str]] = [
    ([], "COMMAND"),
    (["train"], "PRESET"),
    (["train", ""], "''"),
    (["train", "digits", "mnist"], "'mnist'"),
    (["train", "x" * 300], "xxx"),
    (["train", "no/such.yaml"], "no/such.yaml"),
    (["train", "/"], "experiment '/': is a directory; for images there"),
    (["train", "digits", "--resum"], "did you mean '--resume'"),
    (["train", "digits", "--optim.lrr", "1"], "did you mean 'optim.lr'"),
    (["train", "digits", "--lr", "1"], "did you mean 'optim.lr'"),
    (["trian", "digits"], "command 'trian' does not exist; did you mean 'train'?"),
    (["train", "digits", "--num-trials", "3"], "'--num-trials' is not one of train; sweep has it"),
    (["train", "digits", "--zzz", "3"], "key 'zzz' does not exist; vae-ray train --help lists all"),
    (["train", "absent.yaml"], "absent.yaml: cannot be read (No such file or directory)"),
    (["sweep", "digits", "--search", "absent.yaml"], "search: absent.yaml: cannot be read (No such file"),
    (["train", "digits", "--optim.lr"], "needs a value"),
    (["train", "digits", "--optim.lr", "fast"], "optim.lr: got 'fast'"),
    (["train", "digits", "--likelihood=poisson"], "likelihood: got 'poisson', should be one of bernoulli"),
    (["train", "digits", "--model.likelihood=gaussian"], "does not exist any more; use 'likelihood.name'"),
    (["train", "mnist", "--likelihood.scale=1"], "--likelihood gaussian"),
    (["train", "digits", "--model.network.upper-dims=3"], "--model.network ladder"),
    (["train", "digits", "--model.network.top-dim=3"], "does not exist any more; use 'model.network.upper_dims'"),
    (["train", "digits", "--model.network=lader"], "did you mean 'ladder'"),
    (["train", "digits", HERE, "--model.network=no_such:net"], "there is no module 'no_such'"),
    (["train", "digits", HERE, "--model.network=json:net"], "the module 'json' has no 'net'"),
    (["train", "digits", HERE, "--model.network=json:__name__"], "should be a function or a class"),
    (["train", "digits", "--name", "../up"], "run.name: got '../up'"),
    (["train", "digits", "--name", ""], "run.name: got ''"),
    (["train", "digits", "--storage", "ftp://planet"], "or for example s3://BUCKET/runs"),
    (["train", "digits", "--storage", "s3://me:secret@bucket"], "contains credentials"),
    (["train", "digits", HERE, "--storage", "x" * 300], "run.storage: got 'xxx"),
    (["train", "digits", HERE, "--training.global-batch-size=5000"], "at most the 1294"),
    (["train", "digits", HERE, "--data.num-validation=1438"], "less than the 1438"),
    (["train", "digits", "--objective=iwae", "--objective.num-samples=100000000"], "less than or equal to 4096"),
    (["train", "digits", "--model.condition=label", "--model.num-classes=100000000"], "less than or equal to 10000"),
    (
        ["train", "digits", HERE, "--model.network.hidden=65536,65536,65536"],
        "model.network: got 17,190,617,172 weights, which need 275.0 GB",
    ),
    (["train", "digits", "--workers.num=65"], "workers.num: got 65"),
    (["train", "mnist", HERE, "--data.root=/no", "--data.download=no"], "/no/MNIST/raw/train"),
    (["train", "digits", "--dry-run", "--run.seed=-1"], "run.seed: got '-1'"),
    (["resume", "no/such/run"], "run no/such/run: there is no run"),
    (["presets", "--optim.lr", "1"], "only train, resume, sweep take"),
    (["evaluate", "no/such/run"], "no/such/run"),
    (["evaluate", "x" * 300], "xxx"),
    (["generate", "run"], "--out"),
]


def ids(mistake: object) -> str:
    return " ".join(mistake)[:60] if isinstance(mistake, list) else ""


@pytest.mark.parametrize(("arguments", "text"), MISTAKES, ids=ids)
def test_a_mistake_is_one_line_and_exit_code_2_and_leaves_nothing(
    arguments: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vae-ray: ")
    assert err.count("\n") == 1
    assert text in err
    assert list(tmp_path.rglob("*")) == []


MODEL_MISTAKES: list[tuple[list[str], str]] = [
    (["generate", "RUN", "--out", "no/such/place.png"], "--out: got 'no/such/place.png', cannot be written"),
    (["generate", "RUN", "--out", "x.png", "--num", "many"], "'many'"),
    (["reconstruct", "RUN", "--out", "x.png", "--num", "-2"], "got '-2', should be a whole number, at least 1"),
    (["interpolate", "RUN", "--out", "x.png", "--steps", "1"], "steps: got 1"),
    (["interpolate", "RUN", "--out", "x.png", "--method", "cubic"], "'cubic', should be linear or spherical"),
    (["evaluate", "RUN", "--split", "validation"], "'validation'"),
    (["evaluate", "RUN/checkpoints"], "checkpoints"),
    (["evaluate", "RUN", "--metrics", "elbo,fidd"], "metrics: got 'fidd', should be among elbo, nll, "),
    (
        ["evaluate", "RUN", "--workers.num", "auto"],
        "--workers.num: got 'auto', should be a whole number; 0 means in",
    ),
    (
        ["evaluate", "RUN", "--data.num-validation", "7"],
        "data.num-validation: got '7', but of digits only data.cache_dir can",
    ),
    (["evaluate", "RUN", "--data.root", "/tmp"], "data.root: got '/tmp', but of digits only data.cache_dir can differ"),
    (["evaluate", "RUN", "--optim.lr", "1"], "--optim.lr: only train, resume, sweep take the Experiment's keys, and"),
    (
        ["generate", "RUN", "--out", "x.png", "--data.cache-dir", "/x"],
        "and reconstruct, interpolate, traverse, evaluate",
    ),
    (
        ["reconstruct", "RUN", "--out", "x.png", "--images", "nothing"],
        "/nothing cannot be read (No such file or directory)",
    ),
    (["traverse", "RUN", "--out", "x.png", "--images", "no.npz"], "/no.npz cannot be read (No such file or directory)"),
]


@pytest.mark.parametrize(("arguments", "text"), MODEL_MISTAKES, ids=ids)
def test_a_mistake_with_a_model_is_one_line_and_exit_code_2(
    arguments: list[str],
    text: str,
    trained_run: TrainResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([argument.replace("RUN", str(trained_run.run_dir)) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert text in err
    assert list(tmp_path.iterdir()) == []


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


def test_a_run_that_fails_is_one_line_and_exit_code_1(
    quick: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", experiment_file(quick, tmp_path), "--json", "--optim.lr=1e30", "--optim.warmup-steps=0"]
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    images, error = err.splitlines()
    assert images == "digits: 8x8 grey; 1,438 train, 359 test"
    assert error.startswith("vae-ray: epoch 1, step ")
    assert "is not finite; the batch is in " in error


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
