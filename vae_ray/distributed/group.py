"""The worker group of Ray Train: rank, device, and sums over workers, those of gradients too."""

import os
from typing import cast

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from vae_ray.parallel.gradient_sum import sum_after_backward
from vae_ray.parallel.group import Value
from vae_ray.parallel.shared_memory import SharedMemorySum


class RayWorkers:
    """This worker's view of its group; made inside a Ray Train worker."""

    def __init__(self) -> None:
        context = ray.train.get_context()
        self.rank, self.size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.node = ray.util.get_node_ip_address()
        self._one_node = context.get_local_world_size() == self.size
        self._shared_sum: SharedMemorySum | None = None

    def wrap(self, model: nn.Module) -> nn.Module:
        if self.size == 1:
            return model
        if self.device.type == "cpu":
            sum_after_backward(model.parameters(), self._sum_on_cpus)
            return model
        parallel = ray.train.torch.prepare_model(
            model,
            parallel_strategy_kwargs={"gradient_as_bucket_view": True, "broadcast_buffers": False},  # there are none
        )
        parallel.register_comm_hook(None, _sum_bucket)
        return parallel

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
        """Whether a node of this group was announced to go away. A collective of Ray's: all ranks must call it."""
        if os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") == "0":  # on a Ray of this machine alone
            return False
        return ray.train.get_preemption_info() is not None

    def _sum_on_cpus(self, gradients: Tensor) -> None:
        """Sum all gradients over the group, in place."""
        if self._one_node:
            if self._shared_sum is None:
                self._shared_sum = SharedMemorySum(self.rank, self.size, gradients.numel())
            self._shared_sum(gradients)
        else:
            dist.all_reduce(gradients)

    def close(self) -> None:
        """Let go of shared memory."""
        self._shared_sum = None


# Evaluated annotations: torch looks at them when the hook is registered.
def _sum_bucket(
    _: None,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    # DDP's own reduction divides by the number of workers; ours are already parts of the global mean.
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
