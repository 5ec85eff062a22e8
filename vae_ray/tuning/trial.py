"""One trial, in the process that Tune gives it.

With one worker it is the training loop itself, an epoch a step, and Tune reuses the process for the next trial: no
imports, no worker group, no start-up. With several workers it starts a TorchTrainer. Both continue from the newest
checkpoint of the run directory, so a trial can be stopped, killed and resumed at any epoch.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from vae_ray.checkpoints.listing import all_checkpoints, checkpoint_directories, complete_checkpoints
from vae_ray.checkpoints.loading import Checkpoint, read_checkpoint
from vae_ray.checkpoints.saving import copy_checkpoint
from vae_ray.config.experiment import Experiment
from vae_ray.config.user_code import Files, install
from vae_ray.distributed.launch import fit
from vae_ray.errors import CorruptFile, Diverged, Stopped, one_line
from vae_ray.parallel.group import SingleProcess
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.runs.exclusive import run_location
from vae_ray.storage.atomic import atomic_remove_directory, atomic_write
from vae_ray.storage.records import append_records
from vae_ray.training.fit import EpochResult, fit_epochs
from vae_ray.tuning.records import FAILURE_FILE, LINEAGE_FILE, read_lineage, trial_experiment

TRIAL = "trial"
"""Key of a trial's name in the configuration that it begins with; all other keys are the Experiment's.

Tune calls the trial so (`str(trial)`), and that is where its name is read: PBT copies configurations whole.
"""


class TrialLoop(tune.Trainable):  # type: ignore[misc]
    """A trial of one worker. A step is an epoch; between steps nothing runs, so stopping it needs no care."""

    def setup(
        self,
        config: dict[str, Any],
        sweep: str = "",
        experiment: dict[str, Any] | None = None,
        device: str = "cpu",
        user_code: Files | None = None,
    ) -> None:
        """Tune's entry; the arguments after `config` come from `tune.with_parameters`."""
        install(user_code or {})
        self._sweep, self._base, self._device = sweep, Experiment.from_dict(experiment), torch.device(device)
        self._epochs: Generator[EpochResult, None, None] | None = None
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial."""
        self.cleanup()
        self._overrides = overrides_of(new_config)
        self._experiment = trial_experiment(self._base, self._sweep, self.trial_name, self._overrides)
        self._run = RunDirectory.at(run_location(self._experiment), role="trial")
        return True

    def step(self) -> dict[str, Any]:
        """Train one epoch; its record of metrics."""
        with recorded_failure(self._run):
            if self._epochs is None:
                start_files(self._run, self._experiment)
                record_lineage(self._run, self.trial_name, self._overrides)
                group = SingleProcess(self._device)
                self._epochs = fit_epochs(self._experiment, self._run.location, group, keep_warnings=True)
            result = next(self._epochs)
            if result.is_last:
                self.cleanup()
            return {**result.record, "done": result.is_last}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Copy the newest checkpoint for another trial; only PBT asks.

        Releases the run directory, because another process may continue a paused trial.
        """
        self.cleanup()
        self._run.pull()
        newest = complete_checkpoints(self._run.checkpoints)[-1]
        self._run.pull(newest.path)
        shutil.copytree(newest.path, Path(checkpoint_dir, newest.path.name))

    def load_checkpoint(self, checkpoint: str) -> None:
        """Continue from what `save_checkpoint` of this trial, or under PBT of a better one, has copied."""
        with recorded_failure(self._run):
            source = read_checkpoint(checkpoint_directories(Path(checkpoint))[-1])
            if source.experiment().run.name != self.trial_name:
                self.cleanup()
                self._run.pull()
                adopt(self._run, source, self.trial_name, self._overrides)
                self._run.push()

    def cleanup(self) -> None:
        """Release the run directory; Tune also calls it at the end of this process."""
        if self._epochs is not None:
            self._epochs.close()  # writes the hyperparameters
            self._epochs = None


def adopt(run: RunDirectory, source: Checkpoint, name: str, overrides: dict[str, Any]) -> None:
    """Replace the newest state of the trial `name` by `source`, another trial's checkpoint; its own records stay.

    A kill before the copy has its name leaves the trial as it was; after it the trial continues from the copy, with
    `TrialRecord.current`. Raises `CorruptFile` for a damaged `source`, and changes nothing then.
    """
    copy_checkpoint(source, run.checkpoints / source.path.name)
    for own in reversed(all_checkpoints(run.checkpoints)):
        if own.position > source.position:
            atomic_remove_directory(own.path)
    record_lineage(run, name, overrides)


def record_lineage(run: RunDirectory, name: str, overrides: dict[str, Any]) -> None:
    """Record that the trial `name` continues from another trial's checkpoint, if it does and no record says so yet."""
    for newest in all_checkpoints(run.checkpoints)[-1:]:
        with contextlib.suppress(CorruptFile):  # training will continue from an older one
            owner = newest.experiment().run.name
            entry = {"epoch": newest.epoch, "weights_of": owner, "overrides": overrides}
            if owner != name and entry not in read_lineage(run):
                append_records(run.path / LINEAGE_FILE, [entry])


def start_files(run: RunDirectory, experiment: Experiment) -> None:
    """Create a trial's directory with its experiment."""
    run.path.mkdir(parents=True, exist_ok=True)
    run.write_experiment(experiment)
    run.push(run.experiment_file)


def train_group(
    config: dict[str, Any], *, sweep: str, experiment: dict[str, Any], device: str, user_code: Files
) -> None:
    """A trial of several workers: a TorchTrainer, started from the trial's own process."""
    install(user_code)
    name = tune.get_context().get_trial_name()
    own = trial_experiment(Experiment.from_dict(experiment), sweep, name, overrides_of(config))
    run = RunDirectory.at(run_location(own), role="trial")
    with recorded_failure(run):
        start_files(run, own)
        fit(own, run.location, torch.device(device), callbacks=[TuneReportCallback()])


def overrides_of(config: dict[str, Any]) -> dict[str, Any]:
    """The Experiment's keys of a Tune configuration."""
    return {key: value for key, value in config.items() if key != TRIAL}


@contextlib.contextmanager
def recorded_failure(run: RunDirectory) -> Iterator[None]:
    """Write the reason of an exception to the trial's directory, in one line: Tune passes on a traceback."""
    file = run.path / FAILURE_FILE
    file.unlink(missing_ok=True)
    try:
        yield
    except Stopped:  # nothing failed: it continues from its checkpoint
        raise
    except Exception as error:
        state = "diverged" if isinstance(error, Diverged) else "failed"
        run.path.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps({"state": state, "reason": _reason(error)}).encode())
        run.push(file)
        raise


def _reason(error: Exception) -> str:
    text = one_line(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return f"out of memory: {text}".rstrip(": ")
    return text if isinstance(error, Diverged) else f"{type(error).__name__}: {text}"
