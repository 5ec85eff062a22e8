"""Trials for tests: of a small sweep that is trained in this process, and records that no file is behind."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from tests.conftest import digits_in_this_process
from vae_ray import Experiment
from vae_ray.checkpoints.listing import all_checkpoints
from vae_ray.checkpoints.loading import Checkpoint
from vae_ray.errors import Diverged
from vae_ray.parallel.group import SingleProcess
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.training.fit import fit_epochs
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.records import TrialRecord, trial_experiment
from vae_ray.tuning.settings import SweepSettings, settings
from vae_ray.tuning.trial import recorded_failure


def settings_of(**arguments: Any) -> SweepSettings:
    """The settings of a sweep's arguments, with its defaults."""
    defaults = {"search": None, "metric": "val/nelbo", "num_trials": None, "scheduler": None, "searcher": "random"}
    return settings(**{**defaults, "workers_per_trial": 1, **arguments})


def record_of(
    name: str,
    metrics: dict[str, float] | None = None,
    *,
    state: str = "finished",
    proposed: dict[str, Any] | None = None,
    epoch: int = 3,
    history: list[dict[str, Any]] | None = None,
) -> TrialRecord:
    """A record as it would be read; without metrics it has no checkpoint."""
    checkpoint = Checkpoint(
        path=Path(name, "checkpoints", f"epoch={epoch:04d}"),
        epoch=epoch,
        step=None,
        image_shape=(1, 8, 8),
        metrics={"val/nelbo": 0.0, **(metrics or {})},
        selection_metric="val/nelbo",
        files={},
        scalars={},
        fingerprints={},
        format_version=3,
        contents={"experiment.json": b"{}"},
    )
    checkpoints = [] if metrics is None else [checkpoint]
    return TrialRecord(name, proposed or {}, state, "", RunDirectory(Path(name)), checkpoints, history or [])


def small_sweep(path: Path) -> SweepDirectory:
    """The directory of a sweep of two epochs of the digits, before its first trial."""
    small = {"model.network.hidden": "16", "model.latent_dim": 3, "training.epochs": 2, "run.checkpoints_kept": 2}
    place = {"workers.num": 1, "run.name": path.name}
    base = digits_in_this_process(path.parent).with_overrides({**small, **place})
    path.mkdir()
    directory = SweepDirectory(path)
    search = {"objective.beta": {"loguniform": [0.01, 4.0]}}
    arguments = settings_of(search=search, num_trials=8, scheduler="none")
    directory.write_description({"experiment": base.to_dict(), **arguments.to_dict()})
    return directory


def propose(directory: SweepDirectory, name: str, **overrides: Any) -> None:
    directory.append_to_journal({"trial": name, "event": "proposed", "overrides": overrides})


def end(directory: SweepDirectory, name: str, state: str, reason: str = "", *, epoch: int = 2) -> None:
    entry = {"trial": name, "event": "ended", "epoch": epoch, "state": state, "reason": reason}
    directory.append_to_journal(entry)


def train_trial(directory: SweepDirectory, name: str, *, epochs: int, **overrides: Any) -> None:
    """Train a trial up to that epoch, or until it diverges, as its own process does."""
    run = directory.trial(name)
    base = Experiment.from_dict(directory.description()["experiment"])
    experiment = trial_experiment(base, directory.location, name, overrides)
    run.path.mkdir(parents=True, exist_ok=True)
    with (
        contextlib.suppress(Diverged),
        recorded_failure(run),
        contextlib.closing(fit_epochs(experiment, run.path, SingleProcess(torch.device("cpu")))) as training,
    ):
        for _ in range(epochs - max((checkpoint.epoch for checkpoint in all_checkpoints(run.checkpoints)), default=0)):
            next(training)
