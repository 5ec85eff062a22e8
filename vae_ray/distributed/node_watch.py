"""Logs when nodes join or leave the cluster and when too few are left: Ray waits for nodes without a message."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

import ray

from vae_ray.config.sections.workers import WorkersConfig
from vae_ray.distributed.resources import max_workers_fitting, worker_resources

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0


@contextlib.contextmanager
def watched_nodes(workers: WorkersConfig, *, uses_gpu: bool) -> Iterator[None]:
    """In its body a thread warns of nodes that join or leave, and when fewer than `workers.min` workers fit."""
    stop = threading.Event()
    each = worker_resources(workers, uses_gpu=uses_gpu)
    thread = threading.Thread(target=_watch, args=(workers.min, each, stop), name="node watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _watch(min_workers: int, each: dict[str, float], stop: threading.Event) -> None:
    before = _alive_nodes()
    was_short = max_workers_fitting(before.values(), each) < min_workers  # `connection` has warned of it
    while not stop.wait(POLL_SECONDS):
        nodes = _alive_nodes()
        for address in sorted(before.keys() - nodes.keys()):
            logger.warning("node %s left the cluster; its workers restart from the last checkpoint", address)
        for address in sorted(nodes.keys() - before.keys()):
            logger.warning("node %s joined the cluster", address)
        num_fitting = max_workers_fitting(nodes.values(), each)
        is_short = num_fitting < min_workers
        if is_short and not was_short:
            logger.warning(
                "workers.num: waiting for nodes: the cluster has room for %d of %d workers. Training continues from "
                "the last checkpoint when the nodes are back; or stop it and --resume with a range such as "
                "--workers.num 1..%d",
                *(num_fitting, min_workers, max(2, min_workers)),
            )
        elif was_short and not is_short:
            logger.warning("workers.num: the cluster has room for %d workers; training continues", num_fitting)
        before, was_short = nodes, is_short


def _alive_nodes() -> dict[str, dict[str, float]]:
    """The resources of each alive node, by its address."""
    return {node["NodeManagerAddress"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
