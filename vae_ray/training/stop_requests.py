"""What interrupts training from outside, decided by rank 0 for all ranks: a request to stop, a preempted machine.

A request is the file `.stop` in the run's directory: the same for a signal in this process, for Ray workers on other
nodes and for trials.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from vae_ray.parallel.group import WorkerGroup
from vae_ray.run_files.run_directory import RunDirectory

AGREE_SECONDS = 0.2
"""About the time from one agreement to the next: a sum over workers costs a quarter of a millisecond of it."""
PREEMPTION_SECONDS = 2.0
"""Least time between two questions whether a machine goes away: each costs milliseconds."""


class Requests(NamedTuple):
    """What to do now; the same on every rank."""

    stop: bool = False
    """Write a checkpoint and end."""
    preempting: bool = False
    """Write a checkpoint and continue: a node is about to be preempted; True once."""


NOTHING = Requests()


class StopRequests:
    """Asks every few steps; rank 0 also decides how many, so that all ranks ask after the same step."""

    def __init__(self, run: RunDirectory, group: WorkerGroup) -> None:
        self._run, self._group = run, group
        self._interval = self._steps_left = 1
        self._agreed_at = time.monotonic()
        self._ask_preempted_at = self._agreed_at
        self._was_preempted = False

    def after_step(self) -> Requests:
        """All ranks must call it after every step."""
        self._steps_left -= 1
        return self.ask() if self._steps_left <= 0 else NOTHING

    def ask(self) -> Requests:
        """Ask now. All ranks must call it."""
        own = self._flags_of_rank_0() if self._group.rank == 0 else (0.0, 0.0, 0.0)
        flags = torch.tensor(own, dtype=torch.float64, device=self._group.device)
        stop, ask_preempted, interval = self._group.sum(flags).tolist()
        self._interval = self._steps_left = int(interval)
        before = self._was_preempted
        if ask_preempted:
            self._was_preempted = self._group.preempted()
        return Requests(bool(stop), self._was_preempted and not before)

    def _flags_of_rank_0(self) -> tuple[float, float, float]:
        """Whether to stop, whether to ask about preemption, and the steps until all ask again."""
        now = time.monotonic()
        num_steps, seconds = self._interval - self._steps_left, now - self._agreed_at
        self._agreed_at = now
        ask_preempted = now >= self._ask_preempted_at
        if ask_preempted:
            self._ask_preempted_at = now + PREEMPTION_SECONDS
        # as many steps as fit in the time, growing with care: the next may be slower than those measured
        interval = max(1, min(8 * num_steps, int(AGREE_SECONDS * num_steps / max(seconds, 1e-6))))
        return float(self._run.stop_is_requested()), float(ask_preempted), float(interval)
