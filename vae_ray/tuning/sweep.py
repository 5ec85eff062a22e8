"""`sweep`: many trials of one Experiment, the best of each kept, ranked and shown.

The driver's part. What was proposed and how each trial ended stands in our journal, what it learnt in its run
directory; Tune is started anew for whatever is still to be done, so that a restored sweep differs in nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import ray
import torch
from ray import tune
from ray.tune.search import BasicVariantGenerator

from vae_ray import distributed
from vae_ray.config import Experiment, differing_fields
from vae_ray.data.arrow_store import open_split
from vae_ray.errors import TrainingFailed, UserError
from vae_ray.runs import PLACE_FIELDS, preflight, resolved, storage_directory, versions
from vae_ray.seeds import stream
from vae_ray.trained import TrainedVAE
from vae_ray.tuning import leaderboard
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.progress import SweepView
from vae_ray.tuning.proposals import OptunaProposals, propose_all
from vae_ray.tuning.records import TrialRecord, read_trials
from vae_ray.tuning.report import write_report
from vae_ray.tuning.schedulers import SCHEDULERS, Setting
from vae_ray.tuning.settings import SweepSettings, settings
from vae_ray.tuning.trial import TRIAL, TrialLoop, train_group
from vae_ray.tuning.watch import Watch

logger = logging.getLogger(__name__)

MOST_VALIDATION_IMAGES = 5000
HEAD_NODE = "node:__internal_head__"


@dataclass(frozen=True)
class SweepResult:
    """What a sweep has come to; `to_dict` is the object that `vae-ray sweep --json` prints."""

    sweep_dir: Path
    num_trials: int
    num_failed: int
    states: dict[str, int]
    """How many trials finished, were stopped, diverged, ..."""
    metrics: list[str]
    """By what trials are compared."""
    best: dict[str, Any]
    """`trial`, `overrides`, `checkpoint`, `metrics` of the winner, in nats."""
    pareto_front: list[str]
    """Trials that no other beats in both rate and distortion."""
    leaderboard: Path
    report: Path
    seconds: float
    """Of this call."""
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


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
    resume: bool = False,
    quiet: bool = True,
) -> SweepResult:
    """Try `num_trials` variations of `experiment` and return the best; `quiet=False` shows progress on stderr.

    `search` is the name of a space that ships with the package, a YAML file, or plain data such as
    `{"optim.lr": {"loguniform": [1e-4, 1e-2]}}`. Trials are compared by `metric` of their best checkpoints, one of
    `val/nelbo`, `val/distortion`, ... or two of them for a Pareto front; never by the loss, which contains beta.
    With `resume` a sweep of that name goes on: what has ended is not run again.

    Raises `UserError`, before anything starts, for what the user can put right, and `TrainingFailed` if every
    trial failed.
    """
    started_at = time.time()
    if resume and experiment.run.name is None:
        raise UserError("run.name: --resume needs the name of a sweep; for example --name my-sweep --resume")
    experiment = _base_experiment(experiment, workers_per_trial)
    chosen = settings(
        search=search,
        metric=metric,
        num_trials=num_trials,
        scheduler=scheduler,
        searcher=searcher,
        workers_per_trial=experiment.workers.num,
    )
    if max_concurrent is not None:
        _check_max_concurrent(max_concurrent, chosen.scheduler)
    chosen, experiment = preflighted(chosen, experiment)
    with opened_sweep(experiment, chosen, resume=resume) as directory:
        with distributed.connection(experiment, dashboard=experiment.workers.num > 1) as device:
            _run_trials(directory, experiment, chosen, device=device, max_concurrent=max_concurrent, quiet=quiet)
        result = conclude(directory, started_at=started_at)
    if result.num_failed == result.num_trials:
        reasons = {record.reason for record in read_trials(directory)}
        raise TrainingFailed(f"all {result.num_trials} trials failed; the first reason: {sorted(reasons)[0]}")
    return result


def _base_experiment(experiment: Experiment, workers_per_trial: int | None) -> Experiment:
    """The experiment that trials vary: named, with absolute paths and at least one worker."""
    workers = experiment.workers.num if workers_per_trial is None else workers_per_trial
    if workers < 0:
        raise UserError(f"workers_per_trial: got {workers}, should be at least 1; for example --workers-per-trial 1")
    name = experiment.run.name or f"sweep-{experiment.data.source}-{datetime.now():%Y%m%d-%H%M%S-%f}"[:-3]
    return resolved(experiment.with_overrides({"workers.num": max(1, workers), "run.name": name}))


def _check_max_concurrent(max_concurrent: int, scheduler: str) -> None:
    if max_concurrent < 1:
        raise UserError(f"max_concurrent: got {max_concurrent}, should be at least 1; for example --max-concurrent 2")
    if scheduler == "pbt":
        raise UserError("max_concurrent: has no meaning for pbt, whose whole population is alive at once; leave it out")


def preflighted(chosen: SweepSettings, experiment: Experiment) -> tuple[SweepSettings, Experiment]:
    """Check all that can be known before a trial starts; the settings and experiment as they will be used.

    Where trials are compared on a validation split and there is none, a tenth of the training images (at most
    5,000) becomes one. Raises `UserError` for a key or a value of the space that is no valid Experiment.
    """
    if chosen.metrics[0].startswith("val/") and not experiment.data.num_validation:
        num_images = len(open_split(experiment.data, "train"))
        experiment = experiment.with_overrides({"data.num_validation": min(MOST_VALIDATION_IMAGES, num_images // 10)})
        logger.warning(
            "data.num_validation: %d of %d training images are set aside, because trials are compared by %s",
            experiment.data.num_validation,
            num_images,
            chosen.metrics[0],
        )
    space = chosen.space.checked(experiment)
    preflight(experiment)
    for overrides in space.probes():
        if next(iter(overrides)).startswith(("data.", "training.global_batch_size")):
            try:
                preflight(experiment.with_overrides(overrides))
            except UserError as error:
                raise UserError(f"search: {error}") from None
    return SweepSettings(space, chosen.metrics, chosen.num_trials, chosen.scheduler, chosen.searcher), experiment


@contextlib.contextmanager
def opened_sweep(experiment: Experiment, chosen: SweepSettings, *, resume: bool) -> Any:
    """The sweep's directory, locked for this process and described; refused if it is something else's."""
    name = str(experiment.run.name)
    directory = SweepDirectory(storage_directory(experiment) / name)
    exists = directory.description_file.exists()
    if not exists and directory.path.exists() and any(directory.path.iterdir()):
        raise UserError(
            f"run.name: {name!r} is already used in {directory.path.parent} by something else; choose another --name"
        )
    description = {"experiment": experiment.to_dict(), **chosen.to_dict()}
    if exists:
        difference = _difference(directory.description(), description)
        what = f"a different sweep ({'; '.join(difference)})" if difference else "this sweep"
        if not resume:
            raise UserError(
                f"run.name: {name!r} is already used in {directory.path.parent} by {what}; add --resume to go on "
                "with it, or choose another --name"
            )
        if difference:
            raise UserError(f"sweep {name!r}: cannot be resumed as {what}")
    directory.path.mkdir(parents=True, exist_ok=True)
    try:
        with directory.lock().acquire(blocking=False):
            directory.write_description(description)
            yield directory
    except filelock.Timeout as error:
        if Path(error.lock_file) != directory.path / ".driver.lock":
            raise
        raise UserError(f"run.name: sweep {name!r} is running right now; choose another --name") from None


def _difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Readable differences of two descriptions; more trials than before are none, they go on with it."""
    experiments = [Experiment.from_dict(content["experiment"]) for content in (old, new)]
    place = {key: experiments[0].flat()[key] for key in PLACE_FIELDS}
    found = differing_fields(experiments[0], experiments[1].with_overrides(place))
    for key in ("search", "metrics", "scheduler", "searcher"):
        if old.get(key) != new[key]:
            found.append(f"{key}: {old.get(key)!r} -> {new[key]!r}")
    grows = new["searcher"] != "grid" and new["num_trials"] > old.get("num_trials", 0)
    if new["num_trials"] != old.get("num_trials") and not grows:
        found.append(f"num_trials: {old.get('num_trials')} -> {new['num_trials']}")
    return found


