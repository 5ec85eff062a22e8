"""The driver's connection to Ray, and the checks of a cluster before workers are requested."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import ray
import torch

from vae_ray import signals
from vae_ray.config.experiment import Experiment
from vae_ray.distributed.nodes import check_shared_storage
from vae_ray.distributed.ray_temp_dir import check_temp_dir
from vae_ray.distributed.resources import alive_resources, check_workers_fit, max_workers_fitting
from vae_ray.errors import UserError, one_line
from vae_ray.machine import num_local_cpus
from vae_ray.storage.locations import is_uri, local_path
from vae_ray.training.placement import resolve_on_cluster

WITHOUT_CLUSTER = "unset RAY_ADDRESS to start a local one; train with --workers.num 0 needs no Ray"


def check_local_resources(experiment: Experiment) -> None:
    """Raise `UserError` if a local Ray would be started and could not start, or has no room for the workers."""
    if _starts_local_ray():
        check_temp_dir()
        resources = {"CPU": float(num_local_cpus()), "GPU": float(torch.cuda.device_count())}
        nodes = [{"Alive": True, "Resources": resources, "Labels": {}}]
        check_workers_fit(experiment.workers, nodes, where="this machine")


@contextlib.contextmanager
def connect(experiment: Experiment, *, dashboard: bool = False) -> Iterator[tuple[Experiment, torch.device]]:
    """Connect to Ray; yield the experiment without `auto` and the device that workers will use.

    The cluster is the one to which this process is already connected, or the one in `RAY_ADDRESS` (Ray sets it in
    jobs); without either a local Ray is started, and shut down afterwards. A local Ray has a `dashboard` only if it is
    requested. Raises `UserError` if the cluster cannot be reached, or has too few resources and cannot grow: Ray itself
    would wait indefinitely.
    """
    with connected(dashboard=dashboard):
        experiment, device = on_connected_cluster(experiment)
        if not is_uri(experiment.run.storage):
            check_shared_storage(local_path(experiment.run.storage, key="run.storage"))
        yield experiment, device


def on_connected_cluster(experiment: Experiment) -> tuple[Experiment, torch.device]:
    """The experiment without `auto` on the cluster to which this process is connected, and its workers' device.

    Raises `UserError` if the cluster has no room for the workers and cannot grow.
    """
    nodes = ray.nodes()
    resources = alive_resources(nodes)
    experiment = resolve_on_cluster(experiment, resources)
    workers = experiment.workers
    check_workers_fit(workers, nodes, where="the Ray cluster")
    uses_gpu = workers.device == "cuda" or (
        workers.device == "auto" and max_workers_fitting(resources, {"GPU": workers.gpus}) >= workers.max
    )
    return experiment, torch.device("cuda" if uses_gpu else "cpu")


@contextlib.contextmanager
def connected(*, dashboard: bool = False, advice: str = WITHOUT_CLUSTER) -> Iterator[None]:
    """In its body this process is connected to Ray, as by `connect`; raises `UserError` if that is not possible.

    `advice` says what to do without the cluster, if it is the one in `RAY_ADDRESS` that cannot be reached.
    """
    connects_here = not ray.is_initialized()
    if connects_here:
        _init(is_local=_starts_local_ray(), dashboard=dashboard, advice=advice)
    try:
        yield
    finally:
        if connects_here:
            ray.shutdown()


def _starts_local_ray() -> bool:
    return not ray.is_initialized() and not os.environ.get("RAY_ADDRESS")


def _init(*, is_local: bool, dashboard: bool, advice: str) -> None:
    local: dict[str, Any] = {}  # without an address Ray reads RAY_ADDRESS
    if is_local:
        local = {"address": "local", "num_cpus": num_local_cpus(), "include_dashboard": dashboard}
        # saves a process: the only node of a local Ray is not preempted
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    try:
        with signals.deferred_while_ray_starts():
            ray.init(**local, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises no common class
        reason = f"({one_line(error)[:200]})"
        if is_local:
            advice = "`vae-ray doctor` looks for the cause; train with --workers.num 0 needs no Ray"
            raise UserError(f"a local Ray does not start {reason}; {advice}") from None
        raise UserError(
            f"RAY_ADDRESS: Ray at {os.environ.get('RAY_ADDRESS')!r} cannot be reached {reason}; {advice}"
        ) from None
