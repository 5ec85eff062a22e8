"""What a cluster that grows may grow to.

Ray has no public answer: its autoscaler keeps the limits to itself, and a cluster whose workers come on demand looks
like one that has none. So the head says it in a label, which `ray.nodes()` shows to every driver:

    ray start --head --labels=vae-ray/may-grow-by=8x8_4x4x1

are at most 8 nodes of 8 CPUs, and 4 of 4 CPUs and 1 GPU. `cluster.yaml` and `jobs/cluster/rayjob.yaml` do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import ray

from vae_ray.errors import UserError

MAY_GROW_BY = "vae-ray/may-grow-by"
GROUP = re.compile(r"(\d+)x(\d+)(?:x(\d+))?")
Resources = dict[str, float]


def possible_nodes() -> list[Resources]:
    """What each node has that the connected cluster consists of or, when work waits for them, may come to."""
    return with_nodes_to_come(ray.nodes())


def with_nodes_to_come(nodes: Iterable[Mapping[str, Any]]) -> list[Resources]:
    """The resources of those of `nodes` that live, and of those that their labels promise.

    One that has come already is not counted twice. Raises `UserError` for a label that says nothing.
    """
    alive = [node for node in nodes if node["Alive"]]
    possible: list[Resources] = [dict(node["Resources"]) for node in alive]
    here = [_kind(resources) for resources in possible]
    for label in {node["Labels"][MAY_GROW_BY] for node in alive if MAY_GROW_BY in node.get("Labels", {})}:
        for resources in _groups(label):
            if (kind := _kind(resources)) in here:
                here.remove(kind)
            else:
                possible.append(resources)
    return possible


def _groups(label: str) -> list[Resources]:
    """Of each node that `label` promises."""
    nodes: list[Resources] = []
    for group in label.split("_"):
        if (found := GROUP.fullmatch(group)) is None:
            raise UserError(
                f"label {MAY_GROW_BY}: got {label!r}, should be nodes x CPUs or nodes x CPUs x GPUs of each kind of "
                "node; for example 8x8_4x4x1"
            )
        count, cpus, gpus = (int(number or 0) for number in found.groups())
        nodes += [{"CPU": float(cpus), **({"GPU": float(gpus)} if gpus else {})} for _ in range(count)]
    return nodes


def _kind(resources: Resources) -> tuple[float, float]:
    return resources.get("CPU", 0.0), resources.get("GPU", 0.0)
