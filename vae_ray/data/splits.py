"""The splits of a run: train, validation (the source's own, or set aside from train) and test."""

from __future__ import annotations

from hashlib import sha256
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vae_ray.config.experiment import Experiment
from vae_ray.config.sections.data import DigitsData, PublishedData
from vae_ray.data.batches import Loader, Shards
from vae_ray.data.cache import Progress, open_dataset
from vae_ray.data.dataset import Dataset, Split
from vae_ray.data.shards import mixed
from vae_ray.errors import UserError
from vae_ray.seeds import generator, stream


class Splits(NamedTuple):
    """Images of a run on this node, and which of the training images are for validation."""

    dataset: Dataset
    train: Split
    test: Split
    train_indices: Tensor
    validation_indices: Tensor
    """In `train`; empty where the source has a validation split of its own."""
    condition: str | None = None
    """The labels that a conditional VAE is given."""

    @classmethod
    def open(cls, experiment: Experiment, *, progress: Progress | None = None) -> Splits:
        """Open the data set (prepare it, on the node's first call); raises `UserError` if it cannot serve."""
        dataset, num_validation = open_dataset(experiment.data, progress=progress), experiment.data.num_validation
        train, own = dataset.splits["train"], dataset.splits.get("val")
        if own is not None and num_validation not in (0, len(own)):
            raise UserError(
                f"data.num_validation: got {num_validation}, but the images have a validation split of {len(own)}, "
                "which is used; leave it out"
            )
        limits = [int(step.partition(":")[2]) for step in experiment.data.augment if step.startswith("shift:")]
        if max(limits, default=0) >= min(train.image_shape[1:]):
            raise UserError(
                f"data.augment: got shift:{max(limits)}, should be less than the {min(train.image_shape[1:])} pixels "
                "of the images' shorter side; for example --data.augment shift:2"
            )
        num_set_aside = 0 if own is not None else num_validation
        indices = validation_indices(
            train,
            num_validation=num_set_aside,
            seed=experiment.split_seed,
            by_content=not isinstance(experiment.data, DigitsData | PublishedData),
        )
        return cls(dataset, train, dataset.splits["test"], *indices, experiment.model.condition)

    @property
    def num_validation(self) -> int:
        """Images of the validation split; 0 where there is none."""
        own = self.dataset.splits.get("val")
        return len(self.validation_indices) if own is None else len(own)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the images of each split, and of the labels of a conditional VAE (`fingerprints_of`)."""
        return {
            key: value
            for split in self.dataset.splits.values()
            for key, value in fingerprints_of(split, self.condition).items()
        }

    def mean_training_image(self) -> Tensor:
        """The mean of the training images, `(C, H, W)` in [0, 1]; in float64 from exact sums."""
        total = self.dataset.sum_of_images("train")
        for part in self.validation_indices.split(1024):
            total = total - self.train.gather(part).sum(0, dtype=torch.int64)
        return total.double() / (255.0 * len(self.train_indices))

    def loader(self, name: str, experiment: Experiment, shards: Shards) -> Loader:
        """The images of "train", "val" or "test" as the experiment reads them, and which of them a worker computes."""
        data = experiment.data
        window = None if data.window_mib is None else data.window_mib << 20
        return Loader(
            *self.select(name),
            seed=experiment.run.seed,
            split_seed=experiment.split_seed,
            shards=shards,
            augment=data.augment,
            binarize=data.binarize,
            window_bytes=window,
        )

    def select(self, name: str) -> tuple[Split, Tensor]:
        """The split in which the images of "train", "val" or "test" lie, and their indices there."""
        if name == "train":
            return self.train, self.train_indices
        if name == "val" and "val" not in self.dataset.splits:
            return self.train, self.validation_indices
        split = self.dataset.splits[name]
        return split, torch.arange(len(split))


def fingerprints_of(split: Split, condition: str | None) -> dict[str, str]:
    """`{"train": ...}` of the images and, if a VAE is conditional on labels that they have, `{"train label": ...}`.

    Equal for equal images, and labels with equal names, wherever they lie.
    """
    found = {split.name: split.fingerprint}
    if condition in split.columns:
        names = "\n".join(split.names.get(condition, ()))
        found[f"{split.name} {condition}"] = sha256(
            split.columns[condition].numpy().tobytes() + names.encode()
        ).hexdigest()
    return found


def validation_indices(
    split: Split, *, num_validation: int, seed: int, by_content: bool = True
) -> tuple[Tensor, Tensor]:
    """Disjoint, sorted indices `(train, validation)`, together all of `split`; drawn by the seed.

    An image's content decides whether it is among the first `num_validation`, so that it usually stays where it is when
    others are added; else its number, as in published sets, to which none are added. Raises `UserError` if nothing
    would be left to train on.
    """
    if num_validation >= len(split):
        raise UserError(
            f"data.num_validation: got {num_validation}, should be less than the {len(split)} training images; "
            "for example --data.num-validation 0"
        )
    if num_validation == 0:
        return torch.arange(len(split)), torch.arange(0)
    if by_content:
        keys = mixed(split.digests.numpy(), stream(seed, "validation split"))
        order = torch.from_numpy(np.argsort(keys, kind="stable"))
    else:
        order = torch.randperm(len(split), generator=generator(seed, "validation split"))
    return order[num_validation:].sort().values, order[:num_validation].sort().values
