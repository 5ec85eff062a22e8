"""System: a mistake in a sweep is one readable line and exit code 2, and starts no Ray and leaves no directory."""

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest
import ray
import torch

from tests.tuning.trials import settings_of, small_sweep
from vae_ray import Experiment, TrainResult, UserError
from vae_ray.cli.main import main
from vae_ray.tuning.sweep import preflighted

TOO_MANY_CPUS = str((os.cpu_count() or 1) + 1)
SEARCHES = {
    "torn": "optim.lr: {choice: [1",
    "unknown_key": "optim.lrr: {choice: [1]}",
    "bad_value": "optim.lr: {choice: [-1]}",
    "workers": "workers.num: {choice: [1, 2]}",
    "large_batch": "training.global_batch_size: {choice: [64, 5000]}",
    "batch_for_workers": "training.global_batch_size: {logint: [1, 64]}",
    "num_validation": "data.num_validation: {choice: [50, 100]}",
    "seed": "run.seed: {int: [0, 9]}",
    "lr": "optim.lr: {loguniform: [1e-4, 1e-2]}",
    "grid": "model.latent_dim: {grid: [2, 5]}",
    "objectives": "{objective.name: {choice: [elbo, dip]}, optim.lr: {loguniform: [1e-4, 1e-2]}}",
    "networks": "{model.network.name: {grid: [mlp, ladder]}, objective.num_samples: {int: [2, 5]}}",
    "no_target": "objective.name: {choice: [elbo, geco]}",
    "priors": "{model.prior.name: {choice: [standard, vamp]}, objective.name: {choice: [elbo, mmd]}}",
    "of_another": "{objective.name: {choice: [elbo, mmd]}, objective.free_bits: {uniform: [0, 2]}}",
    "condition": "model.condition: {choice: [null, label]}",
    "num_classes": "model.num_classes: {choice: [4, 10]}",
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory with the files of `SEARCHES` beside it, from which Ray must not be started."""
    (tmp_path / "searches").mkdir()
    for name, text in SEARCHES.items():
        (tmp_path / "searches" / f"{name}.yaml").write_text(text)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a mistake has to be found before Ray is started")

    monkeypatch.setattr(ray, "init", refuse)
    assert not ray.is_initialized()
    yield tmp_path / "here"
    assert not ray.is_initialized()


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger(), "handlers", [])  # pytest's would keep warnings from stderr
        assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vae-ray: ")
    assert err.count("\n") == 1
    return err


def searching(name: str) -> list[str]:
    return ["sweep", "digits", "--search", f"../searches/{name}.yaml"]


MISTAKES: list[tuple[str, list[str], str]] = [
    ("no preset", ["sweep"], "PRESET"),
    ("unknown preset", ["sweep", "digit"], "did you mean 'digits'"),
    ("unknown flag", ["sweep", "digits", "--num-trial", "3"], "did you mean '--num-trials'"),
    ("unknown key", ["sweep", "digits", "--optim.lrr", "1"], "did you mean 'optim.lr'"),
    ("unknown space", ["sweep", "digits", "--search", "optimisation"], "did you mean 'optimization'"),
    ("torn space", searching("torn"), "torn.yaml: cannot be read as YAML"),
    ("unknown key of the space", searching("unknown_key"), "did you mean 'optim.lr'"),
    ("bad value of the space", searching("bad_value"), "search: optim.lr: got -1"),
    ("workers to search", searching("workers"), "search: workers.num: cannot be searched"),
    ("batch too large", searching("large_batch"), "search: training.global_batch_size: got 5000"),
    ("the validation split to search", searching("num_validation"), "data.num_validation: cannot be searched"),
    ("the seed to search", searching("seed"), "run.seed: cannot be searched, each trial would have other noise"),
    (
        "an objective for another prior",
        [*searching("objectives"), "--model.prior=vamp"],
        "search: objective.name dip: objective: got dip, which needs the prior N(0, I), not a Gaussian",
    ),
    (
        "a network for another objective",
        [*searching("networks"), "--objective=dreg"],
        "search: model.network.name ladder, objective.num_samples 2: objective: got dreg, which is for one",
    ),
    ("an objective without its target", searching("no_target"), "search: objective.name geco: objective.target: got"),
    (
        "a prior for another objective",
        searching("priors"),
        "search: model.prior.name vamp, objective.name mmd: objective: got mmd, which needs the prior N(0, I), not a",
    ),
    (
        "a setting of another objective",
        searching("of_another"),
        "search: objective.name mmd, objective.free_bits 0.0: objective.free_bits: the objective 'mmd' has no field",
    ),
    ("the condition to search", searching("condition"), "search: model.condition: cannot be searched, -log p(x) and"),
    (
        "fewer classes than there are",
        [*searching("num_classes"), "--model.condition=label"],
        "search: model.num_classes: got 4, but 'label' has 10 classes",
    ),
    (
        "batches of one image",
        [*searching("lr"), "--training.global-batch-size=1", "--objective=mmd", "--model.prior=standard"],
        "training.global_batch_size: got 1, but mmd compares the images of a batch, should be at least 2",
    ),
    ("the rate alone", ["sweep", "digits", "--metric", "val/rate"], "a collapsed trial"),
    ("training metrics", ["sweep", "digits", "--metric=train/nelbo"], "or --data.num-validation 0"),
    ("two splits", ["sweep", "digits", "--metric=val/nelbo,train/rate"], "metric: got 'train/rate'"),
    ("unknown metric", ["sweep", "digits", "--metric", "val/nebo"], "did you mean 'val/nelbo'"),
    ("pbt with workers", ["sweep", "digits", "--scheduler=pbt", "--workers.num=2"], "trials of one worker"),
    (
        "asha with repeats",
        ["sweep", "digits", "--scheduler=asha", "--repeats=3"],
        "scheduler: got 'asha', with --repeats it would compare seeds after different numbers of epochs; use --sch",
    ),
    ("no repeats", ["sweep", "digits", "--repeats=0"], "--repeats: got '0', should be a whole number, at least 1"),
    ("a seed beyond the last", ["sweep", "digits", f"--run.seed={2**63 - 2}", "--repeats=3"], "run.seed: got 92233720"),
    ("an unknown metric to evaluate", ["sweep", "digits", "--evaluate=nlll"], "evaluate: got 'nlll', should be among"),
    (
        "a metric that needs factors",
        ["sweep", "digits", "--evaluate=nll,disentanglement"],
        "evaluate: disentanglement needs images with two known factors or more, these have 1; leave it out",
    ),
    (
        "ranked by what needs factors",
        ["sweep", "digits", "--metric=val/mig_locatello"],
        "metric: got 'val/mig_locatello', but disentanglement needs images with two known factors or more, these have",
    ),
    (
        "ranked by a label that is not there",
        ["sweep", "digits", "--metric=val/linear_probe[lable]"],
        "metric: got 'val/linear_probe[lable]', but these images have no such label; use one of label",
    ),
    ("an autoencoder's metric", ["sweep", "digits", "--metric=val/psnr"], "an autoencoder (beta = 0) would win"),
    (
        "asha by an evaluation",
        ["sweep", "digits", "--metric=val/nll", "--scheduler=asha"],
        "scheduler: got 'asha', but val/nll is known only when all trials have ended; use --scheduler none",
    ),
    ("pbt a few at a time", ["sweep", "digits", "--scheduler=pbt", "--max-concurrent=2"], "not supported with pbt"),
    (
        "no trials",
        ["sweep", "digits", "--num-trials", "0"],
        "--num-trials: got '0', should be a whole number, at least 1",
    ),
    (
        "none at once",
        ["sweep", "digits", "--max-concurrent", "0"],
        "--max-concurrent: got '0', should be a whole number, at least 1",
    ),
    (
        "fewer than no workers",
        ["sweep", "digits", "--workers-per-trial", "-1"],
        "--workers-per-trial: got '-1', should be a whole number, at least 1",
    ),
    (
        "more workers than CPUs",
        ["sweep", "digits", "--training.global-batch-size=1290", "--workers-per-trial", TOO_MANY_CPUS],
        f"workers.num: got {TOO_MANY_CPUS}",
    ),
    ("more CPUs than there are", ["sweep", "digits", "--workers.cpus", TOO_MANY_CPUS], f"with {TOO_MANY_CPUS} CPU"),
    ("a batch larger than the data", ["sweep", "digits", "--training.global-batch-size=5000"], "at most the 1294"),
    ("name with a path", ["sweep", "digits", "--name", "../up"], "run.name: got '../up'"),
    ("empty name", ["sweep", "digits", "--name", ""], "run.name: got ''"),
    ("resume without a name", ["sweep", "digits", "--resume"], "--resume needs the name of a sweep"),
    ("storage on another planet", ["sweep", "digits", "--storage", "ftp://planet"], "or for example s3://BUCKET"),
    ("report of nothing", ["report"], "DIRECTORY"),
    ("report of no directory", ["report", "no/such"], "no/such: no such run or sweep"),
    ("report of no run or sweep", ["report", "."], "no such run or sweep, it has no experiment.yaml"),
    ("keys for a report", ["report", ".", "--optim.lr", "1"], "only train, resume, sweep take"),
]


@pytest.mark.parametrize(("arguments", "part"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2_and_leaves_no_sweep(
    arguments: list[str], part: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert part in mistake(capsys, *arguments)
    assert list(place.rglob("*")) == []


def test_a_mistake_is_one_line_though_a_validation_split_was_made(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The warning that images are set aside comes only when a sweep starts."""
    message = mistake(capsys, *searching("large_batch"), "--data.num-validation=0")
    assert "training.global_batch_size" in message
    assert "set aside" not in message


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_a_batch_too_small_for_the_workers_is_a_mistake(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = mistake(capsys, *searching("batch_for_workers"), "--workers-per-trial", "2")
    assert "search: workers.num: got 2, should be at most training.global_batch_size (1)" in message
    assert list(place.rglob("*")) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert "workers.num: got 1 with 1 CPU and 1 GPU" in mistake(capsys, "sweep", "digits", "--workers.device=cuda")


def test_a_name_too_long_for_a_file_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist" in mistake(capsys, "sweep", "digits", "--search", "x" * 300)


# --- a name that is taken -------------------------------------------------------------------------------


def content_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_the_name_of_a_run_is_taken(trained_run: TrainResult, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained_run.run_dir, place / "runs" / "mine")
    before = content_of(place)
    for options in ([], ["--resume"]):
        message = mistake(capsys, "sweep", "digits", "--name", "mine", *options)
        assert "run.name: 'mine' is already used" in message
        assert "something else" in message
    assert content_of(place) == before


@pytest.mark.parametrize("options", [[], ["--resume"]], ids=["new", "resumed"])
def test_the_name_of_other_files_is_taken(place: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (place / "runs" / "mine").mkdir(parents=True)
    (place / "runs" / "mine" / "thesis.tex").write_text("mine")
    (place / "runs" / "other").write_text("mine")
    before = content_of(place)
    for name in ("mine", "other"):
        assert f"run.name: '{name}' is already used" in mistake(capsys, "sweep", "digits", "--name", name, *options)
    assert content_of(place) == before


def test_the_name_of_a_sweep_is_taken_and_what_differs_is_named(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "runs").mkdir()
    directory = small_sweep(place / "runs" / "mine")
    before = content_of(place)
    message = mistake(capsys, "sweep", "digits", "--name", "mine", "--num-trials", "9")
    assert "a different sweep" in message
    assert "model.latent_dim: 3 -> 10" in message
    assert "scheduler: 'none' -> 'asha'" in message
    assert "--resume" in message
    message = mistake(capsys, "sweep", "digits", "--name", "mine", "--resume")
    assert message.startswith("vae-ray: sweep 'mine': cannot be resumed as a different sweep (")
    assert content_of(place) == before
    directory.description_file.write_text("experiment: {")
    damaged = "sweep.yaml: cannot be read: "
    assert damaged in mistake(capsys, "sweep", "digits", "--name", "mine", "--resume")
    assert damaged in mistake(capsys, "report", str(directory.path))


def test_a_sweep_that_is_running_is_not_joined(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "runs").mkdir()
    directory = small_sweep(place / "runs" / "mine")
    content = directory.description()
    experiment, search = place / "mine.yaml", place / "search.yaml"
    experiment.write_text(Experiment.from_dict(content["experiment"]).to_yaml())
    search.write_text("objective.beta: {loguniform: [0.01, 4.0]}")
    same = ["sweep", str(experiment), "--search", str(search), "--scheduler=none", "--num-trials=8", "--resume"]
    with filelock.FileLock(directory.path / ".driver.lock"):
        message = mistake(capsys, *same, "--name", "mine", "--storage", str(place / "runs"))
    assert "'mine' is running right now" in message
    assert directory.description() == content


def test_a_sweep_is_not_continued_on_other_images(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "runs").mkdir()
    directory = small_sweep(place / "runs" / "mine")
    content = directory.description()
    directory.write_description({**content, "fingerprints": {"train": "of others", "test": "of others"}})
    experiment, search = place / "mine.yaml", place / "search.yaml"
    experiment.write_text(Experiment.from_dict(content["experiment"]).to_yaml())
    search.write_text("objective.beta: {loguniform: [0.01, 4.0]}")
    same = ["sweep", str(experiment), "--search", str(search), "--scheduler=none", "--num-trials=8", "--resume"]
    message = mistake(capsys, *same, "--name", "mine", "--storage", str(place / "runs"))
    assert "cannot be resumed as a different sweep (other train images; other test images)" in message


def test_a_run_does_not_move_into_a_sweep(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "runs").mkdir()
    small_sweep(place / "runs" / "mine")
    before = content_of(place)
    small = ["--workers.num=0", "--training.epochs=1", "--model.network.hidden=8"]
    assert "run.name: 'mine' is already used" in mistake(capsys, "train", "digits", "--name", "mine", *small)
    assert content_of(place) == before


@pytest.mark.parametrize("num_training", [2, 9, 25])
def test_a_sweep_on_few_images_sets_at_least_one_aside(
    num_training: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    few = own_images(num_training, tmp_path, monkeypatch)
    _, experiment, _ = preflighted(settings_of(search={"optim.lr": {"choice": [0.1]}}), few)
    assert experiment.data.num_validation == max(1, num_training // 10)


def test_a_sweep_on_one_image_is_refused_with_the_metric_that_it_can_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one = own_images(1, tmp_path, monkeypatch)
    search = {"optim.lr": {"choice": [0.1]}}
    with pytest.raises(UserError, match=r"metric: got 'val/nelbo', but few:images has one .* train/nelbo"):
        preflighted(settings_of(search=search), one)
    preflighted(settings_of(search=search, metric="train/nelbo"), one)


def own_images(num_training: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    code = "import numpy as np\n\ndef images(num):\n    pixels = np.zeros((num, 1, 4, 4), np.uint8)\n"
    (tmp_path / "few.py").write_text(f"{code}    return dict(train=pixels, test=pixels)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "few", raising=False)
    data = {"data.source": "few:images", "data.num": num_training, "data.cache_dir": tmp_path / "cache"}
    batch = {"training.global_batch_size": 1, "workers.num": 1, "workers.cpus": 1}
    return Experiment.preset("digits").with_overrides({**data, **batch, "data.num_validation": 0})


def test_a_key_that_a_user_s_own_code_does_not_take_is_refused_before_anything_starts(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # loading adds the working directory
    objective = "from vae_ray.objectives.elbo import Elbo\n\n\ndef plain():\n    return Elbo()\n"
    Path("own_objective.py").write_text(objective)
    before = content_of(place)
    err = mistake(capsys, "sweep", "digits", "--objective", "own_objective:plain")
    assert "search: objective.beta: own_objective:plain has no setting 'beta'; it takes no settings; name other" in err
    assert content_of(place) == before


def test_a_sweep_of_a_conditional_vae_has_the_number_of_classes() -> None:
    conditional = Experiment.preset("digits").with_overrides({"model.condition": "label", "workers.num": 1})
    search = {"model.prior.name": {"choice": ["standard", "vamp"]}}
    _, experiment, _ = preflighted(settings_of(search=search), conditional)
    assert experiment.model.num_classes == 10
