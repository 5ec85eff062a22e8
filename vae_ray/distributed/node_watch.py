"""Logs when nodes join or leave the cluster and when too few are left: Ray waits for nodes without a message."""

from __future__ import annotations

import logging
import threading
from types import TracebackType

import ray

from vae_ray.config.sections import WorkersConfig
from vae_ray.distributed.resources import max_workers_fitting, worker_resources

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0


class NodeWatch:
    """Warns, while a run trains, of nodes that join or leave and of too little room; a context manager.

    `connection` has warned already where the room is too small at the start.
    """

    def __init__(self, workers: WorkersConfig, *, uses_gpu: bool) -> None:
        self._min_workers = workers.min
        self._each = worker_resources(workers, uses_gpu=uses_gpu)
        self._nodes = self._alive_nodes()
        self._is_short = self._num_fitting() < self._min_workers
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="node watch", daemon=True)

    def __enter__(self) -> NodeWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _alive_nodes(self) -> dict[str, dict[str, float]]:
        """The resources of each alive node, by its address."""
        return {node["NodeManagerAddress"]: node["Resources"] for node in ray.nodes() if node["Alive"]}

    def _num_fitting(self) -> int:
        return max_workers_fitting(list(self._nodes.values()), self._each)

    def _poll(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self._report_changes(self._alive_nodes())

    def _report_changes(self, nodes: dict[str, dict[str, float]]) -> None:
        for address in sorted(self._nodes.keys() - nodes.keys()):
            logger.warning("node %s left the cluster; its workers restart from the last checkpoint", address)
        for address in sorted(nodes.keys() - self._nodes.keys()):
            logger.warning("node %s joined the cluster", address)
        self._nodes = nodes
        num_fitting, was_short = self._num_fitting(), self._is_short
        self._is_short = num_fitting < self._min_workers
        if self._is_short and not was_short:
            logger.warning(
                "workers.num: waiting for nodes: the cluster has room for %d of %d workers. Training continues from "
                "the last checkpoint when the nodes are back; or stop it and --resume with a range such as "
                "--workers.num 1..%d",
                num_fitting,
                self._min_workers,
                max(2, self._min_workers),
            )
        elif was_short and not self._is_short:
            logger.warning("workers.num: the cluster has room for %d workers; training continues", num_fitting)
