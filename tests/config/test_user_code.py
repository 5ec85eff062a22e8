"""System, in one process: a user's own network, likelihood, prior, objective, data and callback, by import path."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import digits_in_this_process
from vae_ray import Experiment, TrainedVAE, TrainingFailed, TrainResult, UserError, train
from vae_ray.cli.main import main
from vae_ray.config import user_code
from vae_ray.data.splits import Splits
from vae_ray.runs import preflight
from vae_ray.runs.train import resume

MODULE = (Path(__file__).parents[1] / "data" / "own_code.py").read_text()


def importable(directory: Path, patch: pytest.MonkeyPatch) -> None:
    """Make `own_code` a module of the working directory."""
    (directory / "own_code.py").write_text(MODULE)
    patch.chdir(directory)
    patch.setattr(sys, "path", list(sys.path))  # loading adds the working directory
    patch.delitem(sys.modules, "own_code", raising=False)


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importable(tmp_path, monkeypatch)


@pytest.fixture
def one_epoch(quick: Experiment) -> Experiment:
    return quick.with_overrides({"training.epochs": 1})


@pytest.fixture(scope="module")
def own_run(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A run of the user's own network."""
    directory = tmp_path_factory.mktemp("own")
    experiment = digits_in_this_process(directory / "runs")
    with pytest.MonkeyPatch.context() as patch:
        importable(directory, patch)
        return train(experiment.with_overrides({"training.epochs": 1, "model.network": "own_code:tiny"}))


def weights(result: TrainResult) -> dict[str, Any]:
    return load_file(Path(result.last_checkpoint) / "weights.safetensors")


# --- each kind of code -----------------------------------------------------------------------------------


def test_a_network_is_given_shapes_and_its_own_settings(one_epoch: Experiment) -> None:
    result = train(one_epoch.with_overrides({"model.network": "own_code:tiny", "model.network.width": "24"}))
    assert weights(result)["network.encoder.1.weight"].shape == (24, 64)
    model = TrainedVAE.load(result.run_dir, trust_code=True)
    assert model.evaluate("val")["val/nelbo"] == pytest.approx(result.metrics["val/nelbo"], rel=1e-6)


def test_a_prior_with_parameters_is_trained(one_epoch: Experiment) -> None:
    center = weights(train(one_epoch.with_overrides({"model.prior": "own_code:Moving", "model.prior.start": 2.0})))
    assert 0.5 < float(center["prior.center"].mean()) < 1.999


def test_a_likelihood_scales_the_distortion(one_epoch: Experiment) -> None:
    slow = one_epoch.with_overrides({"optim.lr": 1e-12})
    own = slow.with_overrides({"likelihood": "own_code:Weighted", "likelihood.factor": 2, "run.name": "own"})
    before, after = train(slow).metrics, train(own).metrics
    assert after["val/distortion"] == pytest.approx(2 * before["val/distortion"], rel=1e-5)
    assert after["val/rate"] == pytest.approx(before["val/rate"], rel=1e-5)


def test_an_objective_logs_its_own_terms(one_epoch: Experiment) -> None:
    result = train(one_epoch.with_overrides({"objective": {"name": "own_code:Reporting", "beta": 0.25}}))
    assert result.metrics["train/half_rate"] == pytest.approx(result.metrics["train/rate"] / 2, rel=1e-9)
    same = train(one_epoch.with_overrides({"run.name": "same"}))
    assert result.metrics["train/loss"] == same.metrics["train/loss"]


