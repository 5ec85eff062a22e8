"""What people are told while nodes of the cluster go and come: Ray waits in silence."""

from __future__ import annotations

import logging
import threading
from types import TracebackType

import ray

from vae_ray.config.experiment import Experiment
from vae_ray.distributed.nodes import max_workers_fitting

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0


class NodeWatch:
    """Warns, while a run trains, when a node goes or comes and when too few are left; a context manager."""

    def __init__(self, experiment: Experiment, *, uses_gpu: bool) -> None:
        workers = experiment.workers
        self._least = workers.min
        self._each: dict[str, float] = {"CPU": workers.cpus, **({"GPU": workers.gpus} if uses_gpu else {})}
        self._alive = self._look()
        self._is_short = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="node watch", daemon=True)

    def __enter__(self) -> NodeWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> dict[str, dict[str, float]]:
        """Resources of the living nodes by address."""
        return {node["NodeManagerAddress"]: node["Resources"] for node in ray.nodes() if node["Alive"]}

    def _follow(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            self._tell(self._look())

    def _tell(self, alive: dict[str, dict[str, float]]) -> None:
        for address in sorted(self._alive.keys() - alive.keys()):
            logger.warning("node %s is gone; its workers are lost since the last checkpoint", address)
        for address in sorted(alive.keys() - self._alive.keys()):
            logger.warning("node %s has joined the cluster", address)
        self._alive = alive
        num_fitting = max_workers_fitting(list(alive.values()), self._each)
        if num_fitting < self._least and not self._is_short:
            logger.warning(
                "workers.num: waiting for nodes: the cluster has room for %d of %d workers. Training goes on from the "
                "last checkpoint when they are back; or stop it and --resume with a range such as --workers.num 1..%d",
                num_fitting,
                self._least,
                max(2, self._least),
            )
        elif self._is_short and num_fitting >= self._least:
            logger.warning(
                "workers.num: there is room for %d workers again; going on from the last checkpoint", num_fitting
            )
        self._is_short = num_fitting < self._least
