"""`ray job submit` from a third place: the run is on both nodes, its exit code comes back, and not without the token."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cluster.hosts import HOME, describe
from tests.cluster.ray_nodes import RayNodes, succeeded
from vae_ray import TrainedVAE

pytestmark = pytest.mark.cluster

MNIST_EPOCH = ["--training.epochs", "1", "--model.hidden", "64", "--training.global-batch-size", "256"]


def test_a_job_from_a_third_place_trains_mnist_on_both_nodes(two_nodes: RayNodes, mnist_root: Path) -> None:
    storage = two_nodes.network.shared / "runs"
    options = ["--storage", str(storage), "--name=mnist", "--data.root", str(mnist_root), "--workers.num", "2"]
    job = succeeded(two_nodes.submit("python", "jobs/train.py", "notebook", *options, *MNIST_EPOCH))
    assert "best checkpoint" in job.stdout
    assert json.loads((storage / "mnist" / "summary.json").read_text())["num_workers"] == 2
    # each node has one CPU and a home of its own, and decodes for its own worker
    for host in two_nodes.nodes:
        decoded = host.run("find", f"{HOME}/.cache/vae_ray", "-name", "*.arrow").stdout.split()
        assert decoded, f"no worker has read MNIST on {host.name}"
    checkpoint = TrainedVAE.load(storage / "mnist")
    assert checkpoint.checkpoint.epoch == 1
    assert checkpoint.evaluate("test")["test/nelbo"] < 200
