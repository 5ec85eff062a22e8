"""`vae-ray doctor` where it cannot look at a cluster; of a healthy one of two nodes see test_nodes.py."""

from __future__ import annotations

import time

import pytest

from tests.distributed.heads import Head, doctor, levels, text

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(
    ("way", "environment"),
    [
        ("gcs", {"RAY_AUTH_MODE": "disabled"}),
        ("dashboard", {"RAY_AUTH_TOKEN": "", "HOME": "/nonexistent"}),
        ("gcs", {"RAY_AUTH_TOKEN": "0" * 64}),
    ],
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
