"""Who computes together: the loop's whole view of data parallelism.

The loop asks a `WorkerGroup` for its place and for sums over all workers. `Solo` is the group of one;
`vae_ray.distributed` provides the one of Ray Train workers.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from vae_ray.data.batches import Shards

Value = TypeVar("Value")


class WorkerGroup(Protocol):
    """`size` workers of which this one is `rank`, computing on `device`."""

    rank: int
    size: int
    device: torch.device

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, such that backward leaves in every worker the *sum* of all workers' gradients.

        All ranks must call it.
        """
        ...

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over workers, the same on every worker. All ranks must call it."""
        ...

    def share(self, value: Value) -> Value:
        """Rank 0's `value`, on every worker. All ranks must call it."""
        ...


class Solo:
    """One worker alone; its sums are its own."""

    rank = 0
    size = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def sum(self, values: Tensor) -> Tensor:
        return values

    def share(self, value: Value) -> Value:
        return value


def shards_of(group: WorkerGroup) -> Shards:
    """The part of every global batch that this worker computes."""
    return Shards(group.rank, group.size, group.device)
