"""Run the unfinished trials with Ray Tune.

What a trial has done is in its own files and in the journal; they are read once at each start. Everything else is
derived from them: which trials are left, the state of the scheduler, what the searcher knows. Tune starts fresh each
time, and its own state is deleted.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import BasicVariantGenerator

from vae_ray import signals
from vae_ray.config import user_code
from vae_ray.config.experiment import Experiment
from vae_ray.distributed.launch import clear_state, ray_state
from vae_ray.distributed.resources import alive_resources, max_workers_fitting, may_grow, worker_resources
from vae_ray.run_files.run_directory import TRIALS
from vae_ray.seeds import stream
from vae_ray.storage.locations import join_location
from vae_ray.training.checkpointing import selection_metric
from vae_ray.tuning.callbacks import JournalCallback
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.progress import SweepView
from vae_ray.tuning.proposals import FixedConfigurations, OptunaProposals, propose_all
from vae_ray.tuning.records import TrialRecord, read_trials
from vae_ray.tuning.schedulers import SCHEDULERS, ReplayableASHA, replay
from vae_ray.tuning.settings import SweepSettings
from vae_ray.tuning.trial import TRIAL, TrialLoop, train_group

TUNE_STATE = ".tune"
"""Tune's own files in a sweep's directory while it runs."""
HEAD_NODE = "node:__internal_head__"
PBT_CHECKPOINTS_KEPT = 4
"""Of each trial, by Tune, while it runs: one that others are about to copy must not be deleted."""


def run_trials(
    directory: SweepDirectory,
    experiment: Experiment,
    settings: SweepSettings,
    *,
    device: torch.device,
    max_concurrent: int | None,
    quiet: bool,
) -> None:
    """Run all trials that have not ended; Ray must be connected. Raises `KeyboardInterrupt` if it is interrupted."""
    epochs = _most_epochs(experiment, settings)
    scheduler, records = _replayed(directory, experiment, settings, epochs)
    num_to_run = settings.num_runs - sum(record.state != "pending" for record in records)
    if not num_to_run:
        return
    view = SweepView(
        directory.name,
        metric=selection_metric(experiment),
        num_trials=settings.num_runs,
        repeats=settings.repeats,
        epochs=epochs,
        records=records,
        quiet=quiet,
    )
    milestones = scheduler.milestones if isinstance(scheduler, ReplayableASHA) else ()
    callback = JournalCallback(
        directory, view, epochs=experiment.training.epochs, records=records, milestones=milestones
    )
    # PBT pauses trials and compares the whole population: all of it must run at once.
    limit = 0 if settings.scheduler == "pbt" else _concurrency(experiment, device, max_concurrent or num_to_run)
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(limit or num_to_run)
    with ray_state(directory.location, TUNE_STATE) as storage, view, signals.restored():
        tuner = tune.Tuner(
            _trainable(directory, experiment, device),
            # Tune requires the keys of given configurations
            param_space=dict.fromkeys((TRIAL, *settings.space.domains)) if settings.searcher != "optuna" else None,
            tune_config=tune.TuneConfig(
                **_search(directory, experiment, settings, records, limit),
                scheduler=scheduler,
                num_samples=num_to_run,
                trial_name_creator=lambda trial: trial.config[TRIAL],
                reuse_actors=experiment.workers.max == 1,
            ),
            run_config=_run_config(directory, callback, storage),
        )
        tuner.fit()
        directory.pull()
        callback.show_warnings()
    for name in callback.ended:  # what a nested TorchTrainer leaves when its trial is stopped early
        clear_state(join_location(directory.location, TRIALS, name))
    if len(callback.ended) < num_to_run:
        raise KeyboardInterrupt


def _replayed(
    directory: SweepDirectory, experiment: Experiment, settings: SweepSettings, epochs: int
) -> tuple[TrialScheduler, list[TrialRecord]]:
    """A scheduler that has seen what earlier drivers saw, and all trials; killed ones are pending again."""
    seed = experiment.run.seed
    propose_all(directory, settings, seed=seed)
    if settings.scheduler == "pbt":  # it draws from the global generators
        random.seed(stream(seed, "pbt"))
        np.random.seed(stream(seed, "pbt") % 2**32)
    scheduler = SCHEDULERS[settings.scheduler](settings.metrics[0], epochs, settings.space)
    records = [
        replace(record, state="pending", reason="") if record.state == "killed" else record
        for record in read_trials(directory)
    ]
    comparisons = [(entry["trial"], entry["epoch"]) for entry in directory.journal() if entry["event"] == "compared"]
    stopped = replay(scheduler, records, comparisons)
    for index, record in enumerate(records):
        if record.state == "pending" and record.name in stopped:
            end = {"event": "ended", "epoch": record.epochs_done, "state": "stopped", "reason": ""}
            directory.append_to_journal({"trial": record.name, **end})
            records[index] = replace(record, state="stopped")
    return scheduler, records


def _run_config(directory: SweepDirectory, callback: JournalCallback, storage: dict[str, Any]) -> tune.RunConfig:
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the view reports failures, once
    return tune.RunConfig(
        name=f"{directory.name}-{secrets.token_hex(4)}",
        verbose=0,
        callbacks=[callback],
        checkpoint_config=tune.CheckpointConfig(num_to_keep=PBT_CHECKPOINTS_KEPT),
        **storage,
    )


def _search(
    directory: SweepDirectory, experiment: Experiment, settings: SweepSettings, records: list[TrialRecord], limit: int
) -> dict[str, Any]:
    """Tune's arguments for what is tried next, at most `limit` trials at once (0: as many as there are)."""
    if settings.searcher == "optuna":
        seed, metric = experiment.run.seed, selection_metric(experiment)
        proposals = OptunaProposals(directory, settings, seed=seed, records=records, selection_metric=metric)
        return {"search_alg": proposals, "max_concurrent_trials": limit}
    pending = [record for record in records if record.state == "pending"]
    if settings.scheduler == "pbt":
        return {"search_alg": FixedConfigurations([{TRIAL: record.name, **record.current} for record in pending])}
    points = [{TRIAL: record.name, **record.proposed} for record in pending]
    return {"search_alg": BasicVariantGenerator(points_to_evaluate=points, max_concurrent=limit)}


