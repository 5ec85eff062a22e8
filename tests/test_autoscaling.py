"""What a cluster may grow to, from what its head says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from vae_ray.distributed.autoscaling import MAY_GROW_BY, with_nodes_to_come
from vae_ray.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]


def node(cpus: float, gpus: float = 0, *, alive: bool = True, label: str | None = None) -> dict[str, Any]:
    resources = {"CPU": cpus, "memory": 1e9, **({"GPU": gpus} if gpus else {})}
    return {"Alive": alive, "Resources": resources, "Labels": {} if label is None else {MAY_GROW_BY: label}}


def kinds(nodes: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return sorted((found.get("CPU", 0), found.get("GPU", 0)) for found in with_nodes_to_come(nodes))


def test_a_cluster_that_promises_nothing_is_what_lives() -> None:
    assert kinds([node(2), node(4, 1), node(8, alive=False)]) == [(2, 0), (4, 1)]


def test_promised_nodes_count_before_they_are_there() -> None:
    assert kinds([node(0, label="2x8_1x4x1")]) == [(0, 0), (4, 1), (8, 0), (8, 0)]


def test_a_promised_node_that_has_come_counts_once() -> None:
    assert kinds([node(0, label="2x8_1x4x1"), node(8), node(4, 1)]) == [(0, 0), (4, 1), (8, 0), (8, 0)]
    assert kinds([node(0, label="1x8"), node(8), node(8)]) == [(0, 0), (8, 0), (8, 0)]


def test_a_node_that_has_gone_may_come_again() -> None:
    assert kinds([node(0, label="1x8"), node(8, alive=False)]) == [(0, 0), (8, 0)]


@pytest.mark.parametrize("label", ["", "8", "8x", "x8", "8x8x1x1", "2x8__1x4", "many"])
def test_a_label_that_says_nothing_is_refused(label: str) -> None:
    with pytest.raises(UserError, match="for example 8x8_4x4x1"):
        kinds([node(0, label=label)])


def test_the_files_promise_what_they_let_come() -> None:
    aws = yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())
    types = [kind for name, kind in aws["available_node_types"].items() if name != aws["head_node_type"]]
    of_aws = [(kind["max_workers"], kind["resources"]["CPU"], kind["resources"].get("GPU")) for kind in types]
    assert f"--labels={MAY_GROW_BY}={promise(of_aws)}" in aws["head_start_ray_commands"][-1]

    cluster = yaml.safe_load((REPOSITORY / "jobs/cluster/rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
    of_pods = []
    for group in cluster["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        of_pods.append((group["maxReplicas"], int(limits["cpu"]), limits.get("nvidia.com/gpu")))
    assert cluster["headGroupSpec"]["labels"] == {MAY_GROW_BY: promise(of_pods)}


def promise(groups: list[tuple[int, int, int | None]]) -> str:
    return "_".join("x".join(str(number) for number in group if number) for group in groups)
