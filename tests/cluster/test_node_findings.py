"""Contract: the finding of `vae-ray doctor` for each problem of a node."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from vae_ray.cluster.doctor import GIB, Finding, node_findings

PLENTY = {"path": "/x", "writable": True, "free": 50 * GIB, "total": 100 * GIB}
HEALTHY: dict[str, Any] = {
    "address": "10.0.0.1",
    "resources": {"CPU": 4.0},
    "versions": {"python": "3.11.7", "torch": "2.14.1", "ray": "2.60.0"},
    "shared_memory": 8 * GIB,
    "memory": 3 * GIB // 2,
    "temp": {**PLENTY, "problem": ""},
    "cache": dict(PLENTY),
    "clock_offset": 0.0,
}


def nodes(**changes: Any) -> list[dict[str, Any]]:
    """Two nodes, of which the second differs from a healthy one in `section__key` or `section`."""
    first, second = copy.deepcopy(HEALTHY), copy.deepcopy(HEALTHY) | {"address": "10.0.0.2"}
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            second[section][field] = value
        else:
            second[section] = value
    return [first, second]


def problems(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.level, finding.subject) for finding in findings if finding.level != "ok"]


def test_healthy_nodes_are_all_ok() -> None:
    findings = node_findings(nodes(clock_offset=1.5))
    assert problems(findings) == []
    subjects = [finding.subject for finding in findings]
    assert subjects == ["nodes", "versions", "/dev/shm", "disk", "data cache", "clocks"]
    assert "10.0.0.2 (4 CPUs, 0 GPUs, 1.5 GiB of memory)" in findings[0].text


@pytest.mark.parametrize(
    ("changes", "level", "subject", "text"),
    [
        ({"versions__torch": "2.13.0"}, "error", "versions", "torch is 2.14.1 on 10.0.0.1, 2.13.0 on 10.0.0.2"),
        ({"versions__torch": None}, "error", "versions", "torch is 2.14.1 on 10.0.0.1, missing on 10.0.0.2"),
        ({"shared_memory": 64 * 2**20}, "warning", "/dev/shm", "is smaller than 256 MiB on 10.0.0.2"),
        ({"temp__free": 4 * GIB}, "error", "disk", "the disk of Ray's directory /x is over 95 % full on 10.0.0.2"),
        ({"temp__problem": "is too long"}, "error", "disk", "Ray's directory /x is too long on 10.0.0.2"),
        ({"cache__writable": False}, "error", "data cache", "/x cannot be written on 10.0.0.2"),
        ({"cache__free": GIB // 2}, "warning", "data cache", "less than 1 GiB free on 10.0.0.2"),
        ({"clock_offset": -30.0}, "warning", "clocks", "10.0.0.2 is 30 s behind"),
        ({"clock_offset": 400.0}, "error", "clocks", "10.0.0.2 is 400 s ahead"),
    ],
)
def test_a_problem_is_a_finding_with_its_node_and_advice(
    changes: dict[str, Any], level: str, subject: str, text: str
) -> None:
    findings = node_findings(nodes(**changes))
    assert problems(findings) == [(level, subject)]
    (finding,) = (finding for finding in findings if finding.level != "ok")
    assert text in finding.text
    assert finding.advice
    assert str(finding).startswith(level)


def test_a_node_that_does_not_answer_is_an_error_and_the_others_are_checked() -> None:
    silent = {"address": "10.0.0.3", "resources": {"CPU": 4.0}, "error": "no answer within 30 s"}
    findings = node_findings([*nodes(), silent])
    assert problems(findings) == [("error", "nodes")]
    assert "10.0.0.3 did not answer (no answer within 30 s)" in findings[0].text
    assert len(findings) > 5
