"""The driver's connection to Ray, and what must be true of the cluster before workers are asked for."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence

import ray
import torch

from vae_ray import signals
from vae_ray.config.experiment import Experiment
from vae_ray.distributed.autoscaling import possible_nodes
from vae_ray.distributed.nodes import check_shared_storage, max_workers_fitting
from vae_ray.errors import UserError
from vae_ray.storage.locations import directory_of, is_uri

Resources = dict[str, float]


def check_local_resources(experiment: Experiment) -> None:
    """Raise `UserError` if a local Ray, where one would be started, could never satisfy the request."""
    if _starts_local_ray():
        _check_resources(experiment, [_local_resources()], where="this machine")


@contextlib.contextmanager
def connection(experiment: Experiment, *, dashboard: bool = False) -> Iterator[torch.device]:
    """Ray, connected, and the device that workers will use; a Ray that was started here is shut down after.

    A cluster is one to which this process is already connected, or the one in `RAY_ADDRESS` (Ray sets it in
    jobs); without either a local Ray is started. Raises `UserError` if the cluster cannot be reached or can
    never satisfy the request: Ray itself would wait for ever. A local Ray has a `dashboard` only if asked for.
    """
    connects_here = not ray.is_initialized()
    if connects_here:
        _init(is_local=_starts_local_ray(), dashboard=dashboard)
    try:
        _check_resources(experiment, possible_nodes(), where="the Ray cluster")
        if not is_uri(experiment.run.storage):
            check_shared_storage(directory_of(experiment.run.storage))
        yield torch.device("cuda" if _use_gpu(experiment, node_resources()) else "cpu")
    finally:
        if connects_here:
            ray.shutdown()


def node_resources() -> list[Resources]:
    """What each living node of the connected cluster has in all."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _starts_local_ray() -> bool:
    return not ray.is_initialized() and not os.environ.get("RAY_ADDRESS")


def _init(*, is_local: bool, dashboard: bool) -> None:
    if is_local:
        # one process fewer beside the workers: no one takes this machine's only node away
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        with signals.handlers_kept():
            ray.init(
                address="local" if is_local else None,  # None reads RAY_ADDRESS
                num_cpus=_num_cpus() if is_local else None,
                include_dashboard=dashboard if is_local else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        address = os.environ.get("RAY_ADDRESS", "local")
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"Ray at {address!r} cannot be reached ({reason}); unset RAY_ADDRESS to start a local one, "
            "or use --workers.num 0"
        ) from None


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _local_resources() -> Resources:
    return {"CPU": float(_num_cpus()), "GPU": float(torch.cuda.device_count())}


def _use_gpu(experiment: Experiment, nodes: Sequence[Resources]) -> bool:
    workers = experiment.workers
    if workers.device == "auto":
        return max_workers_fitting(nodes, {"GPU": workers.gpus}) >= workers.max
    return workers.device == "cuda"


def _check_resources(experiment: Experiment, nodes: Sequence[Resources], *, where: str) -> None:
    """Refuse more workers than all nodes together have room for; a worker's CPUs and GPUs are of one node."""
    workers = experiment.workers
    num_cpus, num_gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    fitting = max_workers_fitting(nodes, {"CPU": workers.cpus})
    if workers.min > fitting:
        advice = f"--workers.num {fitting}" if fitting else f"--workers.cpus {max(1, int(num_cpus))}"
        raise UserError(
            f"workers.num: got {workers.min} with {workers.cpus} CPU each, should be at most what {where} has "
            f"({num_cpus:g} CPUs); for example {advice}"
        )
    if workers.device == "cuda" and workers.min > max_workers_fitting(nodes, {"GPU": workers.gpus}):
        raise UserError(
            f"workers.num: got {workers.min} with {workers.gpus} GPU each, should be at most what {where} has "
            f"({num_gpus:g} GPUs); for example --workers.device cpu"
        )
