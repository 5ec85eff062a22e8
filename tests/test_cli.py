"""System: the command line's promises about its answers, what it imports and how fast it helps."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from vae_ray import Experiment, TrainedVAE, TrainResult
from vae_ray.cli.main import main
from vae_ray.config.experiment import field_docs, preset_names
from vae_ray.run_files.image_grids import png_bytes, square_grid


def one_object(text: str) -> Any:
    """The JSON object that `text` is, whole and alone."""
    answer = json.loads(text)
    assert isinstance(answer, dict)
    return answer


def experiment_file(experiment: Experiment, tmp_path: Path) -> str:
    file = tmp_path / "mine.yaml"
    file.write_text(experiment.to_yaml())
    return str(file)


# --- train ----------------------------------------------------------------------------------------------


IMAGES = "digits: 8x8 grey; 1,438 train, 359 test"


def test_train_prints_its_result_as_one_object_and_its_progress_elsewhere(
    quick: Experiment, trained_run: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", experiment_file(quick, tmp_path), "--json", "--name", "mine"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    answer = one_object(out)
    assert answer["run_dir"] == str(Path(quick.run.storage) / "mine")
    assert answer["metrics"] == trained_run.metrics
    images, *epochs = err.splitlines()
    assert images == IMAGES
    assert [line.split("  ")[0] for line in epochs] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert f"test nelbo {trained_run.metrics['test/nelbo']:.2f} = " in err
    assert main([*arguments, "--resume"]) == 0
    assert one_object(capsys.readouterr().out) == answer
    assert main(arguments) == 2
    assert "run.name: 'mine' is already used" in capsys.readouterr().err


def test_progress_of_a_resumed_run_shows_the_epochs_that_it_trains(
    quick: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", experiment_file(quick, tmp_path), "--json", "--run.checkpoints-kept=9", "--resume"]
    assert main(arguments) == 0
    run = Path(one_object(capsys.readouterr().out)["run_dir"])
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "epoch=0003")
    assert main(arguments) == 0
    images, again, *epochs = capsys.readouterr().err.splitlines()
    assert images == IMAGES
    assert again.startswith("started again from the end of epoch 2: 1 worker on ")
    assert [line.split("  ")[0] for line in epochs] == ["epoch 3/3"]


def test_what_a_library_prints_does_not_get_into_the_answer(
    quick: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vae_ray.runs.preflight.preflight", lambda e: print("Downloading ...") or Mock(warnings=[]))
    assert main(["train", experiment_file(quick, tmp_path), "--dry-run", "--json"]) == 0
    out, err = capsys.readouterr()
    assert set(one_object(out)) == {"experiment"}
    assert err == "Downloading ...\n"


def test_a_dry_run_prints_the_experiment_with_the_last_value_of_a_key_and_starts_nothing(
    quick: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", experiment_file(quick, tmp_path), "--dry-run", "--optim.lr", "0.5", "--optim.lr=0.25"]
    expected = quick.with_overrides({"optim.lr": 0.25})
    assert main(arguments) == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert Experiment.from_file(file) == expected
    assert main([*arguments, "--json"]) == 0
    assert one_object(capsys.readouterr().out) == {"experiment": expected.to_dict()}
    assert list(Path(quick.run.storage).glob("*")) == []


# --- the commands that use a model ----------------------------------------------------------------------


def test_evaluate_prints_the_metrics_of_the_best_checkpoint(
    trained_run: TrainResult, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(trained_run.run_dir), "--json", "--metrics", "elbo"]) == 0
    answer = one_object(capsys.readouterr().out)
    assert answer["checkpoint"] == str(trained_run.best_checkpoint)
    expected = {key: value for key, value in trained_run.metrics.items() if key.startswith("test/")}
    assert answer["metrics"] == pytest.approx(expected, rel=1e-6)
    assert answer["labels"]["split"] == "test"
    assert main(["evaluate", str(trained_run.run_dir), "--split", "val"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert re.fullmatch(f"{trained_run.metrics['val/nelbo']:.2f} ± [0-9.]+ nats", lines["val/nelbo"])
    assert 0 <= int(lines["val/active_units"]) <= 5
    assert (lines["split"], lines["likelihood"], lines["z"]) == ("val", "bernoulli", "sampled")


def test_generate_draws_the_samples_of_its_seed(
    trained_run: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / f"{name}.png" for name in ("a", "again", "other")]
    for file, seed in zip(files, ("1", "1", "2"), strict=True):
        arguments = ["generate", str(trained_run.run_dir), "--num", "9", "--seed", seed, "--out", str(file)]
        assert main([*arguments, "--json"]) == 0
        answer = one_object(capsys.readouterr().out)
        assert answer["out"] == str(file)
        assert answer["epoch"] == trained_run.best_epoch
    first, again, other = (file.read_bytes() for file in files)
    assert first == again != other
    images = TrainedVAE.load(trained_run.run_dir).generate(9, seed=1)
    title = f"digits · samples, z ~ p(z) · epoch {trained_run.best_epoch}"
    assert first == png_bytes(square_grid(images, title=title))


@pytest.mark.parametrize(
    "arguments",
    [
        ["reconstruct", "--num", "400"],
        ["interpolate", "--num", "3", "--steps", "4"],
        ["interpolate", "--method", "spherical", "--num", "300"],
        ["traverse", "--num", "2"],
    ],
    ids=" ".join,
)
def test_pictures_are_written_to_out(
    arguments: list[str], trained_run: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "picture.png"
    assert main([arguments[0], str(trained_run.run_dir), *arguments[1:], "--out", str(file), "--json"]) == 0
    assert one_object(capsys.readouterr().out)["out"] == str(file)
    assert file.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


@pytest.mark.parametrize("name", ["x.jpg", "x.gif", "x.npy", "x.png.txt", "x", "png"])
def test_pictures_of_another_format_than_png_are_refused(
    name: str, trained_run: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, file = str(trained_run.run_dir), tmp_path / name
    assert main(["generate", "no-such-run", "--out", str(file)]) == 2  # before anything is read
    assert f"--out: got {str(file)!r}, should end in .png" in capsys.readouterr().err
    assert not file.exists()
    assert main(["generate", run, "--out", str(tmp_path / "x.PNG"), "--num", "1"]) == 0


def test_an_empty_name_of_images_is_refused(trained_run: TrainResult, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reconstruct", str(trained_run.run_dir), "--out", "x.png", "--images", ""]) == 2
    assert "--images: got '', should be a directory of pictures" in capsys.readouterr().err


def test_presets_lists_every_preset_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets", "--json"]) == 0
    answer = one_object(capsys.readouterr().out)
    assert list(answer) == preset_names()
    assert all(text.endswith(".") for text in answer.values())


# --- lightness ------------------------------------------------------------------------------------------


LIGHT = """
import contextlib, io, sys
from vae_ray.cli.main import main
for arguments in ARGUMENTS:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(SystemExit):
            main(arguments)