def _most_epochs(experiment: Experiment, settings: SweepSettings) -> int:
    """Epochs of the longest trial."""
    domain = settings.space.domains.get("training.epochs")
    return max(domain.boundary_values()) if domain is not None else experiment.training.epochs


def _concurrency(experiment: Experiment, device: torch.device, most: int) -> int:
    """How many trials run at once: `most`, and of a cluster that cannot grow no more than it has room for.

    A trial that waits for its workers then holds none that another trial needs.
    """
    nodes, workers = ray.nodes(), experiment.workers
    if may_grow(nodes):
        return most
    each = worker_resources(workers, uses_gpu=device.type == "cuda")
    return max(1, min(max_workers_fitting(alive_resources(nodes), each) // workers.max, most))


def _trainable(directory: SweepDirectory, experiment: Experiment, device: torch.device) -> Any:
    """What Tune runs for a trial, with the resources that it reserves."""
    parameters: dict[str, Any] = {
        "sweep": directory.location,
        "experiment": experiment.to_dict(),
        "device": device.type,
        "user_code": user_code.collect(experiment.user_code()),
    }
    workers = experiment.workers
    if workers.max > 1:
        # The trial's own process only waits for its workers. It must hold something, and not a part of a CPU that
        # they need: on two CPUs a trial of two workers would wait indefinitely.
        return tune.with_resources(tune.with_parameters(train_group, **parameters), {HEAD_NODE: 0.001})
    resources = worker_resources(workers, uses_gpu=device.type == "cuda")
    return tune.with_resources(tune.with_parameters(TrialLoop, **parameters), resources)
