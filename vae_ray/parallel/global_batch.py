"""What an objective may ask about the rows of the other workers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vae_ray.parallel.group import WorkerGroup


@dataclass(frozen=True)
class GlobalBatch:
    """The global batch of which this worker computes `rows`."""

    size: int
    """Images in the global batch, over all workers."""
    rows: slice
    """This worker's rows of the global batch; may be empty."""
    num_data: int
    """Images in the training split."""
    group: WorkerGroup

    @property
    def num_rows(self) -> int:
        """Images of this worker."""
        return self.rows.stop - self.rows.start

    def gather(self, t: Tensor) -> Tensor:
        """All workers' rows, `(size, ...)`, from this worker's `(num_rows, ...)`. Collective.

        Own rows stay attached to the graph, the others are constants. A function F of the result, computed by every
        worker and not divided by their number, has gradients that add up over workers to F's gradient for the global
        batch, without communication in the backward pass. F must not contain trained parameters.
        """
        if self.group.size == 1:
            return t
        rows = t.new_zeros(self.size, *t.shape[1:])
        rows[self.rows] = t.detach()
        others = self.group.sum(rows)  # of one worker's row and zeros: exact
        return torch.cat([others[: self.rows.start], t, others[self.rows.stop :]])

    def sum(self, t: Tensor) -> Tensor:
        """Elementwise sum over workers; no gradient. Collective."""
        return self.group.sum(t.detach())
