"""Training in processes that end with a real SIGKILL at a chosen step, forked from one that has torch imported.

Import is what a process that trains a tiny experiment spends its time on; the fork server does it once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from typing import Any

import torch

from vae_ray import Experiment, train
from vae_ray.training import loop

# What costs a second when it is first done in a process: here, it is done once, in the fork server.
torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], fused=True)
torch.set_num_threads(1)

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.faults.killed_training", "tensorboardX", "sklearn.datasets", "PIL.ImageFont"])

TIMEOUT_SECONDS = 60


def exit_code_of_training(experiment: Experiment, *, kill_at_update: int | None = None, before: bool = True) -> int:
    """Train (with resume) in a process of its own, which may kill itself before or after its n-th update."""
    process = SERVER.Process(target=_train, args=(experiment.to_dict(), kill_at_update, before))
    process.start()
    process.join(TIMEOUT_SECONDS)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"training did not end in {TIMEOUT_SECONDS} s")
    return process.exitcode


def _train(sections: dict[str, Any], kill_at_update: int | None, before: bool) -> None:
    update, num_updates = loop.apply_gradient, 0

    def update_or_die(*args: Any, **kwargs: Any) -> bool:
        nonlocal num_updates
        num_updates += 1
        if num_updates == kill_at_update and before:
            os.kill(os.getpid(), signal.SIGKILL)
        was_finite = update(*args, **kwargs)
        if num_updates == kill_at_update:
            os.kill(os.getpid(), signal.SIGKILL)
        return was_finite

    loop.apply_gradient = update_or_die
    train(Experiment.from_dict(sections), resume=True)
