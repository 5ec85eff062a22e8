"""Latent noise eps ~ N(0, I), drawn in blocks of rows that each have an address of their own.

Row r of whatever is addressed (a global batch, a split, the images of one call of `generate`) belongs to block
r // BLOCK_ROWS. A block's numbers depend on its address alone: not on who draws it, with which other rows, or in
batches of what size. A worker draws only the blocks in which its rows lie.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vae_ray.models.latents import Latents
from vae_ray.seeds import stream

BLOCK_ROWS = 64
EVALUATION_NOISE = "evaluation noise"
"""The address of what evaluation draws."""

Shapes = tuple[tuple[int, ...], ...]


def latent_noise(
    shapes: Shapes,
    rows: slice,
    seed: int,
    *address: str | int,
    num_samples: int = 1,
    device: torch.device | None = None,
) -> Latents:
    """Noise of the rows `rows` for each group: `(num_samples * N, *shape)`, sample by sample, each N rows in order.

    The first of k samples is the sample of k = 1.
    """
    first, last = rows.start // BLOCK_ROWS, max(rows.start, rows.stop - 1) // BLOCK_ROWS
    blocks = [_block(shapes, num_samples, stream(seed, *address, block)) for block in range(first, last + 1)]
    start = rows.start - first * BLOCK_ROWS
    stop = start + rows.stop - rows.start
    return tuple(_rows(parts, start, stop).to(device, non_blocking=True) for parts in zip(*blocks, strict=True))


def _rows(parts: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Rows start..stop of blocks `(num_samples, BLOCK_ROWS, *shape)` that follow each other."""
    joined = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
    return joined[:, start:stop].flatten(0, 1)


@functools.lru_cache(maxsize=2)
def _block(shapes: Shapes, num_samples: int, seed: int) -> Latents:
    """One block for each group, `(num_samples, BLOCK_ROWS, *shape)`; cached for batches smaller than a block."""
    generator = torch.Generator().manual_seed(seed)
    # one sample after the other, so that more of them leave the first as it is
    samples = [
        [torch.randn(1, BLOCK_ROWS, *shape, generator=generator) for shape in shapes] for _ in range(num_samples)
    ]
    return tuple(torch.cat(parts) if num_samples > 1 else parts[0] for parts in zip(*samples, strict=True))


def num_elements(shapes: Shapes) -> int:
    """Latent dimensions of all groups together."""
    return sum(math.prod(shape) for shape in shapes)
