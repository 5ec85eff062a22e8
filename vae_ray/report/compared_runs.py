"""Reading what is compared: runs, and the best trials of sweeps."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vae_ray.checkpoints.listing import best_checkpoint, checkpoint_name, complete_checkpoints
from vae_ray.checkpoints.loading import Checkpoint
from vae_ray.config.experiment import Experiment
from vae_ray.config.sections.run import NAME_PATTERN
from vae_ray.data.cache import name_of
from vae_ray.errors import UserError
from vae_ray.evaluation.evaluation import Evaluation
from vae_ray.evaluation.store import kept_evaluations
from vae_ray.inference import BINARIZATIONS
from vae_ray.models.likelihoods import LIKELIHOODS
from vae_ray.report.comparison import RECORDED, ComparedRun
from vae_ray.report.pictures import data_uri, limit_of
from vae_ray.run_files.run_directory import SWEEP_FILE, TRIALS, RunDirectory
from vae_ray.storage.locations import absolute


def compared_runs(paths: Sequence[str | Path]) -> list[ComparedRun]:
    """The runs and sweeps at `paths`, directories or URIs, in this order; raises `UserError`, also for one alone."""
    locations = [absolute(path, key="run") for path in paths]
    if len(set(locations)) < len(locations) or len(locations) < 2:
        raise UserError(f"runs: got {', '.join(map(str, paths)) or 'none'}, should be at least two different ones")
    names = distinct_names(locations)
    return [_read(location, name, limit_of(len(paths))) for location, name in zip(locations, names, strict=True)]


def distinct_names(locations: Sequence[str]) -> list[str]:
    """The last parts of paths or URIs, as many as make them distinct."""
    parts = [location.rstrip("/").split("/") for location in locations]
    most = max(map(len, parts))
    for num in range(1, most + 1):
        names = ["/".join(each[-num:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return list(locations)


def _read(location: str, name: str, limit: int) -> ComparedRun:
    directory = RunDirectory.at(location, role="compare")
    with contextlib.ExitStack() as stack:
        stack.enter_context(directory.working_copy())
        run, kept = directory, kept_evaluations(directory.path)
        if (directory.path / SWEEP_FILE).exists():
            run = _best_trial(directory)
            name = f"{name}/{run.path.name}"
            kept += kept_evaluations(run.path)
        elif not run.experiment_file.exists():
            raise UserError(f"run {location}: no such run or sweep, it has no {run.experiment_file.name}")
        checkpoints = complete_checkpoints(run.checkpoints)
        if not checkpoints:
            raise UserError(
                f"run {location}: has no complete checkpoint yet; continue it with: vae-ray resume {location}"
            )
        best = best_checkpoint(checkpoints)
        experiment = best.experiment()
        evaluations = [_of_images(each, experiment, best) for each in [*kept, *_recorded(experiment, best)]]
        picture = run.images / "samples" / f"{checkpoint_name(best.epoch)}.png"
        samples = data_uri(picture.read_bytes(), limit=limit) if picture.exists() else None
        return ComparedRun(name, location, experiment, best.epoch, run.records.history(), evaluations, samples)


def _best_trial(sweep: RunDirectory) -> RunDirectory:
    """The run directory of the sweep's winner, by its summary; raises `UserError`."""
    try:
        best = sweep.records.summary().get("best", {}).get("trial")
    except AttributeError:
        best = None
    if not isinstance(best, str) or not re.fullmatch(NAME_PATTERN, best):
        raise UserError(f"sweep {sweep.location}: has no best trial; finish it, or name one of its {TRIALS}")
    return RunDirectory(sweep.path / TRIALS / best)


def _recorded(experiment: Experiment, best: Checkpoint) -> list[Evaluation]:
    """What training recorded of the best epoch's test and validation splits, as an evaluation of each."""
    found, name = [], experiment.likelihood.name
    support = getattr(LIKELIHOODS.get(name), "support", None)  # unknown of a user's own, whose code is not run here
    for split in ("test", "val"):
        metrics = {
            key: value for key, value in best.metrics.items() if key.startswith(f"{split}/") and key != f"{split}/loss"
        }
        if metrics:
            labels = {
                "data": name_of(experiment.data),
                "split": split,
                "num_images": RECORDED,
                "binarization": BINARIZATIONS[experiment.data.binarize],
                "likelihood": name,
                **({} if support is None else {"support": support}),
                **({} if experiment.model.condition is None else {"condition": experiment.model.condition}),
                "z": "sampled",
                "weights": "averaged" if best.has_averaged_weights else "last",
                "objective": experiment.objective.name,
                "beta": experiment.flat().get("objective.beta"),
                "epoch": best.epoch,
            }
            found.append(Evaluation(metrics, {}, {}, labels, []))
    return found


def _of_images(evaluation: Evaluation, experiment: Experiment, best: Checkpoint) -> Evaluation:
    """The evaluation with a label of the very images, as far as the run recorded them.

    Two data sets of one name may differ; and a validation split is drawn from the training images by a seed.
    """
    split = evaluation.labels.get("split")
    images: Any = best.fingerprints.get("test" if split == "test" else "train", "not recorded")[:12]
    if split == "val":
        images = f"{images}, {experiment.data.num_validation} by seed {experiment.split_seed}"
    labels = {**evaluation.labels, "images": evaluation.labels.get("images", images)}
    return dataclasses.replace(evaluation, labels=labels)
