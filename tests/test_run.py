"""System, in one process: a run's files, its repetition, its refusals and its TensorBoard events."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from tests.runs import computed
from vae_ray import Experiment, TrainedVAE, TrainResult, UserError, train
from vae_ray.parallel.group import SingleProcess
from vae_ray.run_files.progress import format_nats
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.runs.preflight import preflight
from vae_ray.runs.train import resume
from vae_ray.training.averaged_weights import AveragedWeights
from vae_ray.training.placement import SMALL_STEP_FLOPS, num_local_cpus, num_threads
from vae_ray.training.trainer import Trainer
from vae_ray.tuning.sweep import sweep

PICTURES = ("samples", "reconstructions", "traversals")


def lines(run: Path) -> list[dict[str, Any]]:
    return RunDirectory(run).records.history()


# --- what a run leaves behind ---------------------------------------------------------------------------


def test_a_run_directory_is_complete_and_holds_nothing_else(trained_run: TrainResult) -> None:
    run = trained_run.run_dir
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    found = {name for name in found if not name.startswith("evaluations/")}  # of other tests
    events = {name for name in found if name.startswith("tensorboard/")}
    kept = {trained_run.best_epoch, 3}
    package = ("manifest.json", "experiment.json", "weights.safetensors", "training_state.safetensors")
    expected = {
        "experiment.yaml",
        "attempts.jsonl",
        "metrics.jsonl",
        "summary.json",
        *(f"images/{kind}/epoch={n:04d}.png" for kind in PICTURES for n in (1, 2, 3)),
        *(f"checkpoints/epoch={n:04d}/{name}" for n in kept for name in package),
    }
    assert {name for name in found - events if not name.startswith(".")} == expected
    assert len(events) >= 1


def test_metrics_have_one_line_an_epoch_with_every_split(trained_run: TrainResult) -> None:
    found = lines(trained_run.run_dir)
    assert [line["epoch"] for line in found] == [1, 2, 3]
    terms = {f"{s}/{n}" for s in ("train", "val", "test") for n in ("nelbo", "distortion", "rate")} | {"train/loss"}
    for line in found:
        others = {"beta", "lr", "images_per_second", "num_images", "num_skipped", "seconds", "started_at"}
        assert set(line) == {"epoch", *others, *terms}
        assert (line["num_images"], line["num_skipped"]) == (1338, 0)
        assert line["train/nelbo"] == pytest.approx(line["train/distortion"] + line["train/rate"], rel=1e-12)
    assert found[-1]["train/nelbo"] < found[0]["train/nelbo"] - 1


def test_learning_rate_of_a_line_is_that_of_its_last_step(trained_run: TrainResult) -> None:
    # 42 steps an epoch of 1,338 images; warm-up of 7; cosine over the other 119
    expected = [5e-3 * 0.5 * (1 + np.cos(np.pi * (step - 7) / 119)) for step in (41, 83, 125)]
    assert [line["lr"] for line in lines(trained_run.run_dir)] == pytest.approx(expected, rel=1e-12)


def test_summary_is_the_result(trained_run: TrainResult) -> None:
    assert RunDirectory(trained_run.run_dir).records.summary() == trained_run.to_dict()
    best = lines(trained_run.run_dir)[trained_run.best_epoch - 1]
    assert trained_run.metrics == {key: value for key, value in best.items() if "/" in key}
    assert trained_run.best_epoch == min(lines(trained_run.run_dir), key=lambda line: line["val/nelbo"])["epoch"]


def test_test_metrics_of_a_run_that_did_not_evaluate_are_those_of_its_best_checkpoint(quick: Experiment) -> None:
    result = train(quick.with_overrides({"training.test_every_epochs": 0}))
    assert not any(key.startswith("test/") for line in lines(result.run_dir)[:-1] for key in line)
    expected = TrainedVAE.load(result.best_checkpoint).evaluate("test", "elbo")
    assert {key: result.metrics[key] for key in expected} == pytest.approx(expected, rel=1e-6)


def test_tensorboard_shows_the_metrics_and_both_pictures_of_every_epoch(trained_run: TrainResult) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained_run.run_dir / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    curves = lines(trained_run.run_dir)[0].keys() - {"epoch", "num_images", "started_at"}
    assert set(events.Tags()["scalars"]) == curves
    for key in curves:
        shown = [(event.step, event.value) for event in events.Scalars(key)]
        # TensorBoard keeps float32
        assert shown == [(line["epoch"], np.float32(line[key])) for line in lines(trained_run.run_dir)], key
    for kind in PICTURES:
        shown = events.Images(kind)
        assert [image.step for image in shown] == [1, 2, 3]
        file = trained_run.run_dir / "images" / kind / "epoch=0003.png"
        with Image.open(file) as picture:
            assert (shown[-1].width, shown[-1].height) == picture.size


# --- repetition -----------------------------------------------------------------------------------------


def test_a_run_is_repeated_to_the_digit_by_its_own_experiment_file(trained_run: TrainResult, tmp_path: Path) -> None:
    again = Experiment.from_file(trained_run.run_dir / "experiment.yaml")
    assert again.run.name is None
    result = train(again.with_overrides({"run.storage": str(tmp_path)}))
    assert computed(result.run_dir) == computed(trained_run.run_dir)
    weights = [run.last_checkpoint / "weights.safetensors" for run in (result, trained_run)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_another_seed_gives_other_computed(trained_run: TrainResult, quick: Experiment) -> None:
    other = train(quick.with_overrides({"run.seed": 4}))
    for ours, theirs in zip(computed(trained_run.run_dir), computed(other.run_dir), strict=True):
        assert all(ours[key] != theirs[key] for key in ours if "/" in key)


def test_evaluating_otherwise_changes_no_number(trained_run: TrainResult, quick: Experiment) -> None:
    other = train(quick.with_overrides({"training.test_every_epochs": 2, "training.evaluation_batch_size": 77}))
    for ours, theirs in zip(computed(trained_run.run_dir), computed(other.run_dir), strict=True):
        assert {k: v for k, v in ours.items() if k.startswith("train/")} == {
            k: v for k, v in theirs.items() if k.startswith("train/")
        }
        assert theirs["val/nelbo"] == pytest.approx(ours["val/nelbo"], rel=1e-6)


def test_training_leaves_the_settings_of_its_process_as_they_were(quick: Experiment) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.set_float32_matmul_precision("high")
        train(quick.with_overrides({"training.epochs": 1, "workers.cpus": 1}))
        assert torch.get_num_threads() == 2
        assert torch.get_float32_matmul_precision() == "high"
        assert float(torch.tensor(1e-40) * 1) > 0  # denormals are not flushed
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.set_num_threads(before)


# --- names that are taken -------------------------------------------------------------------------------


def test_a_used_name_is_refused_and_nothing_is_changed(quick: Experiment) -> None:
    result = train(quick.with_overrides({"training.epochs": 1}))
    before = {path: path.read_bytes() for path in result.run_dir.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"'digits-in-process' is already used .* this experiment; .* vae-ray resume "):
        train(quick.with_overrides({"training.epochs": 1}))
    with pytest.raises(UserError, match=r"different experiment .*optim\.lr: 0\.005 -> 0\.5\)"):
        train(quick.with_overrides({"optim.lr": 0.5}))
    assert {path: path.read_bytes() for path in result.run_dir.rglob("*") if path.is_file()} == before


def test_a_run_is_not_resumed_with_another_experiment(quick: Experiment) -> None:
    train(quick.with_overrides({"training.epochs": 1}))
    with pytest.raises(UserError, match=r"cannot be resumed with a different experiment: model\.latent_dim: 5 -> 6$"):
        train(quick.with_overrides({"training.epochs": 1, "model.latent_dim": 6}), resume=True)


def test_a_run_that_is_being_trained_is_refused(quick: Experiment) -> None:
    run = RunDirectory(Path(quick.run.storage) / "digits-in-process")
    run.path.mkdir(parents=True)
    with run.lock("driver").acquire(), pytest.raises(UserError, match="is running right now"):
        train(quick)
    train(quick.with_overrides({"training.epochs": 1}))


def test_a_name_taken_by_a_file_is_refused(quick: Experiment) -> None:
    Path(quick.run.storage).mkdir()
    (Path(quick.run.storage) / "digits-in-process").write_text("mine")
    with pytest.raises(UserError, match="digits-in-process"):
        train(quick)


def test_a_run_without_a_name_gets_one_of_source_and_time(quick: Experiment) -> None:
    experiment = quick.with_overrides({"run.name": None, "training.epochs": 1})
    first, second = train(experiment), train(experiment)
    assert first.run_dir != second.run_dir
    assert first.run_dir.name.startswith("digits-20")
    assert sorted(Path(quick.run.storage).iterdir()) == [first.run_dir, second.run_dir]


# --- where training starts, and when it ends ------------------------------------------------------------


def test_training_starts_from_given_weights(trained_run: TrainResult, quick: Experiment, tmp_path: Path) -> None:
    continued = quick.with_overrides({"run.initial_weights": str(trained_run.run_dir), "training.epochs": 1})
    trainer = Trainer(continued, RunDirectory(tmp_path), SingleProcess(torch.device("cpu")))
    given = TrainedVAE.load(trained_run.run_dir).model.state_dict()
    assert all(torch.equal(tensor, given[name]) for name, tensor in trainer.state.model.state_dict().items())
    first = lines(train(continued).run_dir)[0]
    assert first["train/loss"] < lines(trained_run.run_dir)[0]["train/loss"] - 1


def test_initial_weights_of_another_shape_are_refused(trained_run: TrainResult, quick: Experiment) -> None:
    other = quick.with_overrides({"run.initial_weights": str(trained_run.run_dir), "model.latent_dim": 6})
    with pytest.raises(UserError, match=r"^run\.initial_weights: .*network\.decoder\.0\.weight.*\(64, 6\).*\(64, 5\)"):
        train(other)
    assert list(Path(quick.run.storage).glob("*/*")) == []


def test_a_run_without_improvement_ends_early(quick: Experiment) -> None:
    """Without a weight on the rate, the bound soon gets worse."""
    result = train(quick.with_overrides({"objective.beta": 0, "training.epochs": 40, "training.patience_epochs": 2}))
    assert result.stopped_early
    assert result.epochs == result.best_epoch + 2 < 40
    assert json.loads((result.run_dir / "summary.json").read_text())["stopped_early"] is True
    assert resume(result.run_dir) == result
    with pytest.raises(UserError, match=r"training\.epochs: the run stopped early, .* had not improved for 2 epochs"):
        resume(result.run_dir, {"training.epochs": 60})
    assert resume(result.run_dir) == result


# --- averaged weights -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def averaged_run(module_quick: Experiment) -> tuple[TrainResult, list[dict[str, torch.Tensor]]]:
    """An epoch with averaged weights, and the weights before the first and after every update."""
    experiment = module_quick.with_overrides({"training.epochs": 1, "training.ema_decay": 0.9, "run.name": "averaged"})
    weights: list[dict[str, torch.Tensor]] = []
    original = AveragedWeights.update

    def update(self: AveragedWeights, model: torch.nn.Module) -> None:
        if not weights:
            weights.append({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
        weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        original(self, model)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AveragedWeights, "update", update)
        return train(experiment), weights


def test_averaged_weights_are_those_computed_by_hand(
    averaged_run: tuple[TrainResult, list[dict[str, torch.Tensor]]],
) -> None:
    result, (initial, *others) = averaged_run
    assert len(others) == 42
    file = result.last_checkpoint / "averaged.safetensors"
    for name, found in safetensors.torch.load_file(file).items():
        average = initial[name].double()
        for n, weights in enumerate(others):
            d = min(0.9, (1 + n) / (10 + n))
            average = d * average + (1 - d) * weights[name].double()
        torch.testing.assert_close(found.double(), average, rtol=1e-5, atol=1e-6)


def test_averaged_weights_are_what_is_evaluated_and_loaded(
    averaged_run: tuple[TrainResult, list[dict[str, torch.Tensor]]],
) -> None:
    result, _ = averaged_run
    by_default, averaged, last = (
        TrainedVAE.load(result.run_dir, weights=weights).evaluate("val")["val/nelbo"]
        for weights in (None, "averaged", "last")
    )
    assert by_default == averaged == pytest.approx(result.metrics["val/nelbo"], rel=1e-6)
    assert abs(last - averaged) > 0.01


def test_averaged_weights_that_are_not_there_are_refused(trained_run: TrainResult) -> None:
    with pytest.raises(UserError, match="has no averaged weights; its run trained without them"):
        TrainedVAE.load(trained_run.run_dir, weights="averaged")


# --- what auto means ------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="several GPUs get a worker each")
def test_auto_is_this_process_and_one_thread_for_a_small_network(
    quick: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    resolved = preflight(quick.with_overrides({"workers.num": "auto", "workers.cpus": "auto"})).experiment
    assert (resolved.workers.num, resolved.workers.cpus) == (0, 1)
    large = quick.with_overrides({"workers.num": "auto", "workers.cpus": "auto", "model.network.hidden": [4096, 1024]})
    large = large.with_overrides({"training.global_batch_size": 1000})
    assert preflight(large).experiment.workers.cpus == num_local_cpus()


def test_a_step_is_shared_out_among_threads_from_a_certain_size_on(quick: Experiment) -> None:
    model = SimpleNamespace(network=torch.nn.Linear(1000, 100, bias=False))
    rows = round(SMALL_STEP_FLOPS / (6 * 1000 * 100))
    num = [
        num_threads(4, quick.with_overrides({"training.global_batch_size": size}), model)  # type: ignore[arg-type]
        for size in (rows - 1, rows + 1)
    ]
    assert num == [1, 4]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (106.123, "106.12"),
        (-999.994, "-999.99"),
        (1234.56, "1234.6"),
        (123456.0, "1.2346e+05"),
        (7e25, "7e+25"),
        (float("nan"), "nan"),
    ],
)
def test_metrics_are_printed_with_at_most_five_digits_or_an_exponent(value: float, text: str) -> None:
    assert format_nats(value) == text


def test_a_start_that_ray_refuses_leaves_no_directory(quick: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even lock files, or the new storage; and the name stays free."""

    def refused(*args: object, **kwargs: object) -> None:
        raise UserError("Ray cannot be reached")

    storage = Path(quick.run.storage)
    monkeypatch.setattr("vae_ray.runs.train._execution", refused)
    with pytest.raises(UserError, match="cannot be reached"):
        train(quick)
    monkeypatch.setattr("vae_ray.tuning.sweep.connect", refused)
    with pytest.raises(UserError, match="cannot be reached"):
        sweep(quick, num_trials=2)
    assert not storage.exists()
    monkeypatch.undo()
    finished = train(quick.with_overrides({"training.epochs": 1}))
    monkeypatch.setattr("vae_ray.runs.train._execution", refused)
    with pytest.raises(UserError, match="cannot be reached"):
        resume(finished.run_dir, {"training.epochs": 2})
    assert Path(finished.best_checkpoint).exists()
