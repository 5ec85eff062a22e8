"""Batches: a seeded global order of the images, and each worker's rows of every global batch.

The last stage of the data flow. Everything is a function of (seed, epoch, step, rank, size), so that any
worker can compute its part alone, resume anywhere, and together they see every image exactly once an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor

from vae_ray.data.dataset import Split, read_ahead
from vae_ray.data.transforms import Binarization, augment, binarize, parse_augmentation
from vae_ray.seeds import generator

WHOLE_WINDOWS = 4
"""Images of at most so many windows are shuffled as a whole."""


class Shards(NamedTuple):
    """Which rows a worker computes: rank `rank` of `size` workers, batches on `device`."""

    rank: int
    size: int
    device: torch.device

    def slice_of(self, start: int, stop: int) -> slice:
        """This worker's part of the rows start..stop: contiguous, sizes differing by at most one.

        64 over 3 workers is 22 + 21 + 21; a batch smaller than `size` leaves some workers an empty shard.
        """
        base, extra = divmod(stop - start, self.size)
        first = start + self.rank * base + min(self.rank, extra)
        return slice(first, first + base + (self.rank < extra))


class Batch(NamedTuple):
    """One worker's shard of one global batch."""

    x: Tensor
    """Images `(shard, C, H, W)`, float32 in [0, 1], on the worker's device."""
    rows: slice
    """Which rows of the global batch they are; of an evaluation, which rows of the split."""
    global_size: int
    """Images in the global batch, over all workers."""
    labels: dict[str, Tensor]
    """Labels and factors by name, int64 or float64 `(shard,)`, on the CPU; empty where the data set has none."""


