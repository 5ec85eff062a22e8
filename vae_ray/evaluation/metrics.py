"""Metrics with one meaning: sums and counts in float64, added over all workers, divided once.

`distortion` = -E_q log p(x|z), `rate` = KL(q||p), `nelbo` = distortion + rate (beta is always 1 here), `loss` =
what was optimised. Nats, summed over pixels or latent dimensions, averaged over examples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vae_ray.objectives.elbo import ElboTerms
from vae_ray.parallel.group import WorkerGroup

NAMES = ("loss", "nelbo", "distortion", "rate")


class TermSums:
    """Running sums of the terms over this worker's examples; stays on the device, never waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, distortion, rate
        self._count = 0

    def add(self, terms: ElboTerms, loss_sum: Tensor) -> None:
        """Count a shard: its terms `(shard,)` and the sum of its examples' losses."""
        self._sums += torch.stack([loss_sum.detach(), terms.distortion.detach().sum(), terms.rate.detach().sum()])
        self._count += terms.rate.shape[0]

    def means(self) -> dict[str, float]:
        """Means over this worker's examples so far, in nats; waits for the device."""
        return _divide([*self._sums.tolist(), float(self._count)])

    def gathered(self, group: WorkerGroup) -> Tensor:
        """Every worker's sums and count, `(workers, 4)` float64, the same on every rank. All ranks must call it."""
        rows = torch.zeros(group.size, 4, dtype=torch.float64, device=self._sums.device)
        rows[group.rank] = self._row()
        return group.sum(rows)  # of one number and zeros: exact

    def restore(self, rows: Tensor, group: WorkerGroup) -> None:
        """Go on from what `gathered` gave: this worker's own row, or among another number of workers rank 0 all."""
        if len(rows) == group.size:
            mine = rows[group.rank]
        else:
            mine = rows.sum(0) if group.rank == 0 else torch.zeros(4, dtype=torch.float64)
        self._sums, self._count = mine[:3].to(self._sums.device, copy=True), int(mine[3])

    def reduced(self, group: WorkerGroup) -> dict[str, float]:
        """Means over all workers' examples, in nats, the same on every rank. All ranks must call it."""
        return _divide(group.sum(self._row()).tolist())

    def _row(self) -> Tensor:
        count = torch.tensor([self._count], dtype=torch.float64, device=self._sums.device)
        return torch.cat([self._sums, count])


def _divide(sums: list[float]) -> dict[str, float]:
    loss, distortion, rate, count = sums
    values = (loss, distortion + rate, distortion, rate)
    return {name: value / max(count, 1.0) for name, value in zip(NAMES, values, strict=True)}


def labelled(split: str, means: dict[str, float]) -> dict[str, float]:
    """`{"val/nelbo": ...}` from `{"nelbo": ...}`."""
    return {f"{split}/{name}": value for name, value in means.items()}
