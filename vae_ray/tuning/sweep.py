"""`sweep`: many trials of one Experiment, ranked by their best checkpoints.

The driver's part: check, hold the directory, run the trials, summarize. The journal has what was proposed and how
each trial ended, the run directories what each trial learnt; a resumed sweep reads these alone.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from vae_ray.config.experiment import Experiment, differing_fields
from vae_ray.data.cache import name_of
from vae_ray.data.splits import Splits
from vae_ray.distributed.connection import connect
from vae_ray.errors import UserError
from vae_ray.run_files.progress import StderrConsole
from vae_ray.runs.exclusive import exclusive_run, is_taken, run_location
from vae_ray.runs.preflight import Checked, checked_model, preflight, with_absolute_paths
from vae_ray.storage.locations import absolute
from vae_ray.training.checkpointing import selection_metric
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.evaluations import (
    DEFAULT_NUM_EVALUATED,
    check_ranking,
    evaluate_trials,
    metric_names,
    possible_metrics,
    with_evaluations,
)
from vae_ray.tuning.leaderboard import best_trials
from vae_ray.tuning.metrics import evaluated_by, is_evaluated
from vae_ray.tuning.records import read_trials
from vae_ray.tuning.run_trials import run_trials
from vae_ray.tuning.settings import SweepSettings, settings
from vae_ray.tuning.space import SearchSpace
from vae_ray.tuning.summary import SweepResult, summarize_sweep

logger = logging.getLogger(__name__)

MAX_VALIDATION_IMAGES = 2000
"""All trials are measured on the same ones, so their differences are less noisy than the numbers."""

MOST_COMBINATIONS = 32
"""Of a space's choices, of which a model is built before the first trial; each takes up to a second."""
MODEL_SECTIONS = ("model.", "likelihood.", "objective.", "training.global_batch_size")


def sweep(
    experiment: Experiment,
    *,
    search: str | Mapping[str, Any] | None = None,
    num_trials: int | None = None,
    max_concurrent: int | None = None,
    workers_per_trial: int | None = None,
    scheduler: str | None = None,
    searcher: str = "random",
    metric: str | Sequence[str] = "val/nelbo",
    repeats: int = 1,
    evaluate: str | Sequence[str] | None = None,
    evaluate_best: int = DEFAULT_NUM_EVALUATED,
    resume: bool = False,
    quiet: bool = True,
) -> SweepResult:
    """Try `num_trials` configurations of `experiment` and return the best; `quiet=False` shows progress on stderr.

    `search` is the name of a space that ships with the package, a YAML file, or plain data such as
    `{"optim.lr": {"loguniform": [1e-4, 1e-2]}}`. Trials are compared by `metric` of their best checkpoints:
    `val/nelbo`, or two such as `("val/rate", "val/distortion")` for a Pareto front; never by the loss, which contains
    beta. The best checkpoint of a trial is that of the smallest nelbo on the same split. A value of
    `TrainedVAE.evaluate`, such as `val/mig_locatello`, ranks trials after they have ended, each by that checkpoint.

    With `repeats` each configuration is trained by as many seeds, `run.seed` and those after it, on the same images,
    and ranked by the mean over them; each seed is a trial. With `resume` a sweep of that name continues: what has ended
    is not run again; more `num_trials` or `repeats` extend it.

    `evaluate` names metrics of `TrainedVAE.evaluate`, of which the `evaluate_best` best configurations are evaluated at
    the end, on the split of `metric`; they become columns of the leaderboard, and do not rank.

    A trial that fails is marked with its reason and the others continue; the result counts them. Raises `UserError`,
    before anything starts, for what the user can correct.
    """
    started_at = time.time()
    if resume and experiment.run.name is None:
        raise UserError("run.name: --resume needs the name of a sweep; for example --name my-sweep --resume")
    experiment = _base_experiment(experiment, workers_per_trial)
    checked = settings(
        search=search,
        metric=metric,
        num_trials=num_trials,
        scheduler=scheduler,
        searcher=searcher,
        workers_per_trial=experiment.workers.max,
        repeats=repeats,
    )
    if max_concurrent is not None and max_concurrent < 1:
        raise UserError(f"max_concurrent: got {max_concurrent}, should be at least 1; for example --max-concurrent 2")
    if max_concurrent is not None and checked.scheduler == "pbt":
        raise UserError("max_concurrent: not supported with pbt: the whole population runs concurrently; leave it out")
    if evaluate_best < 1:
        raise UserError(f"evaluate_best: got {evaluate_best}, should be at least 1; for example --evaluate-best 5")
    if evaluate is not None:
        metric_names(evaluate)
    had_validation = experiment.data.num_validation > 0
    checked, experiment, found = preflighted(checked, experiment)
    num_validation = experiment.data.num_validation
    split = checked.metrics[0].partition("/")[0]
    ranking = [metric for metric in checked.metrics if is_evaluated(metric)]
    for each in ranking:
        check_ranking(each, experiment, found.splits)
    to_evaluate = [] if evaluate is None else possible_metrics(evaluate, experiment, found.splits, split)
    description = {"experiment": experiment.to_dict(), "fingerprints": found.splits.fingerprints, **checked.to_dict()}
    with open_sweep(experiment, description, resume=resume) as directory:
        for line in found.warnings:
            logger.warning("%s", line)
        if num_validation and not had_validation:
            logger.warning("data.num_validation: %d training images are set aside to compare trials by", num_validation)
        with connect(experiment, dashboard=experiment.workers.max > 1) as (experiment, device):
            directory.write_description(description)
            run_trials(directory, experiment, checked, device=device, max_concurrent=max_concurrent, quiet=quiet)
        result = summarize_sweep(directory, started_at=started_at, trust_code=True)
        how: dict[str, Any] = {
            "split": split,
            "device": device if torch.cuda.is_available() else torch.device("cpu"),
            "trust_code": True,
            "say": StderrConsole(quiet=quiet).print,
        }
        ended = [record for record in read_trials(directory) if record.has_ended]
        is_new = evaluate_trials(directory, ended, [name for name in map(evaluated_by, ranking) if name], **how)
        records = with_evaluations(directory, read_trials(directory))
        best = best_trials(records, checked.metrics, checked.repeats, evaluate_best)
        is_new |= evaluate_trials(directory, best, to_evaluate, **how)
        return summarize_sweep(directory, started_at=started_at, trust_code=True) if is_new else result


