"""Real Ray workers on a folder of images: augmented and binarized training has one curve."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.test_own_images import experiment, photos
from vae_ray import train

__all__ = ["photos"]
pytestmark = pytest.mark.ray


@pytest.mark.usefixtures("cluster")
def test_augmented_and_binarized_training_has_the_curve_of_one_process_on_three_workers(
    photos: Path, tmp_path: Path
) -> None:
    """Other numbers of workers: tests/training/test_own_images.py, and without images test_workers.py."""
    alone, together = (
        train(experiment(photos, tmp_path, **{"workers.num": num_workers, "run.name": f"w{num_workers}"}))
        for num_workers in (0, 3)
    )
    assert together.num_workers == 3
    for record, expected in zip(together.history, alone.history, strict=True):
        for key in (f"{split}/{term}" for split in ("train", "val", "test") for term in ("distortion", "rate")):
            # only the order of float32 additions differs
            assert record[key] == pytest.approx(expected[key], rel=1e-4), key
