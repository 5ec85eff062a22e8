"""Making the runs of a stage, and reading what its targets ask for from their files.

A run is an ordinary run directory and an evaluation is kept beside it, so that nothing is done twice: what the files
say is read, and only what is missing is trained or evaluated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from vae_ray.config.experiment import Experiment
from vae_ray.data.splits import Splits
from vae_ray.errors import TrainingFailed, UserError
from vae_ray.evaluation.evaluation import Evaluation as KeptEvaluation
from vae_ray.evaluation.observations import Progress, Run, no_progress, observe_here
from vae_ray.evaluation.store import keep, kept_evaluations
from vae_ray.inference import TrainedVAE
from vae_ray.reproduction.registry import Entry, Evaluation, Stage, Target
from vae_ray.run_files.progress import preparation_view
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.runs.exclusive import content_differences, run_location
from vae_ray.runs.preflight import preflight, with_absolute_paths
from vae_ray.runs.train import train

Floats = NDArray[np.float64]


class Value(NamedTuple):
    """What one run says about a metric."""

    value: float
    standard_error: float | None
    """Over images, where the value is a mean over them."""
    by_image: Floats | None
    """`(N,)`, in the order of the split, where they are kept."""


class Measured(NamedTuple):
    """The files of one finished and evaluated run."""

    values: dict[str, Value]
    """By metric, of the kept evaluations."""
    labels: dict[str, dict[str, Any]]
    """Of these evaluations by their split."""
    warnings: list[str]
    """Of these evaluations."""
    history: dict[int, dict[str, Any]]
    """The records of training by epoch."""

    def value(self, target: Target) -> Value:
        """What the target asks for, whichever run it names."""
        if target.epoch is None:
            return self.values[target.metric]
        return Value(float(self.history[target.epoch][target.metric]), None, None)

    def training_seconds(self, epochs: int) -> float:
        """Of the first so many epochs."""
        return sum(float(record["seconds"]) for epoch, record in self.history.items() if epoch <= epochs)


def check(entry: Entry, stages: Sequence[Stage], seeds: Sequence[int], place: Mapping[str, Any]) -> None:
    """Raise `UserError` for all that can be known to fail before anything starts: data, storage, workers, stages."""
    for stage in stages:
        for run in entry.runs:
            with preparation_view(quiet=False) as progress:
                checked = preflight(placed(entry.experiment(stage, run, seeds[0]), place), progress=progress)
            for evaluation in stage.evaluations:
                num = len(checked.splits.select(evaluation.split)[1])
                if evaluation.num_images is not None and evaluation.num_images > num:
                    raise UserError(
                        f"data.source: has {num} {evaluation.split} images, {entry.name} evaluates "
                        f"{evaluation.num_images}; use the images that its protocol names"
                    )
            for seed in seeds:
                _check_continues(placed(entry.experiment(stage, run, seed), place), stage)


def placed(experiment: Experiment, place: Mapping[str, Any]) -> Experiment:
    """The experiment where the command wants it."""
    return with_absolute_paths(experiment.with_overrides(place))


def measure(
    experiment: Experiment, stage: Stage, *, progress: Progress = no_progress, run: Run = observe_here
) -> Measured:
    """Train and evaluate what of a (placed) experiment of a stage is missing, and read its files.

    Raises `UserError`, `TrainingFailed` and `Stopped` as `train` does; the same call continues.
    """
    with contextlib.suppress(_Missing):
        return _read(experiment, stage)
    _check_continues(experiment, stage)
    result = train(experiment, resume=True, quiet=False)
    data = {key: value for key, value in experiment.flat().items() if key in ("data.root", "data.cache_dir")}
    device = result.device if torch.cuda.is_available() else "cpu"
    # what it computes is the entry's, which `train` has compared; a user's callbacks are not called
    model = TrainedVAE.load(result.last_checkpoint, data=data, device=device, trust_code=True)
    for evaluation in _missing_evaluations(experiment, stage):
        found = model.evaluate(
            evaluation.split,
            evaluation.metrics,
            num_samples=evaluation.num_samples,
            num_images=evaluation.num_images,
            progress=progress,
            run=run,
        )
        try:
            keep(found, model.checkpoint, str(result.run_dir))
        except OSError as error:
            raise TrainingFailed(
                f"{result.run_dir}: the evaluation could not be written there ({error.strerror}); make room, and "
                "repeat the command: it trains nothing again"
            ) from None
    return _read(experiment, stage)


def is_finished(experiment: Experiment, stage: Stage) -> bool:
    """Whether the files of a (placed) experiment's run have all that the stage asks for."""
    try:
        _read(experiment, stage)
    except _Missing:
        return False
    return True


