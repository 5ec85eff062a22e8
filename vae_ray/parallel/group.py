"""Who computes together: the loop's whole view of data parallelism.

The loop asks a `WorkerGroup` for its place and for sums over all workers. `SingleProcess` is the group of one;
`vae_ray.distributed` provides the one of Ray Train workers.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from vae_ray.data.batches import Shards
from vae_ray.errors import UserError

Value = TypeVar("Value")


class WorkerGroup(Protocol):
    """`size` workers of which this one is `rank`, computing on `device`."""

    rank: int
    size: int
    device: torch.device
    node: str
    """The address of this worker's machine."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, such that backward leaves in every worker the *sum* of all workers' gradients.

        All ranks must call it.
        """
        ...

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over workers, the same on every worker. All ranks must call it."""
        ...

    def broadcast(self, value: Value) -> Value:
        """Rank 0's `value`, on every worker. All ranks must call it."""
        ...

    def all_gather(self, value: Value) -> list[Value]:
        """Every worker's `value`, in order of rank, on every worker. All ranks must call it."""
        ...

    def preempted(self) -> bool:
        """Whether a worker's machine is about to be taken away, the same on every worker. All ranks must call it."""
        ...


class SingleProcess:
    """One worker alone; its sums are its own."""

    rank = 0
    size = 1

    def __init__(self, device: torch.device) -> None:
        self.device, self.node = device, socket.gethostname()

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def sum(self, values: Tensor) -> Tensor:
        return values

    def broadcast(self, value: Value) -> Value:
        return value

    def all_gather(self, value: Value) -> list[Value]:
        return [value]

    def preempted(self) -> bool:
        return False


def raise_on_all_ranks(group: WorkerGroup, action: Callable[[], Value]) -> Value:
    """What `action` returns on this worker; if it raises `UserError` on one, that is raised on all.

    A worker that failed alone would leave the others waiting. All ranks must call it.
    """
    result, complaint = None, None
    try:
        result = action()
    except UserError as error:
        complaint = str(error)
    complaints = [text for text in group.all_gather(complaint) if text is not None]
    if complaints:
        raise UserError(complaints[0])
    return cast(Value, result)


def shards_of(group: WorkerGroup) -> Shards:
    """The part of every global batch that this worker computes."""
    return Shards(group.rank, group.size, group.device)
