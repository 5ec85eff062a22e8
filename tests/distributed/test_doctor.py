"""`vae-ray doctor` on real clusters: what it says of a healthy one, and of what can be wrong with it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import heads
from tests.distributed.heads import Head

pytestmark = pytest.mark.ray


def doctor(head: Head, *arguments: str, cwd: Path = heads.REPOSITORY, **environment: str) -> tuple[int, Any]:
    """Exit code and the JSON answer."""
    done = head.vae_ray("doctor", *arguments, "--python", sys.executable, "--json", cwd=cwd, **environment)
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout)


def levels(answer: Any) -> dict[str, str]:
    return {finding["subject"]: finding["level"] for finding in answer["findings"]}


def text(answer: Any, subject: str) -> str:
    return str(next(finding["text"] for finding in answer["findings"] if finding["subject"] == subject))


@pytest.mark.parametrize("way", ["by a job", "as a node"])
def test_a_healthy_cluster_of_two_nodes(two_nodes: Head, tmp_path: Path, way: str) -> None:
    address = two_nodes.dashboard if way == "by a job" else two_nodes.gcs
    code, answer = doctor(two_nodes, "--address", address, "--storage", str(tmp_path / "runs"))
    assert code == 0
    assert answer["healthy"] is True
    assert "error" not in levels(answer).values()
    expected = {"nodes", "versions", "vae_ray", "clocks", "token", "dashboard", "storage", "data cache", "/dev/shm"}
    assert {subject for subject, level in levels(answer).items() if level == "ok"} >= expected
    assert len(answer["nodes"]) == 2
    assert sorted(node["resources"]["CPU"] for node in answer["nodes"]) == [1, 2]
    assert "writable from every node" in text(answer, "storage")
    assert not (tmp_path / "runs").exists()  # a question leaves nothing


def test_a_storage_that_a_node_does_not_see_is_an_error(two_nodes: Head, tmp_path: Path) -> None:
    storage = "/proc/self/cwd/runs"  # in each process another directory
    code, answer = doctor(two_nodes, "--address", two_nodes.gcs, "--storage", storage, cwd=tmp_path)
    assert code == 1
    assert levels(answer)["storage"] == "error"
    assert "cannot see it" in text(answer, "storage")
    assert [subject for subject, level in levels(answer).items() if level == "error"] == ["storage"]


@pytest.mark.parametrize("way", ["dashboard", "gcs"])
@pytest.mark.parametrize(
    "environment",
    [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "", "HOME": "/nonexistent"}, {"RAY_AUTH_TOKEN": "0" * 64}],
    ids=["token mode off", "no token", "another token"],
)
def test_without_the_token_one_line_says_so(head: Head, way: str, environment: dict[str, str]) -> None:
    started = time.monotonic()
    code, answer = doctor(head, "--address", getattr(head, way), **environment)
    assert time.monotonic() - started < 15
    assert code == 1
    assert levels(answer) == {"cluster": "error"}
    assert "RAY_AUTH_MODE=token" in text(answer, "cluster")


def test_a_python_without_the_dependencies_is_named(head: Head) -> None:
    done = head.vae_ray("doctor", "--address", head.dashboard, "--python", "/nowhere/python")
    assert done.returncode == 1
    assert "/nowhere/python" in done.stdout
    assert "error    job" in done.stdout


@pytest.fixture(scope="module")
def open_head() -> Iterator[Head]:
    with heads.head(token=False) as running:
        yield running


@pytest.mark.parametrize("way", ["dashboard", "gcs"])
def test_a_cluster_that_lets_anyone_in_is_an_error(open_head: Head, way: str) -> None:
    code, answer = doctor(open_head, "--address", getattr(open_head, way))
    assert code == 1
    assert [subject for subject, level in levels(answer).items() if level == "error"] == ["token"]
    assert "anyone who reaches the cluster can run code" in text(answer, "token")
