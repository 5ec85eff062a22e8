"""Whether workers fit on the nodes of a cluster: refused where no node can join, else a warning."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from vae_ray.config.experiment import WorkersConfig
from vae_ray.distributed.resources import check_workers_fit, max_workers_fitting
from vae_ray.errors import UserError


def node(cpus: float, gpus: float = 0, *, alive: bool = True, group: str | None = None) -> dict[str, Any]:
    labels = {"ray.io/node-id": "1", **({"ray.io/node-group": group} if group else {})}
    return {"Alive": alive, "Resources": {"CPU": cpus, **({"GPU": gpus} if gpus else {})}, "Labels": labels}


def test_the_resources_of_one_worker_are_of_one_node() -> None:
    assert max_workers_fitting([{"CPU": 3}, {"CPU": 3}], {"CPU": 2}) == 2
    assert max_workers_fitting([{"CPU": 8}, {"CPU": 1, "GPU": 4}], {"CPU": 1, "GPU": 1}) == 1


@pytest.mark.parametrize(
    ("workers", "problem"),
    [
        ({"num": 4}, "got 4 with 1 CPU each, but the cluster has room for 3 (3 CPUs); for example --workers.num 3"),
        (
            {"num": 1, "cpus": 3},
            "got 1 with 3 CPU each, but the cluster has room for 0 (3 CPUs); for example --workers.cpus 2",
        ),
        (
            {"num": 1, "device": "cuda"},
            "got 1 with 1 CPU and 1 GPU each, but the cluster has room for 0 (3 CPUs and 0 GPUs); for example "
            "--workers.device cpu",
        ),
    ],
)
def test_too_many_workers_are_refused_where_no_node_can_join(workers: dict[str, Any], problem: str) -> None:
    config = WorkersConfig(**workers)
    nodes = [node(1), node(2), node(8, 8, alive=False, group="worker")]
    with pytest.raises(UserError) as error:
        check_workers_fit(config, nodes, where="the cluster")
    assert str(error.value) == f"workers.num: {problem}"


def test_workers_wait_for_nodes_of_a_cluster_that_a_launcher_started(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "vae_ray"):
        check_workers_fit(WorkersConfig(num=4), [node(0, group="headgroup")], where="the Ray cluster")
    assert "waiting for nodes: the Ray cluster has room for 0 of 4 workers now" in caplog.text


def test_the_minimum_of_a_range_of_workers_has_to_fit() -> None:
    workers = WorkersConfig(num="2..8")
    check_workers_fit(workers, [node(2)], where="the cluster")
    with pytest.raises(UserError, match=r"workers\.num: got 2 with 1 CPU each"):
        check_workers_fit(workers, [node(1)], where="the cluster")
