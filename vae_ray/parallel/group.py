"""The loop's whole view of data parallelism: a `WorkerGroup` gives rank, size and sums.

`SingleProcess` is the group of one; `vae_ray.distributed` provides that of Ray Train workers, and the tests one of
threads. The loop knows no other.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from vae_ray.data.batches import Shards
from vae_ray.errors import UserError

Value = TypeVar("Value")


class WorkerGroup(Protocol):
    """`size` workers of which this one is `rank`, computing on `device`. All methods are collective."""

    rank: int
    size: int
    device: torch.device
    node: str
    """The address of this worker's machine."""

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over workers, the same on every worker, in a new tensor if there is more than one."""
        ...

    def sum_gradients(self, vector: Tensor) -> None:
        """Replace a contiguous vector by its sum over workers, to the same bits on every worker."""
        ...

    def broadcast(self, value: Value) -> Value:
        """Rank 0's `value`, on every worker."""
        ...

    def all_gather(self, value: Value) -> list[Value]:
        """Every worker's `value`, in order of rank, on every worker."""
        ...

    def preempted(self) -> bool:
        """Whether a worker's machine is about to be taken away, the same on every worker."""
        ...


class SingleProcess:
    """One worker alone; its sums are its own."""

    rank = 0
    size = 1

    def __init__(self, device: torch.device) -> None:
        self.device, self.node = device, socket.gethostname()

    def sum(self, values: Tensor) -> Tensor:
        return values

    def sum_gradients(self, vector: Tensor) -> None:
        pass

    def broadcast(self, value: Value) -> Value:
        return value

    def all_gather(self, value: Value) -> list[Value]:
        return [value]

    def preempted(self) -> bool:
        return False


def raise_on_all_ranks(group: WorkerGroup, action: Callable[[], Value]) -> Value:
    """What `action` returns on this worker; if it raises `UserError` on one, that is raised on all. Collective.

    A worker that failed alone would leave the others waiting.
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


def broadcast_buffers(group: WorkerGroup, module: nn.Module) -> None:
    """Give all workers rank 0's buffers, integer ones too. Collective."""
    if group.size == 1:
        return
    for buffer in module.buffers():
        buffer.copy_(group.sum(buffer if group.rank == 0 else torch.zeros_like(buffer)))


def add_up_gradients(group: WorkerGroup, gradients: Sequence[Tensor]) -> list[Tensor]:
    """The sum over workers of each gradient, as views of one vector for each dtype. Collective.

    One sum at the end of the backward pass, asked for: an objective may run several passes, and a pass need not reach
    every parameter. (DistributedDataParallel counts one hook a parameter, averages, and imports torch's compiler.)
    """
    if group.size == 1:
        return list(gradients)
    result: list[Tensor | None] = [None] * len(gradients)
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        members = [index for index, gradient in enumerate(gradients) if gradient.dtype == dtype]
        vector = torch.cat([gradients[index].reshape(-1) for index in members])
        group.sum_gradients(vector)
        parts = vector.split([gradients[index].numel() for index in members])
        for index, part in zip(members, parts, strict=True):
            result[index] = part.view_as(gradients[index])
    return cast(list[Tensor], result)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every element is finite; waits for the device."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