def _base_experiment(experiment: Experiment, workers_per_trial: int | None) -> Experiment:
    """The experiment that trials vary: named, with absolute paths and at least one worker."""
    given = 1 if experiment.workers.num == "auto" else experiment.workers.max
    workers = given if workers_per_trial is None else workers_per_trial
    if workers < 0:
        raise UserError(f"workers_per_trial: got {workers}, should be at least 1; for example --workers-per-trial 1")
    name = experiment.run.name or f"sweep-{name_of(experiment.data)}-{datetime.now():%Y%m%d-%H%M%S-%f}"[:-3]
    cpus = 1 if experiment.workers.cpus == "auto" else experiment.workers.cpus  # one core a trial
    overrides = {"workers.num": max(1, workers), "workers.cpus": cpus, "run.name": name}
    return with_absolute_paths(experiment.with_overrides(overrides))


def preflighted(checked: SweepSettings, experiment: Experiment) -> tuple[SweepSettings, Experiment, Checked]:
    """Check all that can be known before a trial starts; the settings and the experiment as they will be used.

    The third value is what was found of the experiment alone, without the space's values.

    Where trials are compared on a validation split and there is none, a tenth of the training images (1 to
    2,000) becomes one. Raises `UserError` for a key or a value of the space that is no valid Experiment.
    """
    splits = Splits.open(experiment)
    if any(metric.startswith("val/") for metric in checked.metrics) and not splits.num_validation:
        num_images = len(splits.train)
        if num_images < 2:
            raise UserError(
                f"metric: got {checked.metrics[0]!r}, but {experiment.data.source} has one training image, none to set "
                "aside; use --metric train/nelbo"
            )
        num_validation = max(1, min(MAX_VALIDATION_IMAGES, num_images // 10))
        experiment = experiment.with_overrides({"data.num_validation": num_validation})
    elif splits.num_validation:
        experiment = experiment.with_overrides({"data.num_validation": splits.num_validation})
    experiment.with_overrides({"run.seed": experiment.run.seed + checked.repeats - 1})  # the last seed is one
    split = selection_metric(experiment).partition("/")[0]
    for metric in checked.metrics:
        if not metric.startswith(f"{split}/"):
            raise UserError(
                f"metric: got {metric!r}, but the checkpoints of each trial are selected on the validation split; "
                f"use --metric {split}/{metric.partition('/')[2]}, or --data.num-validation 0"
            )
    space = checked.space.checked(experiment)
    found = preflight(experiment)
    experiment = found.requested
    for key, domain in space.domains.items():
        # what the Experiment does not know by itself: how many images there are, what a user's own code takes
        is_open = bool(experiment.user_code()) or key.startswith(
            ("data.", "training.global_batch_size", "model.num_classes")
        )
        for value in domain.boundary_values() if is_open else ():
            try:
                preflight(experiment.with_overrides({key: value}))
            except UserError as error:
                raise UserError(f"search: {error}; name other keys with --search") from None
    _check_combinations(space, experiment, found.splits)
    return replace(checked, space=space), experiment, found


def _check_combinations(space: SearchSpace, experiment: Experiment, splits: Splits) -> None:
    """Raise `UserError` if values of the space do not go together: settings of another entry, or no possible model."""
    possible = set[str]()
    for overrides in space.combinations(MOST_COMBINATIONS):
        try:
            trial = experiment.with_overrides(overrides)
            parts = repr((trial.model, trial.likelihood, trial.objective, trial.training.global_batch_size))
            if parts not in possible:
                checked_model(trial, splits.train.image_shape, num_training=len(splits.train_indices))
            possible.add(parts)
        except UserError as error:
            values = ", ".join(f"{key} {value}" for key, value in overrides.items() if key.startswith(MODEL_SECTIONS))
            raise UserError(f"search: {values}: {error}; or leave one of these values out of --search") from None


@contextlib.contextmanager
def open_sweep(experiment: Experiment, description: dict[str, Any], *, resume: bool) -> Iterator[SweepDirectory]:
    """The sweep's directory, locked for this process; refused if it is something else's."""
    name, storage = str(experiment.run.name), absolute(experiment.run.storage, key="run.storage")
    directory = SweepDirectory.at(run_location(experiment), role="driver")

    def refuse_other_uses() -> None:
        if not directory.description_file.exists():
            if is_taken(directory.path):
                raise UserError(
                    f"run.name: {name!r} is already used in {storage} by something else; choose another --name"
                )
            return
        difference = _difference(directory.description(), description)
        what = f"a different sweep ({'; '.join(difference)})" if difference else "this sweep"
        if not resume:
            raise UserError(
                f"run.name: {name!r} is already used in {storage} by {what}; add --resume to "
                "continue it, or choose another --name"
            )
        if difference:
            raise UserError(
                f"sweep {name!r}: cannot be resumed as {what}; the same settings continue it, and a larger "
                "--num-trials or --repeats extends it"
            )

    with exclusive_run(directory, name=name, before=refuse_other_uses):
        yield directory


def _difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Readable differences of two descriptions; a larger num_trials or repeats is allowed and extends the sweep."""
    experiments = [Experiment.from_dict(content["experiment"]) for content in (old, new)]
    old, new = ({"repeats": 1, **content} for content in (old, new))
    extending = {"repeats", *(() if new["searcher"] == "grid" else ("num_trials",))}
    settings = [
        f"{key}: {old[key]!r} -> {new[key]!r}"
        for key in ("search", "metrics", "scheduler", "searcher", "num_trials", "repeats")
        if old[key] != new[key] and not (key in extending and new[key] > old[key])
    ]
    known = old.get("fingerprints", {})
    images = [f"other {split} images" for split in known if known[split] != new["fingerprints"][split]]
    return [*differing_fields(*experiments, content_only=True), *settings, *images]


def rebuild_report(path: str | Path, *, trust_code: bool = False) -> SweepResult:
    """Write the leaderboard, the report and `best/` of a sweep's directory again, from its trials' files."""
    directory = SweepDirectory.at(absolute(path, key="sweep"), role="driver")
    with directory.working_copy():
        directory.description()  # raises UserError if this is no sweep
        return summarize_sweep(directory, started_at=time.time(), trust_code=trust_code)
