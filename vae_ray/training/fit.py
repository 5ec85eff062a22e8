"""What one worker does from start to end: data, model, resume, epochs, records and checkpoints.

The same function runs in this process (`workers.num` 0), in every Ray Train worker and in every trial. It is a
function of the experiment and of the worker's place in its group; it does not know Ray.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

from vae_ray.checkpoints.loading import checkpoint_name
from vae_ray.checkpoints.quarantine import quarantine_corrupt_checkpoints
from vae_ray.config.experiment import Experiment
from vae_ray.parallel.group import WorkerGroup, raise_on_all_ranks
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.run_files.warning_log import warning_log
from vae_ray.training.cpu_settings import cpu_settings
from vae_ray.training.nonfinite import RollBack
from vae_ray.training.trainer import Worker


class EpochResult(NamedTuple):
    """What one epoch has come to; the same on every rank."""

    line: dict[str, Any]
    """The epoch's line of `metrics.jsonl`."""
    checkpoint: Path
    """Directory of the epoch's checkpoint, which rank 0 has written and synced."""


def fit(experiment: Experiment, location: str | Path, group: WorkerGroup) -> None:
    """Train to the experiment's last epoch: all of `fit_epochs`."""
    for _ in fit_epochs(experiment, location, group):
        pass


def fit_epochs(
    experiment: Experiment, location: str | Path, group: WorkerGroup, *, keep_warnings: bool = False
) -> Generator[EpochResult, None, None]:
    """Train epoch by epoch, going on from the run's newest complete checkpoint; yields after each epoch.

    `location` is the run's directory or URI. All ranks iterate with equal arguments; rank 0 alone reads and writes the
    run. Whoever stops early closes the generator: that ends the run's files properly and lets go of its directory, and
    a later call goes on from there. Raises `Stopped` on all ranks, after a checkpoint, once there is a file `.stop` in
    the run's directory. `keep_warnings` leaves rank 0's in the run's directory too, for a driver elsewhere.
    """
    run = RunDirectory.at(location, role="writer") if group.rank == 0 else RunDirectory(Path(location))
    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu_settings(num_threads=experiment.workers.cpus))

        def open_for_writing() -> None:
            if group.rank == 0:
                stack.enter_context(run.open_for_writing())
                if keep_warnings:
                    stack.enter_context(warning_log(run.warnings_file))
                quarantine_corrupt_checkpoints(run)

        raise_on_all_ranks(group, open_for_writing)
        worker = Worker(experiment, run, group)
        worker.record_attempt()
        recorder = stack.enter_context(worker.recorder()) if group.rank == 0 else None
        if group.rank == 0:
            worker.prune()
        while worker.epochs_done < experiment.training.epochs:
            worker.stop_if_requested()
            try:
                line = worker.run_epoch(recorder)
            except RollBack:
                worker.roll_back()
                if recorder is not None:
                    recorder.begin_at(worker.epochs_done + 1)
                continue
            if recorder is not None:
                recorder.epoch(line, worker.model)
                worker.save(line)
            yield EpochResult(line, run.checkpoints / checkpoint_name(worker.epochs_done))