class Loader:
    """The images of one split, batch by batch.

    Args:
        split: where they lie.
        indices: which images of it, sorted.
        seed: of the order and of random changes that are drawn anew.
        split_seed: of binarization that is drawn once; None means `seed`.
        shards: which rows this worker computes.
        augment: changes of training images, as `data.augment` has them.
        binarize: `data.binarize`.
        window_bytes: images of more than four windows are read and shuffled window by window; None: never.
    """

    def __init__(
        self,
        split: Split,
        indices: Tensor,
        *,
        seed: int,
        shards: Shards,
        split_seed: int | None = None,
        augment: Sequence[str] = (),
        binarize: Binarization = "none",
        window_bytes: int | None = None,
    ) -> None:
        self.split, self.indices, self.seed, self.shards = split, indices, seed, shards
        self._augmentations = [parse_augmentation(text) for text in augment]
        self._binarization = binarize
        self._split_seed = seed if split_seed is None else split_seed
        num_bytes = len(indices) * math.prod(split.image_shape)
        is_windowed = window_bytes is not None and num_bytes > WHOLE_WINDOWS * window_bytes
        self._window_bytes = window_bytes if is_windowed else None

    def training(self, epoch: int, *, global_batch_size: int, first_step: int = 0) -> Iterator[Batch]:
        """Every image once, in an order that differs every epoch; the last batch may be smaller.

        From `first_step` (0-based) on: the images of the steps before it are not read.
        """
        for indices in self.steps(epoch, global_batch_size=global_batch_size, first_step=first_step):
            rows = self.shards.slice_of(0, len(indices))
            yield self._batch(indices[rows], rows, len(indices), epoch=epoch)

    def evaluation(self, *, batch_size: int) -> Iterator[Batch]:
        """Every image once, in order."""
        for start in range(0, len(self.indices), batch_size):
            stop = min(start + batch_size, len(self.indices))
            rows = self.shards.slice_of(start, stop)
            yield self._batch(self.indices[rows], rows, stop - start, epoch=None)
            self.release(before=start)

    def release(self, *, before: int) -> None:
        """Give the memory of images back that all come before a row, where they are read window by window."""
        if self._window_bytes is not None:
            self.split.release(before=int(self.indices[before]))

    def steps(self, epoch: int, *, global_batch_size: int, first_step: int = 0) -> Iterator[Tensor]:
        """The indices of the global batch of each step, from `first_step` on: a function of (seed, epoch) alone."""
        num_before, rest = first_step * global_batch_size, torch.empty(0, dtype=torch.int64)
        behind: list[int] = []
        windows = self._windows(epoch)
        for number, window in enumerate(windows):
            indices = self._order(window, epoch, number)
            if num_before >= len(indices):
                num_before -= len(indices)
                continue
            if window is not None:
                following = windows[number + 1] if number + 1 < len(windows) else []
                read_ahead(self.split.shards[shard] for shard in [*window, *(following or [])])
            rest, num_before = torch.cat([rest, indices[num_before:]]), 0
            num_whole = len(rest) // global_batch_size * global_batch_size
            for start in range(0, num_whole, global_batch_size):
                yield rest[start : start + global_batch_size]
                self._release(behind)
                behind = []
            rest, behind = rest[num_whole:], [*behind, *(window or ())]
        if len(rest):
            yield rest
        self._release(behind)

    def _release(self, shards: list[int]) -> None:
        for shard in shards:
            self.split.shards[shard].release()

    def _windows(self, epoch: int) -> list[list[int] | None]:
        """The shards of each window of an epoch; one None: all images are one window."""
        if self._window_bytes is None:
            return [None]
        sizes = self.split.starts.diff() * math.prod(self.split.image_shape)
        windows: list[list[int]] = [[]]
        num_bytes = 0
        for shard in torch.randperm(len(sizes), generator=generator(self.seed, "shards", epoch)).tolist():
            if windows[-1] and num_bytes + int(sizes[shard]) > self._window_bytes:
                windows.append([])
                num_bytes = 0
            windows[-1].append(shard)
            num_bytes += int(sizes[shard])
        return [*windows]

    def _order(self, window: list[int] | None, epoch: int, number: int) -> Tensor:
        """The indices of a window's images in the order in which the epoch visits them."""
        if window is None:
            return self.indices[torch.randperm(len(self.indices), generator=generator(self.seed, "order", epoch))]
        bounds = torch.searchsorted(self.indices, self.split.starts).tolist()
        indices = torch.cat([self.indices[bounds[shard] : bounds[shard + 1]] for shard in window])
        return indices[torch.randperm(len(indices), generator=generator(self.seed, "order", epoch, number))]

    def _batch(self, indices: Tensor, rows: slice, global_size: int, *, epoch: int | None) -> Batch:
        return Batch(self.images(indices, epoch=epoch), rows, global_size, self.labels(indices))

    def spread(self, num: int) -> Tensor:
        """The indices of `num` images from all over the split; of all where there are fewer."""
        num = min(num, len(self.indices))
        return self.indices[torch.arange(num) * len(self.indices) // max(1, num)]

    def labels(self, indices: Tensor) -> dict[str, Tensor]:
        """Labels and factors of images by name, `(n,)`; empty where the data set has none."""
        return {name: values.index_select(0, indices) for name, values in self.split.columns.items()}

    def drawn(self, num: int, label: str | None = None, classes: Tensor | None = None) -> Tensor:
        """`num` images, as evaluation sees them: the first of the first epoch's order, repeated where all are fewer.

        With `classes` `(num,)` of the labels `label`, each has its class; any, if no early image has that.
        """
        early = next(self.steps(1, global_batch_size=min(8 * num, len(self.indices))))
        if label is None or classes is None:
            return self.images(early[torch.arange(num) % len(early)])
        labels = self.split.columns[label][early]
        queues = {
            value: cycle((early[labels == value] if value in labels else early).tolist())
            for value in {*classes.tolist()}
        }
        return self.images(torch.tensor([next(queues[value]) for value in classes.tolist()]))

    def images(self, indices: Tensor, *, epoch: int | None = None) -> Tensor:
        """Floats in [0, 1], `(n, C, H, W)`, on this worker's device; augmented as in the training of an epoch."""
        pixels = self.split.gather(indices).to(self.shards.device)
        if self._binarization == "none" and not self._augmentations:
            return scaled(pixels)
        numbers, split = indices.to(self.shards.device), self.split.name
        if epoch is not None:
            pixels = augment(pixels, numbers, self._augmentations, seed=self.seed, epoch=epoch, split=split)
        seed = self.seed if self._binarization == "dynamic" and epoch is not None else self._split_seed
        return binarize(pixels, numbers, self._binarization, seed=seed, epoch=epoch, split=split)


def scaled(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in [0, 1]."""
    return pixels.float().mul_(1 / 255)