class _Missing(Exception):
    """The files of a run do not have what a stage asks for."""


def _check_continues(experiment: Experiment, stage: Stage) -> None:
    """Raise `UserError` if the run's directory is of something else, or already beyond the stage without its result."""
    with _run_directory(experiment) as run:
        if run is None:
            return
        stored, wanted = run.experiment(), experiment.training.epochs
        if difference := _differences(experiment, stored):
            raise UserError(
                f"run.storage: {run.location} is a run of another experiment ({'; '.join(difference)}); choose another "
                "--storage"
            )
        if stored.training.epochs > wanted and not is_finished(experiment, stage):
            raise UserError(
                f"--stages: {run.location} already has {stored.training.epochs} epochs, and no evaluation after "
                f"{wanted} was kept; choose a later stage, or another --storage"
            )


def _differences(one: Experiment, other: Experiment) -> list[str]:
    """In what they differ besides their place, if the one of more epochs extends the other."""
    return content_differences(*sorted((one, other), key=lambda each: each.training.epochs))


def _missing_evaluations(experiment: Experiment, stage: Stage) -> list[Evaluation]:
    with _run_directory(experiment) as run:
        assert run is not None
        return [each for each in stage.evaluations if _kept(run, each, experiment, stage) is None]


def _read(experiment: Experiment, stage: Stage) -> Measured:
    """What the run's files say; raises `_Missing`."""
    with _run_directory(experiment) as run:
        if run is None or _differences(experiment, run.experiment()):
            raise _Missing
        history = {record["epoch"]: record for record in run.records.history()}
        if experiment.training.epochs not in history:
            raise _Missing
        measured = Measured({}, {}, [], history)
        for evaluation in stage.evaluations:
            kept = _kept(run, evaluation, experiment, stage)
            if kept is None:
                raise _Missing
            measured.labels[evaluation.split] = kept.labels
            measured.warnings.extend(kept.warnings)
            for metric, value in kept.items():
                measured.values[metric] = Value(value, kept.standard_errors.get(metric), kept.by_image(metric))
        return measured


def _kept(run: RunDirectory, evaluation: Evaluation, experiment: Experiment, stage: Stage) -> KeptEvaluation | None:
    """The kept evaluation that is this one; None if there is none."""
    num_images = evaluation.num_images or _num_images(experiment, evaluation.split)
    wanted = {"split": evaluation.split, "epoch": experiment.training.epochs, "num_images": num_images}
    metrics = {each.metric for each in stage.targets if each.epoch is None}
    metrics = {metric for metric in metrics if metric.startswith(f"{evaluation.split}/")}
    for kept in kept_evaluations(run.path):
        num_samples = kept.labels.get("num_samples", evaluation.num_samples)  # not every metric takes samples
        is_it = wanted.items() <= kept.labels.items() and num_samples == evaluation.num_samples
        if is_it and metrics <= kept.keys() and "prior" not in kept.labels:
            return kept
    return None


def _num_images(experiment: Experiment, split: str) -> int:
    return len(Splits.open(experiment).select(split)[1])


@contextlib.contextmanager
def _run_directory(experiment: Experiment) -> Iterator[RunDirectory | None]:
    """The experiment's run, with its small files at hand; None if it has not begun."""
    run = RunDirectory.at(run_location(experiment), role="reproduce")
    with run.working_copy():
        yield run if run.experiment_file.is_file() else None
