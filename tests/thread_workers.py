"""Data parallelism without Ray or processes: the workers of a group are threads of this one.

A second implementation of `WorkerGroup`, for what all ranks must agree on.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from vae_ray.errors import Diverged, Stopped
from vae_ray.models.vae import VAE, build_vae
from vae_ray.training import fit as training_fit
from vae_ray.training import trainer as training_worker
from vae_ray.training.cpu_settings import cpu_settings


class Meeting:
    """Where the threads of a group meet; broken for all as soon as one fails."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.given: list[Any] = [None] * size


class ThreadWorkers:
    """One thread's view of its group."""

    device = torch.device("cpu")
    node = "here"

    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        self.rank, self.size, self._meeting = rank, size, meeting
        self._num_sums, self._at, self._then = 0, 0, lambda: None

    def after_sums(self, num_sums: int, then: Callable[[], None]) -> None:
        """Call `then` once this worker has taken part in so many sums."""
        self._at, self._then = num_sums, then

    def wrap(self, model: nn.Module) -> nn.Module:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self._sum_gradient)
        return model

    def _sum_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.copy_(self.sum(parameter.grad))

    def sum(self, values: Tensor) -> Tensor:
        total = torch.stack(self._exchanged(values)).sum(0)
        self._meeting.barrier.wait()
        self._num_sums += 1
        if self._num_sums == self._at:
            self._then()
        return total

    def all_gather(self, value: Any) -> list[Any]:
        values = list(self._exchanged(value))
        self._meeting.barrier.wait()
        return values

    def broadcast(self, value: Any) -> Any:
        return self.all_gather(value)[0]

    def _exchanged(self, value: Any) -> list[Any]:
        """What all have given; nobody may change it before the next barrier."""
        self._meeting.given[self.rank] = value
        self._meeting.barrier.wait()
        return self._meeting.given

    def preempted(self) -> bool:
        return False


def on_threads(size: int, work: Callable[[ThreadWorkers], Any]) -> list[Any]:
    """What `work` returns, or the exception that it raises, for every rank."""
    meeting = Meeting(size)

    def one(rank: int) -> Any:
        try:
            return work(ThreadWorkers(rank, size, meeting))
        except (Stopped, Diverged) as error:  # on these all agree: nobody is left waiting
            return error
        except Exception as error:
            meeting.barrier.abort()
            return error

    # What belongs to the process is not for threads to change under each other: the precision of products, and the
    # generator from which torch draws new weights.
    untuned = patch.object(training_fit, "cpu_settings", lambda **_: contextlib.nullcontext())
    building = threading.Lock()

    def build_alone(*args: Any, **kwargs: Any) -> VAE:
        with building:
            return build_vae(*args, **kwargs)

    one_by_one = patch.object(training_worker, "build_vae", build_alone)
    with cpu_settings(num_threads=1), untuned, one_by_one, ThreadPoolExecutor(size) as threads:
        return list(threads.map(one, range(size)))