def test_a_data_source_is_decoded_once_and_again_when_its_code_changes(
    one_epoch: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = one_epoch.with_overrides({"data.source": "own_code:stripes", "data.num": 300, "run.name": None})
    result = train(own)
    assert TrainedVAE.load(result.run_dir, trust_code=True).image_shape == (1, 6, 8)
    line = result.history[0]
    assert line["images_per_second"] * line["seconds"] == pytest.approx(300 - own.data.num_validation)
    (tmp_path / "own_code.py").write_text(MODULE.replace("::2", "::3"))
    monkeypatch.delitem(sys.modules, "own_code")
    assert train(own).metrics["test/nelbo"] != result.metrics["test/nelbo"]


def test_blocks_of_a_generator_are_split_by_their_content_and_keep_their_labels(one_epoch: Experiment) -> None:
    result = train(one_epoch.with_overrides({"data.source": "own_code:in_blocks", "data.num_validation": 7}))
    model = TrainedVAE.load(result.run_dir, trust_code=True)
    splits = Splits.open(model.experiment)
    images = {name: splits.dataset.splits[name].first(999) for name in ("train", "test")}
    assert len(images["train"]) + len(images["test"]) == 4 * 30
    assert 0 < len(images["test"]) < 40  # about a tenth
    for name, pixels in images.items():
        rows = pixels[:, 0, 0, 0].long()
        assert torch.equal(splits.dataset.splits[name].columns["label"], rows % 3)
    more = one_epoch.with_overrides({"data.source": "own_code:in_blocks", "data.num": 6, "run.name": "more"})
    after = Splits.open(more).dataset.splits
    for name, pixels in images.items():
        known = {image.numpy().tobytes() for image in pixels}
        assert known <= {image.numpy().tobytes() for image in after[name].first(999)}


def test_a_callback_is_called_as_the_run_and_its_epochs_begin_and_end(quick: Experiment) -> None:
    run = train(quick.with_overrides({"training.epochs": 2, "run.callbacks": "own_code:Diary"})).run_dir
    assert (Path(run) / "diary.txt").read_text().splitlines() == [
        "began 2",
        "epoch 1 (2, 1, 8, 8)",
        "epoch 2 (2, 1, 8, 8)",
        "ended",
    ]


def test_a_callback_that_fails_is_a_warning(quick: Experiment, caplog: pytest.LogCaptureFixture) -> None:
    result = train(quick.with_overrides({"training.epochs": 2, "run.callbacks": "own_code:Failing,own_code:Diary"}))
    assert result.epochs == 2
    warning = "run.callbacks: own_code:Failing.epoch_ended failed (ValueError: the disk of the diary is full)"
    assert caplog.messages.count(warning) == 2
    assert "epoch 2" in (Path(result.run_dir) / "diary.txt").read_text()


def test_a_callback_that_exits_is_a_warning(one_epoch: Experiment, caplog: pytest.LogCaptureFixture) -> None:
    assert train(one_epoch.with_overrides({"run.callbacks": "own_code:Exiting"})).epochs == 1
    assert "run.callbacks: own_code:Exiting.epoch_ended failed (SystemExit: 0)" in caplog.messages


def test_a_callback_that_disables_gradients_does_not_stop_training(quick: Experiment) -> None:
    with torch.enable_grad():  # and restore them
        assert (
            train(quick.with_overrides({"training.epochs": 2, "run.callbacks": "own_code:WithoutGradients"})).epochs
            == 2
        )


# --- mistakes --------------------------------------------------------------------------------------------

MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"model.network": "own_code:tiny", "model.network.widht": 3}, r"model\.network\.widht: .* no setting 'widht'"),
    ({"model.network": "own_code:tiny", "model.network.latent_dim": 3}, r"model\.network\.latent_dim: .* no setting"),
    ({"model.prior": "own_code:Moving", "model.prior.begin": 3}, r"model\.prior\.begin: .* it takes start"),
    ({"likelihood": "own_code:Weighted", "likelihood.scale": 3}, r"likelihood\.scale: .* it takes factor"),
    ({"objective": "own_code:Reporting", "objective.gamma": 3}, r"objective\.gamma: .* no setting 'gamma'"),
    ({"data.source": "own_code:stripes", "data.number": 3}, r"data\.number: .* it takes num"),
    (
        {"model.network": "own_code:with_a_parameter_too_many"},
        r"model\.network: .* the decoder's output has shape \(N, 2, 8, 8\), should be \(N, 1, 8, 8\)",
    ),
    (
        {"model.network": "own_code:with_a_wrong_encoder"},
        r"model\.network: .*own_code:with_a_wrong_encoder does not fit images of shape",
    ),
    (
        {"model.network": "own_code:with_a_narrow_encoder"},
        r"the encoder's output has shape \(N, 5\), should be \(N, 10\)",
    ),
    ({"model.network": "own_code:no_network"}, "returned a str, should return"),
    ({"model.prior": "own_code:Weighted"}, r"model\.prior: own_code:Weighted cannot be called"),
    ({"likelihood": "own_code:Diary"}, r"likelihood: .* returned a Diary, should return a vae_ray"),
    ({"objective": "own_code:Diary"}, r"objective: .* returned a Diary, should return a vae_ray"),
    (
        {"data.source": "own_code:Diary"},
        r"data\.source: own_code:Diary returned a Diary, should return images, yield blocks of them, or return a dict",
    ),
    ({"objective": "mmd", "model.prior": "own_code:Moving"}, r"objective: got mmd, which needs the prior N"),
    ({"objective": "own_code:ByRow"}, r"own_code:ByRow fails .* the loss of 'model' has shape \(3\), should be \(\)"),
    ({"objective": "own_code:WithoutTerms"}, r"own_code:WithoutTerms fails on a batch .* have no 'forgotten'"),
    (
        {"objective": "own_code:WithoutLosses"},
        r"objective: .* returned a int, should return vae_ray\.objectives\.base\.L",
    ),
    ({"model.prior": "own_code:OneDimensional"}, r"model\.prior: .* the mean has shape \(N, 1\), should be \(N, 5\)"),
    ({"model.prior": "own_code:Absent"}, r"model\.prior: own_code:Absent is not a distribution of 3 rows"),
    ({"likelihood": "own_code:WithoutMean"}, r"likelihood: own_code:WithoutMean does not fit images .*NotImplemented"),
    ({"likelihood": "own_code:Weighted", "likelihood.factor": "none"}, r"likelihood: own_code:Weighted does not fit"),
    ({"model.network": "own_code:that_fails"}, r"own_code:that_fails fails in .*own_code\.py, line \d+ \(ZeroDivision"),
    ({"data.source": "own_code:on_fire"}, r"data\.source: own_code:on_fire fails in .*own_code\.py, .*disk on fire"),
    (
        {"data.source": "own_code:two_sizes"},
        r"data\.source: own_code:two_sizes has images of several sizes.*: 6x8 \(90\), 6x9 \(9\); should be of one size",
    ),
    ({"run.callbacks": "own_code:that_fails"}, r"run\.callbacks: own_code:that_fails fails in"),
    ({"data.source": "own_code:floats"}, r"gave float64 of shape \(9, 1, 6, 8\) for 'train', should be uint8"),
    (
        {"data.source": "own_code:ragged"},
        r"data\.source: own_code:ragged gave uint8 of shape \(1, 6, 8\) for 'train', should be .* \(N, C, H, W\)",
    ),
    (
        {"data.source": "own_code:too_few_labels"},
        r"gave labels of shape \(2,\) for 90 images for 'train', should be one whole number an image, or None",
    ),
    (
        {"data.source": "own_code:without_test"},
        r"data\.source: own_code:without_test returned a dict with the keys \['train'\], should have 'train', 'test'",
    ),
    ({"model.network": "no_code:tiny"}, r"model\.network: got 'no_code:tiny', there is no module 'no_code'"),
    ({"run.callbacks": "own_code:Nothing"}, r"run\.callbacks: .* the module 'own_code' has no 'Nothing'"),
    (
        {"model.network": "own_code"},
        r"model\.network: got 'own_code', should be one of mlp, .* or MODULE:NAME",
    ),
    (
        {"model.network": "own_code:that_exits"},
        r"model\.network: own_code:that_exits fails in .*line \d+ \(SystemExit: 0",
    ),
    (
        {"model.network": "own_code:that_exits_in_a_pass"},
        r"model\.network: own_code:that_exits_in_a_pass .*SystemExit: 0",
    ),
    ({"data.source": "own_code:exiting_source"}, r"data\.source: own_code:exiting_source fails .*\(SystemExit: 0\)"),
    ({"run.callbacks": "own_code:that_exits"}, r"run\.callbacks: own_code:that_exits fails in .*\(SystemExit: 0\)"),
    ({"model.network": "own_code:frozen"}, r"model\.network: own_code:frozen has no weights to train"),
    (
        {"model.network": "own_code:without_weights"},
        r"model\.network: own_code:without_weights has no weights to train",
    ),
    (
        {"objective": "own_code:Detached"},
        r"objective: own_code:Detached .* its loss of 'model' does not depend on any weight",
    ),
    (
        {"workers.num": 2, "model.network": "own_code:with_batch_norm"},
        r"workers\.num: got 2, .* BatchNorm1d.*GroupNorm",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES, ids=[json.dumps(m[0]) for m in MISTAKES])
