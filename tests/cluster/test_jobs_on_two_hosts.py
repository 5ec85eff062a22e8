"""`ray job submit` from a third place: on both nodes, and with an exit code."""

from __future__ import annotations

import json
import re

import pytest

from tests.cluster.hosts import HOME
from tests.cluster.ray_nodes import RayNodes, succeeded
from vae_ray import TrainedVAE

pytestmark = pytest.mark.cluster


def test_a_job_from_a_third_place_trains_on_both_nodes(two_nodes: RayNodes) -> None:
    """MNIST from files that both nodes see: test_announced_nodes.py."""
    storage = two_nodes.network.shared / "runs"
    options = ["--storage", str(storage), "--name=both", "--workers.num", "2", "--training.epochs", "1"]
    job = succeeded(two_nodes.submit("python", "jobs/train.py", "digits", *options))
    assert "best checkpoint" in job.stdout
    summary = json.loads((storage / "both" / "summary.json").read_text())
    assert summary["num_workers"] == 2
    assert sorted(summary["nodes"]) == sorted(host.address for host in two_nodes.nodes)
    # each node has its own home, in which its worker has decoded the images
    for host in two_nodes.nodes:
        decoded = host.run("find", f"{HOME}/.cache/vae_ray", "-name", "*.arrow").stdout.split()
        assert decoded, f"no worker has read the images on {host.name}"
    trained = TrainedVAE.load(storage / "both")
    assert trained.checkpoint.epoch == 1
    nelbo = trained.evaluate("test")["test/nelbo"]
    assert nelbo < 70  # 64.0 with any number of workers
    job = succeeded(two_nodes.submit("python", "jobs/evaluate.py", str(storage / "both")))
    (printed,) = re.findall(r"^test/nelbo +([\d.]+) ± [\d.]+ nats$", job.stdout, re.MULTILINE)
    assert float(printed) == pytest.approx(nelbo, abs=0.0051)  # two digits are printed


def test_a_failing_job_returns_non_zero_and_says_why(two_nodes: RayNodes) -> None:
    job = two_nodes.submit("python", "jobs/train.py", "digits", "--workers.num", "64")
    assert job.returncode != 0
    assert "vae-ray: workers.num: got 64 with 1 CPU each, but the Ray cluster has room for 2" in job.stdout
    assert "exit code 2" in job.stdout
