"""System: runs on a folder of images, augmented and binarized anew in every epoch, are exact as those on digits are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.runs import Counting, assert_same, computed, counted_steps, fitted, run_of
from vae_ray import Experiment, Stopped, TrainedVAE, TrainResult, train
from vae_ray.data.batches import Batch, Shards
from vae_ray.data.splits import Splits
from vae_ray.runs.train import resume
from vae_ray.training import stop_requests
from vae_ray.training.fit import fit

__all__ = ["counted_steps"]
"""A fixture of every test here."""

NUM, STEPS_PER_EPOCH = 150, 5


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of grey ramps of 12x10 pixels, each of its own direction and level."""
    folder, chance = tmp_path_factory.mktemp("photos"), np.random.default_rng(4)
    rows, columns = np.mgrid[:12, :10]
    for number in range(NUM):
        slopes = chance.uniform(-12, 12, 2)
        pixels = np.clip(128 + slopes[0] * (rows - 6) + slopes[1] * (columns - 5) + chance.normal(0, 9), 0, 255)
        place = folder / f"class {number % 3}"
        place.mkdir(exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number:03d}.png")
    return folder


def experiment(photos: Path, storage: Path, **overrides: Any) -> Experiment:
    given: dict[str, Any] = {
        "data.root": str(photos),
        "data.image_size": "null",
        "data.augment": "flip,shift:2",
        "data.binarize": "dynamic",
        "data.num_validation": 15,
        "model.network.hidden": "24,16",
        "model.latent_dim": 3,
        "training.epochs": 2,
        "training.global_batch_size": 25,
        "workers.num": 0,
        "run.storage": str(storage),
        "run.name": "run",
    }
    return Experiment.preset("images").with_overrides({**given, **overrides})


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(experiment(photos, tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize("step", [2, STEPS_PER_EPOCH + 3])
def test_a_run_resumed_in_the_middle_of_an_epoch_goes_on_to_the_same_bits(
    photos: Path, whole: TrainResult, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop_requests, "AGREE_SECONDS", 0.0)
    run = run_of(experiment(photos, tmp_path))
    with pytest.raises(Stopped):
        fit(run.experiment(), run.path, Counting(lambda n: run.stop_file.touch() if n == step else None))
    resume(run.path)
    assert_same(run.path, whole.run_dir)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_curve_of_one_process(
    photos: Path, whole: TrainResult, tmp_path: Path, num_workers: int
) -> None:
    run = run_of(experiment(photos, tmp_path))
    assert fitted(run.experiment(), run, num_workers) == [None] * num_workers
    for record, alone in zip(computed(run.path), computed(whole.run_dir), strict=True):
        # only the order of float32 additions differs
        assert record == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_the_same_images_reach_the_same_positions_for_any_number_of_workers_and_after_a_resume(
    photos: Path, tmp_path: Path, num_workers: int
) -> None:
    config = experiment(photos, tmp_path)
    splits = Splits.open(config)

    def batches(rank: int, size: int, first_step: int) -> list[Batch]:
        loader = splits.loader("train", config, Shards(rank, size, torch.device("cpu")))
        return list(loader.training(2, global_batch_size=25, first_step=first_step))

    alone = batches(0, 1, 0)
    assert {value for batch in alone for value in batch.x.unique().tolist()} == {0.0, 1.0}
    for first_step in (0, 3):
        together = [batches(rank, num_workers, first_step) for rank in range(num_workers)]
        for step, expected in enumerate(alone[first_step:]):
            assert torch.equal(torch.cat([worker[step].x for worker in together]), expected.x)
            labels = torch.cat([worker[step].labels["label"] for worker in together])
            assert torch.equal(labels, expected.labels["label"])


def test_evaluation_binarizes_each_image_once_whatever_the_epoch(whole: TrainResult) -> None:
    model = TrainedVAE.load(whole.run_dir)
    images = model.test_images(4)
    assert set(images.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(images, model.test_images(4))
    evaluated = model.evaluate("val")
    assert evaluated.labels["binarization"].startswith("dynamic")
    assert evaluated["val/nelbo"] == pytest.approx(whole.metrics["val/nelbo"], rel=1e-6)
    assert model.target_names == {"label": ["class 0", "class 1", "class 2"]}
    targets = model.targets("train")["label"]
    assert len(targets) == whole.history[-1]["num_images"]