print(sorted({"torch", "ray", "numpy", "pyarrow", "sklearn"} & set(sys.modules)))
"""


def heavy_libraries_after(*arguments: list[str]) -> str:
    code = LIGHT.replace("ARGUMENTS", repr(arguments))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout


def test_help_and_a_typing_mistake_import_no_heavy_library() -> None:
    """They are answered at once, not after seconds of imports."""
    helped = ["--help"], ["train", "--help"], ["generate", "--help"], ["presets"], ["submit", "--help"]
    mistakes = ["train", "digit"], ["train", "digits", "--optim.lrr", "1"], ["submit", "train", "digit"]
    assert heavy_libraries_after(*helped, *mistakes) == "[]\n"


def test_help_costs_a_tenth_of_a_second_of_cpu() -> None:
    code = "import subprocess, sys, resource; subprocess.run([sys.executable, '-m', 'vae_ray', '--help'], check=True); "
    code += "usage = resource.getrusage(resource.RUSAGE_CHILDREN); print(usage.ru_utime + usage.ru_stime)"
    done = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60) for _ in range(3)]
    assert min(float(each.stdout.splitlines()[-1]) for each in done) < 0.2  # 0.1 s where nothing else runs


USING_A_MODEL = """
import sys
from vae_ray.cli.main import main
run, out = sys.argv[1:]
assert main(["generate", run, "--num", "4", "--out", out, "--json"]) == 0
assert main(["evaluate", run, "--json"]) == 0
assert main(["train", "digits", "--training.epochs=1", "--storage", out + ".runs", "--json"]) == 0
print("ray" in sys.modules, file=sys.stderr)
"""


def test_a_model_is_trained_and_used_without_ray(trained_run: TrainResult, tmp_path: Path) -> None:
    command = [sys.executable, "-c", USING_A_MODEL, str(trained_run.run_dir), str(tmp_path / "x.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "False"


def test_help_of_train_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    # an entry is chosen by its axis: --likelihood gaussian
    keys = [doc.key for doc in field_docs()]
    assert [key for key in keys if f"--{key.replace('_', '-')} " not in text] == []
    assert {key.removesuffix(".name") for key in Experiment().flat() if key not in keys} <= set(keys)
