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
from torch import Tensor

from vae_ray.errors import Diverged, Stopped, UserError
from vae_ray.training import fit, trainer
from vae_ray.training.cpu_settings import cpu_settings

CPU = torch.device("cpu")


class Meeting:
    """Where the threads of a group meet; broken for all as soon as one fails."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.values: list[Any] = [None] * size


class ThreadWorkers:
    """One thread's view of its group."""

    device = CPU
    node = "here"

    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        self.rank, self.size, self._meeting = rank, size, meeting
        self.gradient_sums: list[int] = []
        """Length of each vector of gradients that was summed."""
        self._num_sums, self._action_at, self._action = 0, 0, lambda: None

    def after_sums(self, num_sums: int, action: Callable[[], None]) -> None:
        """Call `action` once this worker has taken part in so many sums, those of gradients included."""
        self._action_at, self._action = num_sums, action

    def sum(self, values: Tensor) -> Tensor:
        exchanged = self._exchange(values)
        total = exchanged[0].clone()
        for other in exchanged[1:]:
            total += other
        self._meeting.barrier.wait()
        self._num_sums += 1
        if self._num_sums == self._action_at:
            self._action()
        return total

    def sum_gradients(self, vector: Tensor) -> None:
        assert vector.is_contiguous()
        self.gradient_sums.append(vector.numel())
        vector.copy_(self.sum(vector))

    def broadcast(self, value: Any) -> Any:
        return self.all_gather(value)[0]

    def all_gather(self, value: Any) -> list[Any]:
        values = list(self._exchange(value))
        self._meeting.barrier.wait()
        return values

    def preempted(self) -> bool:
        return False

    def _exchange(self, value: Any) -> list[Any]:
        """Every worker's value; nobody may change it before the next barrier."""
        self._meeting.values[self.rank] = value
        self._meeting.barrier.wait()
        return self._meeting.values


def on_threads(size: int, work: Callable[[ThreadWorkers], Any]) -> list[Any]:
    """What `work` returns, or the exception that it raises, for every rank."""
    meeting = Meeting(size)

    def run(rank: int) -> Any:
        try:
            return work(ThreadWorkers(rank, size, meeting))
        except (Stopped, Diverged, UserError) as error:  # all ranks raise these together: nobody is left waiting
            return error
        except Exception as error:
            meeting.barrier.abort()
            return error

    # Threads must not change under each other what belongs to the process: its settings, and the generator from which
    # torch draws new weights.
    building = threading.Lock()

    def one_at_a_time(build: Callable[..., Any]) -> Callable[..., Any]:
        def locked(*args: Any, **kwargs: Any) -> Any:
            with building:
                return build(*args, **kwargs)

        return locked

    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu_settings(num_threads=1, device=CPU))
        stack.enter_context(patch.object(fit, "cpu_settings", lambda **_: contextlib.nullcontext()))
        for name in ("build_vae", "build_objective"):
            stack.enter_context(patch.object(trainer, name, one_at_a_time(getattr(trainer, name))))
        threads = stack.enter_context(ThreadPoolExecutor(size))
        return list(threads.map(run, range(size)))


def results_on_threads(size: int, work: Callable[[ThreadWorkers], Any]) -> list[Any]:
    """What `work` returns for every rank; raises what it raises on one."""
    results = on_threads(size, work)
    # the others only report the barrier that the failing rank broke
    errors = sorted(
        (result for result in results if isinstance(result, BaseException)),
        key=lambda error: isinstance(error, threading.BrokenBarrierError),
    )
    if errors:
        raise errors[0]
    return results
