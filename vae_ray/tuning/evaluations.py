"""Evaluations of a sweep's trials, kept beside each: of those that a metric of evaluations ranks, and of the best ones.

The latter (`--evaluate`) are columns of the leaderboard only.

The journal says which metrics of which checkpoint are in which file of `RUN/evaluations`: none is computed again.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vae_ray.config.experiment import Experiment
from vae_ray.data.batches import Shards
from vae_ray.data.splits import Splits
from vae_ray.errors import CorruptFile, UserError, one_line
from vae_ray.evaluation.classifier import LABEL
from vae_ray.evaluation.disentanglement import factor_levels
from vae_ray.evaluation.evaluation import Evaluation, possible
from vae_ray.evaluation.features import FeatureSpace
from vae_ray.evaluation.observations import observe
from vae_ray.evaluation.store import FOLDER, keep, kept_evaluation
from vae_ray.evaluation.table import ALL, Setting, chosen
from vae_ray.inference import TrainedVAE
from vae_ray.models.vae import build_vae
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.metrics import evaluated_by
from vae_ray.tuning.records import TrialRecord, read_journal

logger = logging.getLogger(__name__)

DEFAULT_NUM_EVALUATED = 5
Journal = Sequence[dict[str, Any]]


def metric_names(names: str | Sequence[str]) -> list[str]:
    """The metrics of a comma-separated text or a list, in the table's order; raises `UserError` for an unknown one."""
    try:
        return chosen(names)
    except UserError as error:
        raise UserError(str(error).replace("metrics:", "evaluate:", 1)) from None


def possible_metrics(names: str | Sequence[str], experiment: Experiment, splits: Splits, split: str) -> list[str]:
    """Those that a model of the experiment has on one of its images; of "all" those that it has.

    Raises `UserError` for a metric that this model or its images do not have.
    """
    model, cpu = build_vae(experiment, splits.train.image_shape, seed=0), torch.device("cpu")
    loader = splits.loader(split, experiment, Shards(0, 1, cpu))
    setting = Setting(
        model, num_samples=1, seed=0, features=functools.partial(_pixels_of_labelled, splits), split=split
    )
    observe_one = functools.partial(observe, model, loader, slice(0, 1))
    try:
        return possible(metric_names(names), setting, observe_one, required=names not in (ALL, [ALL]))[0]
    except UserError as error:
        raise UserError(str(error).replace("metrics:", "evaluate:", 1)) from None


def check_ranking(metric: str, experiment: Experiment, splits: Splits) -> None:
    """Raise `UserError` if images or model do not allow a metric of evaluations that is to rank trials."""
    split, _, term = metric.partition("/")
    name = evaluated_by(metric)
    assert name is not None
    try:
        possible_metrics([name], experiment, splits, split)
        if name == "disentanglement":
            factor_levels(torch.stack([*_whole_labels(splits, split).values()], dim=1))
        if name == "representation":
            _check_label(term.partition("[")[2].removesuffix("]"), experiment, splits, split)
    except UserError as error:
        reason = str(error).removeprefix("evaluate: ")
        raise UserError(f"metric: got {metric!r}, but {reason}") from None


def _check_label(label: str, experiment: Experiment, splits: Splits, split: str) -> None:
    """Raise `UserError` if a classifier cannot be fitted to a label and tested by it."""
    train, other = (_whole_labels(splits, name) for name in ("train", split))
    known = [name for name in train if name in other and name != experiment.model.condition]
    if label not in known:
        raise UserError(f"these images have no such label; use one of {', '.join(known)}")
    num_classes, num_labels = len(train[label][train[label] >= 0].unique()), int((other[label] >= 0).sum())
    if num_classes < 2 or not num_labels:
        raise UserError(
            f"{label!r} has {num_classes} classes in the training images and {num_labels} labels in the others, a "
            "classifier needs at least 2 and 1; use another label"
        )


def _whole_labels(splits: Splits, name: str) -> dict[str, torch.Tensor]:
    """Labels and factors of a split that are whole numbers, `(N,)` by name."""
    split, indices = splits.select(name)
    return {key: values[indices] for key, values in split.columns.items() if not values.is_floating_point()}


def _pixels_of_labelled(splits: Splits) -> FeatureSpace:
    """A feature space in the place of the classifier's, whose training takes long; raises what that would raise."""
    for name in ("train", "test"):
        split, indices = splits.select(name)
        labels = split.columns.get(LABEL, torch.full((len(split),), -1))[indices]
        if len(labels[labels >= 0].unique()) < 2:
            raise UserError(
                f"evaluate: fid, kid and precision-recall need a classifier, but the {name} images have no labels of "
                "two classes or more; leave them out"
            )
    return FeatureSpace("pixels", "pixels", lambda images: images.flatten(1), torch.device("cpu"))


def evaluate_trials(
    directory: SweepDirectory,
    records: Sequence[TrialRecord],
    names: Sequence[str],
    *,
    split: str,
    device: torch.device,
    trust_code: bool,
    say: Callable[[str], None],
) -> bool:
    """Evaluate the best checkpoint of each trial, unless it was; whether there is a new evaluation.

    One that fails is a warning, and the others continue.
    """
    is_new, journal = False, read_journal(directory)
    for number, record in enumerate(records, 1):
        known = {name for metrics, _ in _kept(journal, record) for name in metrics}
        missing = [name for name in names if name not in known]
        if record.best is None or not missing:
            continue
        say(f"trial {record.name}  evaluating {', '.join(missing)} ({number} of {len(records)})")
        try:
            directory.pull(record.best.path)
            model = TrainedVAE.load(record.best.path, device=device, trust_code=trust_code)
            found = model.evaluate(split, missing)  # type: ignore[arg-type]
            file = Path(keep(found, model.checkpoint, str(record.run.path)))
            directory.push(*file.parent.glob(f"{file.stem}.*"))
        except (UserError, CorruptFile, OSError) as error:
            logger.warning("trial %s: not evaluated (%s)", record.name, one_line(error))
            continue
        for line in found.warnings:
            logger.warning("trial %s: %s", record.name, line)
        entry = {"epoch": record.best.epoch, "metrics": missing, "file": file.name}
        directory.append_to_journal({"trial": record.name, "event": "evaluated", **entry})
        is_new = True
    return is_new


def with_evaluations(directory: SweepDirectory, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The records with the finite numbers that evaluations of the trials' best checkpoints have found."""
    journal = read_journal(directory)
    return [replace(record, evaluated=_found(journal, record)) for record in records]


def _found(journal: Journal, record: TrialRecord) -> dict[str, float]:
    found = [item for _, evaluation in _kept(journal, record) for item in evaluation.items()]
    return {key: value for key, value in found if math.isfinite(value)}


def _kept(journal: Journal, record: TrialRecord) -> list[tuple[list[str], Evaluation]]:
    """The intact evaluations of a trial's best checkpoint, oldest first, and which metrics each is of."""
    entries = [
        entry
        for entry in journal
        if entry["event"] == "evaluated" and entry["trial"] == record.name
        if record.best is not None and entry["epoch"] == record.best.epoch
    ]
    files = [(entry["metrics"], record.run.path / FOLDER / entry["file"]) for entry in entries]
    found = [(metrics, kept_evaluation(file)) for metrics, file in files if file.exists()]
    return [(metrics, evaluation) for metrics, evaluation in found if evaluation is not None]
