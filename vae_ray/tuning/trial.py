"""One trial, in the process that Tune gives it.

With one worker it is the training loop itself, an epoch a step, and Tune reuses the process for the next trial: no
imports, no worker group, no start-up. With several workers it starts a TorchTrainer. Either way it goes on from its
run directory's newest checkpoint, so a trial can be begun, stopped, killed and taken up again at any epoch.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from vae_ray.checkpoints.loading import all_checkpoints, complete_checkpoints, read_checkpoint
from vae_ray.config.experiment import Experiment
from vae_ray.config.user_code import Files, install
from vae_ray.distributed.launch import fit
from vae_ray.errors import CorruptFile, Diverged, Stopped, one_line
from vae_ray.parallel.group import SingleProcess
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.storage.atomic import atomic_write
from vae_ray.storage.locations import join_location
from vae_ray.storage.reading import parse_json, read_bytes, short_repr
from vae_ray.storage.records import append_records
from vae_ray.training.fit import EpochResult, fit_epochs
from vae_ray.tuning.directory import TRIALS
from vae_ray.tuning.records import FAILURE_FILE, LINEAGE_FILE, trial_experiment

TRIAL = "trial"
"""Key of a trial's name in the configuration that it begins with; all other keys are the Experiment's.

Tune is told to call the trial so (`str(trial)`), and that is where everyone reads it: PBT copies configurations whole.
"""
DONOR = "donor.json"


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
        self._sweep = sweep
        self._base = Experiment.from_dict(experiment)
        self._device = torch.device(device)
        self._epochs: Generator[EpochResult, None, None] | None = None
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial."""
        self._close()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train one epoch; its line of metrics."""
        with recorded_failure(self._run):
            self._epochs = self._epochs or self._open()
            result = next(self._epochs)
            if result.is_last:
                self._close()
            return {**result.record, "done": result.is_last}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Hand over the newest checkpoint with its trial's name; only PBT asks.

        The run directory is let go of, because another process may be the one to go on with a paused trial.
        """
        self._close()
        self._run.pull()
        newest = complete_checkpoints(self._run.checkpoints)[-1]
        self._run.pull(newest.path)
        shutil.copytree(newest.path, Path(checkpoint_dir, newest.path.name))
        Path(checkpoint_dir, DONOR).write_text(json.dumps({"trial": self._name, "checkpoint": newest.path.name}))

    def load_checkpoint(self, checkpoint: str) -> None:
        """Go on from what `save_checkpoint` of this trial, or under PBT of a better one, handed over."""
        donor = parse_json(read_bytes(Path(checkpoint, DONOR)))
        if Path(donor["checkpoint"]).name != donor["checkpoint"]:
            raise CorruptFile(
                f"{Path(checkpoint, DONOR)}: {short_repr(donor['checkpoint'])} would lie outside of the sweep"
            )
        if donor["trial"] != self._name:
            self._adopt(Path(checkpoint, donor["checkpoint"]), donor["trial"])

    def cleanup(self) -> None:
        """Tune ends this process."""
        self._close()

    def _begin(self, config: dict[str, Any]) -> None:
        self._name = self.trial_name
        self._overrides = overrides_of(config)
        self._experiment = trial_experiment(self._base, self._sweep, self._name, self._overrides)
        self._run = run_of(self._sweep, self._name)

    def _open(self) -> Generator[EpochResult, None, None]:
        self._run.path.mkdir(parents=True, exist_ok=True)
        self._run.write_experiment(self._experiment)
        self._run.push(self._run.experiment_file)
        return fit_epochs(self._experiment, self._run.location, SingleProcess(self._device), keep_warnings=True)

    def _close(self) -> None:
        if self._epochs is not None:
            self._epochs.close()  # writes the hyperparameters and lets go of the run directory
            self._epochs = None

    def _adopt(self, source: Path, donor: str) -> None:
        """Replace this trial's state by the donor's; what it did itself stays in its history."""
        self._close()
        self._run.pull()
        adopted_checkpoint = read_checkpoint(source)
        epoch = adopted_checkpoint.epoch
        for own in all_checkpoints(self._run.checkpoints):
            if own.position >= adopted_checkpoint.position:
                shutil.rmtree(own.path)
        adopted = self._run.checkpoints / f".partial-{source.name}"
        shutil.copytree(source, adopted, dirs_exist_ok=True)
        os.replace(adopted, self._run.checkpoints / source.name)
        step = {"epoch": epoch, "weights_of": donor, "overrides": self._overrides}
        append_records(self._run.path / LINEAGE_FILE, [step])
        self._run.push()


def run_of(sweep: str, name: str) -> RunDirectory:
    """The run directory of the trial `name` of the sweep at that location."""
    return RunDirectory.at(join_location(sweep, TRIALS, name), role="trial")


def train_group(
    config: dict[str, Any], *, sweep: str, experiment: dict[str, Any], device: str, user_code: Files
) -> None:
    """A trial of several workers: a TorchTrainer, started from the trial's own process."""
    install(user_code)
    name = tune.get_context().get_trial_name()
    own = trial_experiment(Experiment.from_dict(experiment), sweep, name, overrides_of(config))
    run = run_of(sweep, name)
    run.path.mkdir(parents=True, exist_ok=True)
    with recorded_failure(run):
        run.write_experiment(own)
        run.push(run.experiment_file)
        fit(own, run.location, torch.device(device), callbacks=[TuneReportCallback()])


def overrides_of(config: dict[str, Any]) -> dict[str, Any]:
    """The Experiment's keys of what Tune hands a trial."""
    return {key: value for key, value in config.items() if key != TRIAL}


@contextlib.contextmanager
def recorded_failure(run: RunDirectory) -> Iterator[None]:
    """Leave the reason of an exception in the trial's directory: Tune passes on a traceback, people want a line."""
    file = run.path / FAILURE_FILE
    file.unlink(missing_ok=True)
    try:
        yield
    except Stopped:  # nothing failed: it goes on from its checkpoint
        raise
    except Exception as error:
        state = "diverged" if isinstance(error, Diverged) else "failed"
        atomic_write(file, json.dumps({"state": state, "reason": _reason(error)}).encode())
        run.push(file)
        raise


def _reason(error: Exception) -> str:
    text = one_line(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return f"out of memory: {text}".rstrip(": ")
    return text if isinstance(error, Diverged) else f"{type(error).__name__}: {text}"
