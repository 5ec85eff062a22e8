"""Batches: a seeded global order of the images, and each worker's rows of every global batch.

The last stage of the data flow. Everything is a function of (seed, epoch, step, rank, size), so that any
worker can compute its part alone, resume anywhere, and together they see every image exactly once an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vae_ray.seeds import generator


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


class Loader:
    """The images of one split, batch by batch. `shards` says which rows this worker computes."""

    def __init__(self, pixels: Tensor, indices: Tensor, *, seed: int, shards: Shards) -> None:
        self.pixels, self.indices, self.seed, self.shards = pixels, indices, seed, shards

    def training(self, epoch: int, *, global_batch_size: int, first_step: int = 0) -> Iterator[Batch]:
        """Every image once, in an order that differs every epoch; the last batch may be smaller.

        From `first_step` (0-based) on: the steps before it are not computed.
        """
        order = self.order(epoch)
        for start in range(first_step * global_batch_size, len(order), global_batch_size):
            stop = min(start + global_batch_size, len(order))
            part = self.shards.slice_of(start, stop)
            yield Batch(self.images(order[part]), slice(part.start - start, part.stop - start), stop - start)

    def evaluation(self, *, batch_size: int) -> Iterator[Batch]:
        """Every image once, in order."""
        for start in range(0, len(self.indices), batch_size):
            stop = min(start + batch_size, len(self.indices))
            part = self.shards.slice_of(start, stop)
            yield Batch(self.images(self.indices[part]), part, stop - start)

    def order(self, epoch: int) -> Tensor:
        """The images' indices in the order in which the epoch visits them."""
        return self.indices[torch.randperm(len(self.indices), generator=generator(self.seed, "order", epoch))]

    def images(self, indices: Tensor) -> Tensor:
        """Floats in [0, 1], `(n, C, H, W)`, on this worker's device."""
        # index_select is 20x faster than pixels[indices] for uint8 rows
        return scaled(self.pixels.index_select(0, indices).to(self.shards.device))


def scaled(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in [0, 1]."""
    return pixels.float().mul_(1 / 255)
