"""Metrics with one meaning: sums and counts in float64, added over all workers, divided once.

`distortion` = -E_q log p(x|z), `rate` = KL(q||p), `nelbo` = distortion + rate (beta is always 1 here), `loss` =
what was optimised. Nats, summed over pixels or latent dimensions, averaged over examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vae_ray.parallel.group import WorkerGroup

ELBO_TERMS = ("distortion", "rate")


class Means(NamedTuple):
    """Means over all workers' examples, in nats."""

    values: dict[str, float]
    """By name, with `nelbo`; NaN over no images."""
    num_images: int
    """How many images they are over."""


class TermSums:
    """Running sums of named terms over this worker's examples; stays on the device, never waits for it."""

    def __init__(self, terms: Sequence[str], device: torch.device) -> None:
        self.terms = tuple(terms)
        self._sums = torch.zeros(len(self.terms), dtype=torch.float64, device=device)
        self._count = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count a shard: every term's values, `(shard,)` each."""
        parts = [values[term].detach() for term in self.terms]
        self._sums += torch.stack([part.sum() for part in parts])
        self._count += len(parts[0])

    def means(self) -> dict[str, float]:
        """Means over this worker's examples so far, in nats; waits for the device."""
        return self._divide([*self._sums.tolist(), float(self._count)]).values

    def gathered(self, group: WorkerGroup) -> Tensor:
        """Every worker's sums and count, `(workers, terms + 1)` float64, the same on every rank. Collective."""
        rows = torch.zeros(group.size, len(self.terms) + 1, dtype=torch.float64, device=self._sums.device)
        rows[group.rank] = self._row()
        return group.sum(rows)  # of one number and zeros: exact

    def restore(self, rows: Tensor, group: WorkerGroup) -> None:
        """Continue from what `gathered` gave: from the own row or, of another number of workers, rank 0 from all."""
        if len(rows) == group.size:
            mine = rows[group.rank]
        else:
            mine = rows.sum(0) if group.rank == 0 else torch.zeros_like(rows[0])
        self._sums, self._count = mine[:-1].to(self._sums.device, copy=True), int(mine[-1])

    def reduced(self, group: WorkerGroup) -> Means:
        """Means over all workers' examples, the same on every rank. Collective."""
        return self._divide(group.sum(self._row()).tolist())

    def _row(self) -> Tensor:
        count = torch.tensor([self._count], dtype=torch.float64, device=self._sums.device)
        return torch.cat([self._sums, count])

    def _divide(self, sums: list[float]) -> Means:
        *totals, count = sums
        means = {term: total / count if count else math.nan for term, total in zip(self.terms, totals, strict=True)}
        return Means({"nelbo": means["distortion"] + means["rate"], **means}, int(count))


def bits_per_dim(nelbo: float, image_shape: Sequence[int]) -> float:
    """`nelbo` (nats per image, of a likelihood over 256 levels) in bits per channel of a pixel."""
    return nelbo / (math.log(2) * math.prod(image_shape))


def labelled(split: str, means: Mapping[str, float]) -> dict[str, float]:
    """`{"val/nelbo": ...}` from `{"nelbo": ...}`."""
    return {f"{split}/{name}": value for name, value in means.items()}
