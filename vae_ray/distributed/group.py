"""The worker group of Ray Train: rank, device, and sums over workers, those of gradients too."""

import os
from typing import cast

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor

from vae_ray.parallel.group import Value
from vae_ray.parallel.shared_memory import SharedMemorySum, open_shared_memory_sum


class RayWorkers:
    """This worker's view of its group; made inside a Ray Train worker."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank, self.size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.node = ray.util.get_node_ip_address()
        self._one_node = context.get_local_world_size() == self.size
        self._shared_sums: dict[int, SharedMemorySum | None] = {}
        """By the length of the vector, one for each parameter set; None where Gloo must do."""

    def sum(self, values: Tensor) -> Tensor:
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def broadcast(self, value: Value) -> Value:
        if self.size == 1:
            return value
        values = [value if self.rank == 0 else None]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return cast(Value, values[0])

    def all_gather(self, value: Value) -> list[Value]:
        if self.size == 1:
            return [value]
        values: list[Value | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return cast(list[Value], values)

    def preempted(self) -> bool:
        """Whether a node of this group is about to be preempted. Collective."""
        if os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") == "0":  # on a Ray of this machine alone
            return False
        return ray.train.get_preemption_info() is not None

    def sum_gradients(self, vector: Tensor) -> None:
        if self.size == 1:
            return
        shared_sum = None
        if self._one_node and self.device.type == "cpu" and vector.dtype == torch.float32:
            length = vector.numel()
            if length not in self._shared_sums:
                self._shared_sums[length] = open_shared_memory_sum(self.rank, self.size, length)
            shared_sum = self._shared_sums[length]
        if shared_sum is None:
            dist.all_reduce(vector)
        else:
            shared_sum(vector)

    def close(self) -> None:
        """Release shared memory."""
        self._shared_sums.clear()