def test_a_mistake_is_refused_before_anything_is_written(
    overrides: dict[str, Any], message: str, one_epoch: Experiment
) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        train(one_epoch.with_overrides(overrides))
    assert "\n" not in str(refusal.value)
    assert list(Path(one_epoch.run.storage).glob("*/*")) == []


@pytest.mark.parametrize("content", ["import math\nmath.nothing\n", "import sys\nsys.exit(0)\n"])
def test_a_module_that_fails_is_refused_with_its_error(content: str, one_epoch: Experiment, tmp_path: Path) -> None:
    (tmp_path / "own_code.py").write_text(content)
    with pytest.raises(UserError, match=r"model\.network: .* importing it fails|has no"):
        train(one_epoch.with_overrides({"model.network": "own_code:tiny"}))


FAILURES = {
    "that_fails_later": r"that_fails_later raised ValueError: boom \(own_code\.py, line \d+\) in epoch 1, step 4",
    "that_exits_later": r"that_exits_later raised SystemExit: 0 \(own_code\.py, line \d+\) in epoch 1, step 4",
    "that_fails_in_evaluation": r"ZeroDivisionError: .*\(own_code\.py, line \d+\) in epoch 1, the evaluation of 'val'",
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_network_that_fails_in_training_is_one_line_after_its_traceback(
    name: str, one_epoch: Experiment, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(TrainingFailed, match=f"{FAILURES[name]}; correct the code and resume$"):
        train(one_epoch.with_overrides({"model.network": f"own_code:{name}"}))
    assert "own_code.py" in caplog.text.partition("Traceback")[2]


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_an_interrupt_and_our_own_errors_pass_through_a_users_code(error: type[BaseException]) -> None:
    with pytest.raises(error), user_code.failures_named(["own_code:tiny"], where="step 1"):
        raise error
    with pytest.raises(error), user_code.errors_named("own_code:tiny", key="model.network"):
        raise error


def test_channels_last_are_a_warning(one_epoch: Experiment, caplog: pytest.LogCaptureFixture) -> None:
    train(one_epoch.with_overrides({"data.source": "own_code:channels_last"}))
    warning = "images of shape (8, 6, 1) are read as 8 channels of 6x1 pixels; should be (channels, height, width)"
    assert caplog.messages.count(f"data.source: own_code:channels_last: {warning}") == 1


@pytest.mark.parametrize("name", ["with_batch_norm", "that_reads_its_weights"])
def test_a_network_that_needs_one_process_or_memory_is_trained_and_loaded(name: str, one_epoch: Experiment) -> None:
    result = train(one_epoch.with_overrides({"model.network": f"own_code:{name}"}))
    model = TrainedVAE.load(result.run_dir, trust_code=True)
    assert model.evaluate("val")["val/nelbo"] == pytest.approx(result.metrics["val/nelbo"], rel=1e-6)


@pytest.mark.parametrize("own", [{"model.network": "own_code:tiny"}, {"model.prior": "own_code:Moving"}, {}], ids=str)
def test_a_large_model_is_checked_too(
    own: dict[str, Any], one_epoch: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "LARGEST_CHECKED_ON_CPU", 0)
    assert train(one_epoch.with_overrides(own)).epochs == 1


# --- trust -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["evaluate", "generate", "resume", "train"])
def test_code_that_a_file_names_is_run_only_if_trusted(
    command: str, own_run: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {
        "evaluate": ["evaluate", str(own_run.run_dir)],
        "generate": ["generate", str(own_run.run_dir), "--out", str(tmp_path / "x.png")],
        "resume": ["resume", str(own_run.run_dir)],
        "train": ["train", f"{own_run.run_dir}/experiment.yaml", "--storage", str(tmp_path / "again")],
    }[command]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "names its own code (own_code:tiny), which is run only if you trust it; add --trust-code" in err
    assert "own_code" not in sys.modules
    assert main([*arguments, "--trust-code"]) == 0


def test_python_needs_trust_too(own_run: TrainResult) -> None:
    with pytest.raises(UserError, match="trust_code=True"):
        TrainedVAE.load(own_run.run_dir)
    with pytest.raises(UserError, match="trust_code=True"):
        resume(own_run.run_dir)
    assert TrainedVAE.load(own_run.run_dir, trust_code=True).generate(2).shape == (2, 1, 8, 8)


def test_initial_weights_run_no_code_of_their_own(own_run: TrainResult, one_epoch: Experiment) -> None:
    """Only tensors are read of them: the experiment that trains names the code."""
    own = one_epoch.with_overrides({"model.network": "own_code:tiny", "run.initial_weights": str(own_run.run_dir)})
    assert train(own).metrics["train/loss"] < own_run.metrics["train/loss"]
    with pytest.raises(UserError, match=r"run\.initial_weights: .*weights\.safetensors: "):
        train(one_epoch.with_overrides({"run.name": "other", "run.initial_weights": str(own_run.run_dir)}))


# --- what travels to other processes ---------------------------------------------------------------------


def test_the_files_of_a_module_or_a_package_are_collected_and_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text("def net():\n    return 5\n")
    files = user_code.collect(["own_code:tiny", "own_package.nets:net", "numpy:zeros"])
    assert set(files) == {"own_code.py", "own_package/__init__.py", "own_package/nets.py"}
    monkeypatch.chdir("/")
    for name in ("own_code", "own_package", "own_package.nets"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    user_code.install(files)
    assert user_code.load("own_package.nets:net", key="model.network")() == 5
    assert Path(str(sys.modules["own_package"].__file__)).parent != package


def test_a_digest_changes_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = user_code.digest(user_code.load("own_code:stripes", key="data.source"))
    (tmp_path / "own_code.py").write_text(MODULE + "#")
    monkeypatch.delitem(sys.modules, "own_code")
    assert user_code.digest(user_code.load("own_code:stripes", key="data.source")) != before
    assert len(user_code.digest(functools.partial(np.zeros, 3))) == 16  # it has no source file of its own
