"""The splits of a run: train, validation (set aside from train) and test."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vae_ray.config.experiment import Experiment
from vae_ray.data.arrow_store import Split, open_split
from vae_ray.errors import UserError
from vae_ray.seeds import generator


class Splits(NamedTuple):
    """Images of a run on this node, and which of the training images are for validation."""

    train: Split
    test: Split
    train_indices: Tensor
    validation_indices: Tensor

    @classmethod
    def open(cls, experiment: Experiment) -> Splits:
        """Open (decode, on the node's first call) both files; raises `UserError` if the data cannot serve."""
        train, test = open_split(experiment.data, "train"), open_split(experiment.data, "test")
        if train.image_shape != test.image_shape:
            raise UserError(
                f"data.source: {experiment.data.source} has training images of shape {train.image_shape} and test "
                f"images of shape {test.image_shape}; should be equal"
            )
        indices = validation_indices(
            len(train), num_validation=experiment.data.num_validation, seed=experiment.run.seed
        )
        return cls(train, test, *indices)

    @property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprints of the images in each file; equal for equal images, wherever they lie."""
        return {"train": self.train.fingerprint, "test": self.test.fingerprint}

    def mean_training_image(self) -> Tensor:
        """The mean of the training images, `(C, H, W)` in [0, 1]; in float64 from exact sums."""
        sums = sum(
            self.train.pixels.index_select(0, part).sum(0, dtype=torch.int64) for part in self.train_indices.split(4096)
        )
        return torch.as_tensor(sums, dtype=torch.float64) / (255.0 * len(self.train_indices))

    def select(self, name: str) -> tuple[Tensor, Tensor]:
        """uint8 pixels `(M, C, H, W)` and the indices among them of "train", "val" or "test"."""
        if name == "test":
            return self.test.pixels, torch.arange(len(self.test))
        return self.train.pixels, {"train": self.train_indices, "val": self.validation_indices}[name]


def validation_indices(num_images: int, *, num_validation: int, seed: int) -> tuple[Tensor, Tensor]:
    """Disjoint, sorted indices `(train, validation)`, together all of `num_images`.

    Raises `UserError` if nothing would be left to train on.
    """
    if num_validation >= num_images:
        raise UserError(
            f"data.num_validation: got {num_validation}, should be less than the {num_images} training images; "
            "for example --data.num-validation 0"
        )
    order = torch.randperm(num_images, generator=generator(seed, "validation split"))
    return order[num_validation:].sort().values, order[:num_validation].sort().values
