"""`vae-ray doctor` of a cluster of one node, and of one that it cannot examine; two hosts are in tests/cluster."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.distributed.heads import Head, doctor, levels, text

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("address", ["the dashboard", "auto"])
def test_a_healthy_cluster(head: Head, tmp_path: Path, address: str) -> None:
    """`auto` is the dashboard of this machine, which Ray's own variable may name."""
    place = {"RAY_API_SERVER_ADDRESS": head.dashboard} if address == "auto" else {}
    given = head.dashboard if address != "auto" else address
    code, answer = doctor(head, "--address", given, "--storage", str(tmp_path / "runs"), **place)
    assert code == 0, answer
    assert answer["healthy"] is True
    assert set(levels(answer).values()) <= {"ok", "warning"}
    expected = {"nodes", "versions", "token", "storage", "data cache", "/dev/shm"}
    assert {subject for subject, level in levels(answer).items() if level == "ok"} >= expected
    (node,) = answer["nodes"]
    assert node["resources"]["CPU"] == 2
    assert node["temp"]["total"] >= node["temp"]["free"] > 0
    assert text(answer, "storage") == f"{tmp_path / 'runs'} is writable"
    assert not (tmp_path / "runs").exists()  # an examination leaves nothing


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "requires a token; none is set here: set RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_TOKEN": "", "HOME": "/nonexistent"}, "requires a token; none is set here: set RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_TOKEN": "0" * 64}, "refuses this token; set RAY_AUTH_MODE=token"),
    ],
    ids=["token mode off", "no token", "another token"],
)
def test_without_the_token_one_line_says_so(head: Head, environment: dict[str, str], problem: str) -> None:
    started = time.monotonic()
    code, answer = doctor(head, "--address", head.dashboard, **environment)
    assert time.monotonic() - started < 15
    assert code == 1
    assert levels(answer) == {"cluster": "error"}
    assert problem in text(answer, "cluster")


def test_the_address_of_the_gcs_is_answered_with_that_of_the_dashboard(head: Head) -> None:
    code, answer = doctor(head, "--address", head.gcs)
    assert code == 1
    assert "try --address http://127.0.0.1:8265" in text(answer, "cluster")


def test_a_python_without_the_dependencies_is_named(head: Head) -> None:
    done = head.vae_ray("doctor", "--address", head.dashboard, "--python", "/nowhere/python")
    assert done.returncode == 1
    assert "/nowhere/python" in done.stdout
    assert "error    job" in done.stdout
