"""Real Ray workers on a folder of images: augmented and binarized training has one curve."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.test_own_images import experiment, photos
from vae_ray import TrainResult, train

__all__ = ["photos"]
pytestmark = pytest.mark.ray


@pytest.mark.usefixtures("cluster")
def test_augmented_and_binarized_training_has_one_curve_for_0_1_2_and_3_workers(photos: Path, tmp_path: Path) -> None:
    def trained(num_workers: int) -> TrainResult:
        return train(experiment(photos, tmp_path, **{"workers.num": num_workers, "run.name": f"w{num_workers}"}))

    alone = trained(0)
    for num_workers in (1, 2, 3):
        for record, expected in zip(trained(num_workers).history, alone.history, strict=True):
            for key in (f"{split}/{term}" for split in ("train", "val", "test") for term in ("distortion", "rate")):
                # only the order of float32 additions differs
                assert record[key] == pytest.approx(expected[key], rel=1e-4), (num_workers, key)
