"""What one worker does from start to end: data, model, resume, epochs, records and checkpoints.

The same function runs in this process (`workers.num` 0), in every Ray Train worker and in every trial. It is a
function of the experiment and of the worker's place in its group; it does not know Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

from vae_ray.checkpoints.listing import checkpoint_name
from vae_ray.config.experiment import Experiment
from vae_ray.parallel.group import WorkerGroup, raise_on_all_ranks
from vae_ray.run_files.recorder import NUM_RECONSTRUCTIONS, Recorder
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.run_files.warning_log import warning_log
from vae_ray.storage.retry import describe_os_error
from vae_ray.training.callbacks import Callbacks, decoder_of
from vae_ray.training.cpu_settings import cpu_settings
from vae_ray.training.nonfinite import RollBack
from vae_ray.training.trainer import Trainer

logger = logging.getLogger(__name__)


class EpochResult(NamedTuple):
    """The result of one epoch; the same on every rank."""

    record: dict[str, Any]
    """The epoch's record in `metrics.jsonl`."""
    checkpoint: Path
    """Directory of the epoch's checkpoint, which rank 0 has written and synced."""
    is_last: bool
    """Whether training has ended with it."""


def fit(experiment: Experiment, location: str | Path, group: WorkerGroup) -> None:
    """Train to the end: all of `fit_epochs`."""
    for _ in fit_epochs(experiment, location, group):
        pass


def fit_epochs(
    experiment: Experiment, location: str | Path, group: WorkerGroup, *, keep_warnings: bool = False
) -> Generator[EpochResult, None, None]:
    """Train epoch by epoch, continuing from the run's newest intact checkpoint; yields after each epoch.

    `location` is the run's directory or URI. All ranks iterate with equal arguments. A caller that stops early closes
    the generator: that ends the run's files properly and releases its directory, and a later call continues from
    there. Raises `Stopped` on all ranks, after a checkpoint, once there is a file `.stop` in the run's directory.
    `keep_warnings` writes rank 0's warnings to the run's directory too, for a driver elsewhere.
    """
    run = RunDirectory.at(location, role="writer") if group.rank == 0 else RunDirectory(Path(location))
    with contextlib.ExitStack() as stack:
        stack.enter_context(cpu_settings(num_threads=experiment.workers.num_threads, device=group.device))

        def open_for_writing() -> None:
            if group.rank == 0:
                stack.enter_context(run.open_for_writing())
                if keep_warnings:
                    stack.enter_context(warning_log(run.records.warnings_file))

        raise_on_all_ranks(group, open_for_writing)
        trainer = Trainer(experiment, run, group)
        _record_attempt(trainer)
        recorder, callbacks = None, Callbacks(())
        if group.rank == 0:
            recorder = stack.enter_context(contextlib.closing(_recorder(trainer)))
            trainer.checkpointing.prune()
            callbacks = Callbacks(experiment.run.callbacks)
        callbacks.call("run_began", run.location, experiment)
        while not trainer.is_finished():
            trainer.stop_if_requested()
            try:
                record = trainer.run_epoch(recorder)
            except RollBack:
                trainer.roll_back()
                if recorder is not None:
                    recorder.begin_at(trainer.epochs_done + 1)
                continue
            if recorder is not None:
                model = trainer.state.evaluated_model
                recorder.epoch(record, model)
                metrics = {key: value for key, value in record.items() if key != "epoch"}
                is_last = trainer.is_finished()
                trainer.checkpointing.save_epoch(trainer.state, trainer.epochs_done, metrics, is_last=is_last)
                callbacks.call("epoch_ended", record, decoder_of(model))
                if is_last:  # before the yield: a caller need not ask for more
                    callbacks.call("run_ended", run.location)
            checkpoint = run.checkpoints / checkpoint_name(trainer.epochs_done)
            yield EpochResult(record, checkpoint, trainer.is_finished())


def _recorder(trainer: Trainer) -> Recorder:
    loader = trainer.loader("test")
    indices = loader.spread(NUM_RECONSTRUCTIONS)
    return Recorder(
        trainer.run,
        trainer.experiment,
        first_epoch=trainer.epochs_done + 1,
        test_images=loader.images(indices),
        test_labels=loader.labels(indices),
    )


def _record_attempt(trainer: Trainer) -> None:
    """Append nodes, pids and resume position to attempts.jsonl. Collective."""
    group = trainer.group
    workers = group.all_gather((group.node, os.getpid()))
    if group.rank == 0:
        try:
            trainer.run.records.append_attempt(
                started_at=time.time(),
                num_workers=group.size,
                nodes=[node for node, _ in workers],
                pids=[pid for _, pid in workers],
                epochs_done=trainer.epochs_done,
                steps_done=trainer.steps_done,
                seconds_before=trainer.seconds_before,
            )
        except OSError as error:
            logger.warning("%s: could not be written (%s)", trainer.run.records.attempts_file, describe_os_error(error))
