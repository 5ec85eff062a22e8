"""What machines have, what workers need, and whether a cluster has room for them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vae_ray.config.sections.workers import WorkersConfig
from vae_ray.errors import UserError

NODE_GROUP_LABEL = "ray.io/node-group"
"""Ray's default label of nodes that a cluster launcher started: its value is the node type or the worker group."""
Resources = Mapping[str, float]

logger = logging.getLogger(__name__)


def worker_resources(workers: WorkersConfig, *, uses_gpu: bool) -> dict[str, float]:
    """What Ray reserves for one worker."""
    return {"CPU": workers.num_threads, **({"GPU": workers.gpus} if uses_gpu else {})}


def alive_resources(nodes: Sequence[Mapping[str, Any]]) -> list[Resources]:
    """The total resources of each alive node of `ray.nodes()`."""
    return [node["Resources"] for node in nodes if node["Alive"]]


def max_workers_fitting(nodes: Iterable[Resources], each: Resources) -> int:
    """How many workers that need `each` fit on all `nodes` together; one worker's resources are of one node."""
    return sum(int(min(node.get(kind, 0) // amount for kind, amount in each.items())) for node in nodes)


def may_grow(nodes: Sequence[Mapping[str, Any]]) -> bool:
    """Whether nodes may join the cluster by themselves: a launcher (`ray up`, KubeRay) started the alive `nodes`.

    Ray has no public way to ask whether an autoscaler runs, nor for its limits (ray-project/ray#52033). But each node
    that a launcher starts has a node group, and a node that `ray start` starts by hand has none.
    """
    return any(node["Alive"] and NODE_GROUP_LABEL in node["Labels"] for node in nodes)


def check_workers_fit(workers: WorkersConfig, nodes: Sequence[Mapping[str, Any]], *, where: str) -> None:
    """Raise `UserError` if the alive `nodes` have no room for `workers.min` workers and no node can join.

    `nodes` have the keys of `ray.nodes()`. Where nodes may join, this warns: Ray waits for them.
    """
    alive, each = alive_resources(nodes), worker_resources(workers, uses_gpu=workers.device == "cuda")
    num_fitting = max_workers_fitting(alive, each)
    if workers.min <= num_fitting:
        return
    if may_grow(nodes):
        logger.warning(
            "workers.num: waiting for nodes: %s has room for %d of %d workers now; "
            "`ray status` on the head node says why if no node joins",
            *(where, num_fitting, workers.min),
        )
        return
    totals = {kind: sum(node.get(kind, 0) for node in alive) for kind in each}
    if num_fitting:
        advice = f"--workers.num {num_fitting}"
    elif totals.get("GPU", workers.gpus) < workers.gpus:
        advice = "--workers.device cpu"
    else:
        advice = f"--workers.cpus {max(1, int(max((node.get('CPU', 0) for node in alive), default=1)))}"
    raise UserError(
        f"workers.num: got {workers.min} with {' and '.join(f'{amount:g} {kind}' for kind, amount in each.items())} "
        f"each, but {where} has room for {num_fitting} "
        f"({' and '.join(f'{total:g} {kind}s' for kind, total in totals.items())}); for example {advice}"
    )