def _run_trials(
    directory: SweepDirectory,
    experiment: Experiment,
    chosen: SweepSettings,
    *,
    device: torch.device,
    max_concurrent: int | None,
    quiet: bool,
) -> None:
    """Let Tune run whatever has not ended; raises `KeyboardInterrupt` if it was told to stop before."""
    seed = experiment.run.seed
    if chosen.searcher != "optuna":
        propose_all(directory, chosen, seed=seed, num_known=len(read_trials(directory)))
    records = _reopened(read_trials(directory))
    setting = Setting(chosen.metrics[0], _most_epochs(experiment, chosen), chosen.space)
    scheduling = SCHEDULERS[chosen.scheduler](setting, records)
    for record in records:
        if record.state == "pending" and record.name in scheduling.stopped:
            directory.append_to_journal(_ended(record, "stopped"))
    records = _reopened(read_trials(directory))
    num_to_run = sum(record.state == "pending" for record in records)
    num_to_run += chosen.num_trials - len(records)
    if not num_to_run:
        return
    random.seed(stream(seed, "pbt"))  # PBT draws from the global generators
    np.random.seed(stream(seed, "pbt") % 2**32)
    shutil.rmtree(directory.tune_state, ignore_errors=True)
    view = SweepView(
        directory.path.name,
        metric=chosen.metrics[0],
        num_trials=chosen.num_trials,
        epochs=setting.epochs,
        records=records,
    )
    concurrency = _concurrency(experiment, device, max_concurrent)
    # PBT pauses trials and needs the whole population alive
    limit = 0 if chosen.scheduler == "pbt" else concurrency
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(num_to_run if chosen.scheduler == "pbt" else concurrency)
    if chosen.searcher == "optuna":
        param_space = None
        proposals = OptunaProposals(directory, chosen, seed=seed, records=records)
        search: dict[str, Any] = {"search_alg": proposals, "max_concurrent_trials": limit}
    else:
        pending = [{TRIAL: record.name, **record.current} for record in records if record.state == "pending"]
        # Tune wants the keys of given configurations declared
        param_space = dict.fromkeys((TRIAL, *chosen.space.domains))
        search = {"search_alg": BasicVariantGenerator(points_to_evaluate=pending, max_concurrent=limit)}
    with contextlib.nullcontext() if quiet else view:
        tuner = tune.Tuner(
            _trainable(directory, experiment, device),
            param_space=param_space,
            tune_config=tune.TuneConfig(
                **search,
                scheduler=scheduling.scheduler,
                num_samples=num_to_run,
                reuse_actors=experiment.workers.num == 1,
            ),
            run_config=tune.RunConfig(
                name=f"{directory.path.name}-{secrets.token_hex(4)}",
                storage_path=str(directory.tune_state),
                verbose=0,
                callbacks=[
                    Watch(
                        directory,
                        None if quiet else view,
                        lambda overrides: experiment.with_overrides(overrides).training.epochs,
                    )
                ],
                checkpoint_config=tune.CheckpointConfig(num_to_keep=4),
            ),
        )
        for name in ("ray.tune", "ray.train"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # failures are told once, by the view
        tuner.fit()
    shutil.rmtree(directory.tune_state, ignore_errors=True)
    for record in read_trials(directory):
        # what a nested TorchTrainer that was stopped early left behind
        shutil.rmtree(record.run.path / distributed.RAY_STATE, ignore_errors=True)
        if record.state == "pending":
            raise KeyboardInterrupt


def _reopened(records: list[TrialRecord]) -> list[TrialRecord]:
    """Records in which a trial whose process was killed is still to be done: it was not its fault."""
    return [
        TrialRecord(**{**vars(record), "state": "pending", "reason": ""}) if record.state == "killed" else record
        for record in records
    ]


def _ended(record: TrialRecord, state: str) -> dict[str, Any]:
    return {"trial": record.name, "event": "ended", "epoch": record.epochs_done, "state": state, "reason": ""}


def _most_epochs(experiment: Experiment, chosen: SweepSettings) -> int:
    """Epochs of the longest trial."""
    domain = chosen.space.domains.get("training.epochs")
    return max(domain.probes()) if domain is not None else experiment.training.epochs


def _concurrency(experiment: Experiment, device: torch.device, max_concurrent: int | None) -> int:
    """How many trials the cluster can run at once, so that none holds what another waits for."""
    workers, resources = experiment.workers, ray.cluster_resources()
    fitting = resources.get("CPU", 0) // (workers.num * workers.cpus)
    if device.type == "cuda":
        fitting = min(fitting, resources.get("GPU", 0) // (workers.num * workers.gpus))
    return max(1, int(min(fitting, max_concurrent or fitting)))


def _trainable(directory: SweepDirectory, experiment: Experiment, device: torch.device) -> Callable[..., Any]:
    """What Tune runs for a trial, with what it may hold."""
    parameters = {"sweep_path": str(directory.path), "experiment": experiment.to_dict(), "device": device.type}
    workers = experiment.workers
    if workers.num > 1:
        # The trial's own process only waits for its workers. It must hold something, and not a part of a CPU that
        # they need: on two CPUs a trial of two workers would wait for ever.
        return tune.with_resources(tune.with_parameters(train_group, **parameters), {HEAD_NODE: 0.001})
    resources = {"CPU": workers.cpus, **({"GPU": workers.gpus} if device.type == "cuda" else {})}
    return tune.with_resources(tune.with_parameters(TrialLoop, **parameters), resources)


def conclude(directory: SweepDirectory, *, started_at: float) -> SweepResult:
    """Write the leaderboard, `best/`, the report and the summary from the sweep's files."""
    description = directory.description()
    metrics = description["metrics"]
    records = read_trials(directory)
    table = leaderboard.rows(records, metrics, directory)
    leaderboard.write_leaderboard(table, directory)
    order = leaderboard.ranked(records, metrics)
    best: dict[str, Any] = {}
    if order and order[0].best is not None and not order[0].failed:
        winner = order[0]
        leaderboard.write_best(winner.best, directory)
        best = {
            "trial": winner.name,
            "overrides": winner.overrides,
            "checkpoint": str(directory.best),
            "metrics": _with_test({key: value for key, value in winner.best.metrics.items() if "/" in key}, directory),
        }
    write_report(directory, records, table)
    states = [record.state for record in records]
    result = SweepResult(
        sweep_dir=directory.path,
        num_trials=len(records),
        num_failed=sum(record.failed for record in records),
        states={state: states.count(state) for state in sorted(set(states))},
        metrics=metrics,
        best=best,
        pareto_front=[row["trial"] for row in table if row["pareto_front"]],
        leaderboard=directory.leaderboard_csv,
        report=directory.report,
        seconds=time.time() - started_at,
        versions=versions(),
    )
    directory.write_summary(result.to_dict())
    return result


def _with_test(metrics: dict[str, float], directory: SweepDirectory) -> dict[str, float]:
    """The winner's metrics, with the test split where no epoch evaluated it."""
    return metrics if "test/nelbo" in metrics else metrics | TrainedVAE.load(directory.best).evaluate("test")
