"""Batches: a seeded global order of the images, and each worker's slice of every global batch.

The last stage of the data's way. Everything is a function of (seed, epoch, step, rank, size), so that any
worker can compute its part alone, resume anywhere, and together they see every image exactly once an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vae_ray.seeds import generator, stream


class Batch(NamedTuple):
    """One worker's shard of one global batch."""

    x: Tensor
    """Images `(shard, C, H, W)`, float32 in [0, 1], on the worker's device."""
    eps: Tensor
    """Latent noise `(shard, latent_dim)`: this shard's rows of the global batch's noise."""
    global_size: int
    """Images in the global batch, over all workers."""


class Shards(NamedTuple):
    """Which images a worker sees: rank `rank` of `size` workers, batches on `device`."""

    rank: int
    size: int
    device: torch.device

    def slice_of(self, start: int, stop: int) -> slice:
        """This worker's part of the positions start..stop: contiguous, sizes differing by at most one.

        64 over 3 workers is 22 + 21 + 21; a batch smaller than `size` leaves some workers an empty shard.
        """
        base, extra = divmod(stop - start, self.size)
        first = start + self.rank * base + min(self.rank, extra)
        return slice(first, first + base + (self.rank < extra))


def training_batches(
    pixels: Tensor,
    indices: Tensor,
    *,
    seed: int,
    epoch: int,
    global_batch_size: int,
    latent_dim: int,
    shards: Shards,
    first_step: int = 0,
) -> Iterator[Batch]:
    """Every image of `indices` once, in an order that differs every epoch; the last batch may be smaller.

    From `first_step` (0-based) on: the steps before it are not computed.
    """
    order = training_order(indices, seed=seed, epoch=epoch)
    noise = training_noise(epoch)
    yield from _batches(pixels, order, global_batch_size, latent_dim, shards, seed, noise, first_step)


def training_order(indices: Tensor, *, seed: int, epoch: int) -> Tensor:
    """`indices` in the order in which the epoch visits them."""
    return indices[torch.randperm(len(indices), generator=generator(seed, "order", epoch))]


def training_noise(epoch: int) -> tuple[str | int, ...]:
    """The address of an epoch's noise; that of step s is `(*training_noise(epoch), s)`."""
    return "training noise", epoch


def evaluation_batches(
    pixels: Tensor, indices: Tensor, *, seed: int, batch_size: int, latent_dim: int, shards: Shards
) -> Iterator[Batch]:
    """Every image of `indices` once, in order, with noise that depends on `seed` alone, not on the epoch."""
    yield from _batches(pixels, indices, batch_size, latent_dim, shards, seed, ("evaluation noise",))


def _batches(
    pixels: Tensor,
    order: Tensor,
    batch_size: int,
    latent_dim: int,
    shards: Shards,
    seed: int,
    noise_address: tuple[str | int, ...],
    first_step: int = 0,
) -> Iterator[Batch]:
    noise = torch.Generator()
    for step, start in enumerate(range(first_step * batch_size, len(order), batch_size), first_step):
        stop = min(start + batch_size, len(order))
        part = shards.slice_of(start, stop)
        # All workers draw the noise of the whole batch and keep their rows: the same whoever computes it.
        noise.manual_seed(stream(seed, *noise_address, step))
        eps = torch.randn(stop - start, latent_dim, generator=noise)[part.start - start : part.stop - start]
        # index_select is 20x faster than pixels[order[part]] for uint8 rows
        x = pixels.index_select(0, order[part]).to(shards.device, non_blocking=True).float().mul_(1 / 255)
        yield Batch(x, eps.to(shards.device, non_blocking=True), stop - start)
