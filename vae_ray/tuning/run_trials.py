"""Whatever of a sweep has not ended yet, run by Ray Tune.

Tune is started anew each time, with a scheduler and a searcher that know our records; its own state is thrown away.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from ray import tune
from ray.tune.search import BasicVariantGenerator

from vae_ray.config import user_code
from vae_ray.config.experiment import Experiment
from vae_ray.distributed.launch import clear_state, ray_state
from vae_ray.distributed.resources import alive_resources, max_workers_fitting, may_grow, worker_resources
from vae_ray.seeds import stream
from vae_ray.storage.locations import join_location
from vae_ray.tuning.callbacks import JournalCallback
from vae_ray.tuning.directory import TRIALS, SweepDirectory
from vae_ray.tuning.progress import SweepView
from vae_ray.tuning.proposals import FixedConfigurations, OptunaProposals, propose_all
from vae_ray.tuning.records import TrialRecord, read_trials
from vae_ray.tuning.schedulers import SCHEDULERS, SchedulerSpec
from vae_ray.tuning.settings import SweepSettings
from vae_ray.tuning.trial import TRIAL, TrialLoop, train_group

TUNE_STATE = ".tune"
"""What Tune keeps for itself in a sweep's directory while it runs; a new one at every start."""
HEAD_NODE = "node:__internal_head__"
PBT_CHECKPOINTS_KEPT = 4
"""Of each trial, by Tune, while it runs: one that others are about to copy must not be deleted."""


def run_trials(
    directory: SweepDirectory,
    experiment: Experiment,
    chosen: SweepSettings,
    *,
    device: torch.device,
    max_concurrent: int | None,
    quiet: bool,
) -> None:
    """Run all trials that have not ended; Ray must be connected. Raises `KeyboardInterrupt` if told to stop before."""
    seed = experiment.run.seed
    if chosen.searcher != "optuna":
        propose_all(directory, chosen, seed=seed)
    setting = SchedulerSpec(chosen.metrics[0], _most_epochs(experiment, chosen), chosen.space)
    known = read_trials(directory)
    scheduling = SCHEDULERS[chosen.scheduler](setting, known)
    for record in known:
        if record.state == "pending" and record.name in scheduling.stopped:
            end = {"event": "ended", "epoch": record.epochs_done, "state": "stopped", "reason": ""}
            directory.append_to_journal({"trial": record.name, **end})
    records = [_reopened(record) for record in read_trials(directory)]
    pending = [record for record in records if record.state == "pending"]
    num_to_run = len(pending) + chosen.num_trials - len(records)
    if not num_to_run:
        return
    if chosen.scheduler == "pbt":  # it draws from the global generators
        random.seed(stream(seed, "pbt"))
        np.random.seed(stream(seed, "pbt") % 2**32)
    # PBT pauses trials and compares the whole population: all of it must be alive at once.
    limit = 0 if chosen.scheduler == "pbt" else _concurrency(experiment, device, max_concurrent or num_to_run)
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(limit or num_to_run)
    with (
        ray_state(directory.location, TUNE_STATE) as storage,
        SweepView(
            directory.name,
            metric=chosen.display_metric,
            num_trials=chosen.num_trials,
            epochs=setting.epochs,
            records=records,
            quiet=quiet,
        ) as view,
    ):
        watch = JournalCallback(
            directory, view, lambda overrides: experiment.with_overrides(overrides).training.epochs, records
        )
        tuner = tune.Tuner(
            _trainable(directory, experiment, device),
            # Tune wants the keys of given configurations declared
            param_space=dict.fromkeys((TRIAL, *chosen.space.domains)) if chosen.searcher != "optuna" else None,
            tune_config=tune.TuneConfig(
                **_search(directory, chosen, seed=seed, records=records, limit=limit),
                scheduler=scheduling.scheduler,
                num_samples=num_to_run,
                trial_name_creator=lambda trial: trial.config[TRIAL],
                reuse_actors=experiment.workers.max == 1,
            ),
            run_config=tune.RunConfig(
                name=f"{directory.name}-{secrets.token_hex(4)}",
                verbose=0,
                callbacks=[watch],
                checkpoint_config=tune.CheckpointConfig(num_to_keep=PBT_CHECKPOINTS_KEPT),
                **storage,
            ),
        )
        for name in ("ray.tune", "ray.train"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # failures are told once, by the view
        tuner.fit()
        directory.pull()
        watch.all_ended()
    _clear_away(directory)
    if any(record.state == "pending" for record in read_trials(directory)):
        raise KeyboardInterrupt


def _search(
    directory: SweepDirectory, chosen: SweepSettings, *, seed: int, records: list[TrialRecord], limit: int
) -> dict[str, Any]:
    """Tune's arguments for what is tried next, at most `limit` trials at once (0: as many as there are)."""
    if chosen.searcher == "optuna":
        proposals = OptunaProposals(directory, chosen, seed=seed, records=records)
        return {"search_alg": proposals, "max_concurrent_trials": limit}
    pending = [{TRIAL: record.name, **record.current} for record in records if record.state == "pending"]
    if chosen.scheduler == "pbt":
        return {"search_alg": FixedConfigurations(pending)}
    return {"search_alg": BasicVariantGenerator(points_to_evaluate=pending, max_concurrent=limit)}


def _clear_away(directory: SweepDirectory) -> None:
    """Delete what a nested TorchTrainer leaves when its trial is stopped early."""
    for record in read_trials(directory):
        clear_state(join_location(directory.location, TRIALS, record.name))


def _reopened(record: TrialRecord) -> TrialRecord:
    """A trial whose process was killed is still to be done: it was not its fault."""
    return replace(record, state="pending", reason="") if record.state == "killed" else record


def _most_epochs(experiment: Experiment, chosen: SweepSettings) -> int:
    """Epochs of the longest trial."""
    domain = chosen.space.domains.get("training.epochs")
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


def _trainable(directory: SweepDirectory, experiment: Experiment, device: torch.device) -> Callable[..., Any]:
    """What Tune runs for a trial, with what it may hold."""
    parameters: dict[str, Any] = {
        "sweep": directory.location,
        "experiment": experiment.to_dict(),
        "device": device.type,
    }
    parameters["user_code"] = user_code.collect(experiment.user_code())
    workers = experiment.workers
    if workers.max > 1:
        # The trial's own process only waits for its workers. It must hold something, and not a part of a CPU that
        # they need: on two CPUs a trial of two workers would wait indefinitely.
        return tune.with_resources(tune.with_parameters(train_group, **parameters), {HEAD_NODE: 0.001})
    resources = worker_resources(workers, uses_gpu=device.type == "cuda")
    return tune.with_resources(tune.with_parameters(TrialLoop, **parameters), resources)
