"""System, in one process: a run's files, its repetition, its refusals and its TensorBoard events."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vae_ray import Experiment, TrainedVAE, TrainResult, UserError, train
from vae_ray.run_files.run_directory import RunDirectory

PICTURES = ("samples", "reconstructions", "traversals")


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers(run: Path) -> list[dict[str, Any]]:
    """What a run computed, without how long it took."""
    timing = ("images_per_second", "seconds", "started_at")
    return [{key: value for key, value in line.items() if key not in timing} for line in lines(run)]


# --- what a run leaves behind ---------------------------------------------------------------------------


def test_a_run_directory_is_complete_and_holds_nothing_else(trained_run: TrainResult) -> None:
    run = trained_run.run_dir
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    events = {name for name in found if name.startswith("tensorboard/")}
    kept = {trained_run.best_epoch, 3}
    package = ("manifest.json", "experiment.json", "weights.safetensors", "training_state.pt")
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
    terms = {f"{s}/{n}" for s in ("train", "val", "test") for n in ("loss", "nelbo", "distortion", "rate")}
    for line in found:
        assert set(line) == {"epoch", "beta", "lr", "images_per_second", "seconds", "started_at", *terms}
        assert line["train/nelbo"] == pytest.approx(line["train/distortion"] + line["train/rate"], rel=1e-12)
    assert found[-1]["train/nelbo"] < found[0]["train/nelbo"] - 1


def test_learning_rate_of_a_line_is_that_of_its_last_step(trained_run: TrainResult) -> None:
    # 42 steps an epoch of 1,338 images; warm-up of 7; cosine over the other 119
    expected = [5e-3 * 0.5 * (1 + np.cos(np.pi * (step - 7) / 119)) for step in (41, 83, 125)]
    assert [line["lr"] for line in lines(trained_run.run_dir)] == pytest.approx(expected, rel=1e-12)


def test_summary_is_the_result(trained_run: TrainResult) -> None:
    summary = json.loads((trained_run.run_dir / "summary.json").read_text())
    assert summary == trained_run.to_dict()
    best = lines(trained_run.run_dir)[trained_run.best_epoch - 1]
    assert trained_run.metrics == {key: value for key, value in best.items() if "/" in key}
    assert trained_run.best_epoch == min(lines(trained_run.run_dir), key=lambda line: line["val/nelbo"])["epoch"]


def test_test_metrics_of_a_run_that_did_not_evaluate_are_those_of_its_best_checkpoint(quick: Experiment) -> None:
    result = train(quick.with_overrides({"training.test_every_epochs": 0}))
    assert not any(key.startswith("test/") for line in lines(result.run_dir)[:-1] for key in line)
    expected = TrainedVAE.load(result.best_checkpoint).evaluate("test")
    assert {key: result.metrics[key] for key in expected} == pytest.approx(expected, rel=1e-6)


def test_tensorboard_shows_the_metrics_and_both_pictures_of_every_epoch(trained_run: TrainResult) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained_run.run_dir / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    for key in lines(trained_run.run_dir)[0].keys() - {"epoch"}:
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
    assert numbers(result.run_dir) == numbers(trained_run.run_dir)
    weights = [run.last_checkpoint / "weights.safetensors" for run in (result, trained_run)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_another_seed_gives_other_numbers(trained_run: TrainResult, quick: Experiment) -> None:
    other = train(quick.with_overrides({"run.seed": 4}))
    for ours, theirs in zip(numbers(trained_run.run_dir), numbers(other.run_dir), strict=True):
        assert all(ours[key] != theirs[key] for key in ours if "/" in key)


def test_number_of_test_evaluations_does_not_change_the_training(trained_run: TrainResult, quick: Experiment) -> None:
    other = train(quick.with_overrides({"training.test_every_epochs": 2, "training.evaluation_batch_size": 77}))
    for ours, theirs in zip(numbers(trained_run.run_dir), numbers(other.run_dir), strict=True):
        assert {k: v for k, v in ours.items() if k.startswith("train/")} == {
            k: v for k, v in theirs.items() if k.startswith("train/")
        }
        # evaluation in other batches draws other noise: the standard error over 100 or 359 images
        assert theirs["val/nelbo"] == pytest.approx(ours["val/nelbo"], rel=0.02)


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
    with pytest.raises(UserError, match=r"'digits-in-process' is already used .* by this experiment; add --resume"):
        train(quick.with_overrides({"training.epochs": 1}))
    with pytest.raises(UserError, match=r"different experiment .*optim\.lr: 0\.005 -> 0\.5.*training\.epochs: 1 -> 3"):
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
