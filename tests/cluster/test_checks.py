"""Contract: the finding of `vae-ray doctor` for each problem of a node."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from vae_ray.cluster.checks import GIB, Finding, run_checks
from vae_ray.distributed.nodes import NodeAnswer

PLENTY = {"path": "/x", "writable": True, "free": 50 * GIB, "total": 100 * GIB}
HEALTHY: dict[str, Any] = {
    "host": "host",
    "versions": {"python": "3.11.7", "torch": "2.14.1", "ray": "2.60.0"},
    "num_cpus": 4,
    "num_gpus": 0,
    "memory": {"total": 16 * GIB, "available": 8 * GIB},
    "shared_memory": 8 * GIB,
    "temp": dict(PLENTY),
    "cache": dict(PLENTY),
}


def answers(**changes: Any) -> list[NodeAnswer]:
    """Two nodes, of which the second differs from a healthy one in `section__key` or `section`."""
    second = copy.deepcopy(HEALTHY)
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            second[section][field] = value
        else:
            second[section] = value
    resources = {"CPU": 4.0}
    return [
        NodeAnswer("a", "10.0.0.1", resources, copy.deepcopy(HEALTHY)),
        NodeAnswer("b", "10.0.0.2", resources, second),
    ]


def problems(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.level, finding.subject) for finding in findings if finding.level != "ok"]


def test_healthy_nodes_are_all_ok() -> None:
    findings = run_checks(answers(), {"a": 0.0, "b": 0.4})
    assert problems(findings) == []
    assert {"nodes", "versions", "gpus", "memory", "/dev/shm", "disk", "data cache", "clocks"} == {
        finding.subject for finding in findings
    }


@pytest.mark.parametrize(
    ("changes", "level", "subject", "text"),
    [
        ({"versions__torch": "2.13.0"}, "error", "versions", "torch is 2.14.1 on 10.0.0.1, 2.13.0 on 10.0.0.2"),
        ({"versions__python": "3.12.1"}, "error", "versions", "python is 3.11.7 on 10.0.0.1, 3.12.1 on 10.0.0.2"),
        ({"versions__torch": None}, "error", "versions", "torch is not installed on 10.0.0.2"),
        ({"num_gpus": 8}, "warning", "gpus", "10.0.0.2 has GPUs that Ray was not started with"),
        ({"memory__available": GIB // 2}, "warning", "memory", "less than 1 GiB is free on 10.0.0.2"),
        ({"shared_memory": 64 * 2**20}, "warning", "/dev/shm", "is smaller than 256 MiB on 10.0.0.2"),
        ({"temp__free": 4 * GIB}, "error", "disk", "the disk of Ray's directory /x is over 95 % full on 10.0.0.2"),
        ({"temp__writable": False}, "error", "disk", "Ray's directory /x cannot be written on 10.0.0.2"),
        ({"cache__writable": False}, "error", "data cache", "/x cannot be written on 10.0.0.2"),
        ({"cache__free": GIB // 2}, "warning", "data cache", "less than 1 GiB free on 10.0.0.2"),
    ],
)
def test_a_problem_is_a_finding_with_its_node_and_advice(
    changes: dict[str, Any], level: str, subject: str, text: str
) -> None:
    findings = run_checks(answers(**changes), {})
    assert problems(findings) == [(level, subject)]
    (finding,) = (finding for finding in findings if finding.level != "ok")
    assert text in finding.text
    assert finding.advice
    assert str(finding).startswith(level)


@pytest.mark.parametrize(
    ("offset", "level", "text"),
    [(1.5, "ok", "agree"), (-30.0, "warning", "30 s behind"), (400.0, "error", "10.0.0.2 is 400 s ahead")],
)
def test_clocks_that_disagree_are_a_finding(offset: float, level: str, text: str) -> None:
    finding = run_checks(answers(), {"a": 0.0, "b": offset})[-1]
    assert (finding.subject, finding.level) == ("clocks", level)
    assert text in finding.text


def test_a_node_that_does_not_answer_is_an_error_and_the_others_are_checked() -> None:
    silent = NodeAnswer("c", "10.0.0.3", {"CPU": 4.0}, error="no answer within 30 s")
    findings = run_checks([*answers(), silent], {})
    assert problems(findings) == [("error", "nodes")]
    assert "10.0.0.3 did not answer (no answer within 30 s)" in findings[0].text
    assert len(findings) > 5


def test_a_cluster_without_nodes_is_an_error() -> None:
    assert problems(run_checks([], {})) == [("error", "nodes")]
