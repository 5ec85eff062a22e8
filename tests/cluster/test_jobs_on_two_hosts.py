"""`ray job submit` from a third place: on both nodes, with an exit code, and not without the token."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cluster.hosts import HOME, describe
from tests.cluster.ray_nodes import REPOSITORY, RayNodes, succeeded
from vae_ray import TrainedVAE

pytestmark = pytest.mark.cluster

MNIST_EPOCH = ["--training.epochs", "1", "--model.network.hidden", "64", "--training.global-batch-size", "256"]


def test_a_job_from_a_third_place_trains_mnist_on_both_nodes(two_nodes: RayNodes, mnist_root: Path) -> None:
    storage = two_nodes.network.shared / "runs"
    options = ["--storage", str(storage), "--name=mnist", "--data.root", str(mnist_root), "--workers.num", "2"]
    job = succeeded(two_nodes.submit("python", "jobs/train.py", "notebook", *options, *MNIST_EPOCH))
    assert "best checkpoint" in job.stdout
    summary = json.loads((storage / "mnist" / "summary.json").read_text())
    assert summary["num_workers"] == 2
    assert sorted(summary["nodes"]) == sorted(host.address for host in two_nodes.nodes)
    # each node has its own home, in which its worker has decoded the images
    for host in two_nodes.nodes:
        decoded = host.run("find", f"{HOME}/.cache/vae_ray", "-name", "*.arrow").stdout.split()
        assert decoded, f"no worker has read MNIST on {host.name}"
    trained = TrainedVAE.load(storage / "mnist")
    assert trained.checkpoint.epoch == 1
    nelbo = trained.evaluate("test")["test/nelbo"]
    assert nelbo < 250
    job = succeeded(two_nodes.submit("python", "jobs/evaluate.py", str(storage / "mnist")))
    (printed,) = re.findall(r"^test/nelbo +([\d.]+) nats$", job.stdout, re.MULTILINE)
    assert float(printed) == pytest.approx(nelbo, abs=2e-3)


def test_a_failing_job_returns_non_zero_and_says_why(two_nodes: RayNodes) -> None:
    job = two_nodes.submit("python", "jobs/train.py", "digits", "--workers.num", "64")
    assert job.returncode != 0
    assert "vae-ray: workers.num: got 64 with 1 CPU each, but the Ray cluster has room for 2" in job.stdout
    assert "exit code 2" in job.stdout


@pytest.mark.parametrize("env", [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}], ids=["none", "wrong"])
def test_without_the_token_a_job_is_refused(two_nodes: RayNodes, env: dict[str, str]) -> None:
    marker = two_nodes.network.shared / "was-run"
    job = two_nodes.submit("touch", str(marker), env=env)
    assert job.returncode != 0, describe(job)
    assert "AuthenticationError" in job.stderr
    assert not marker.exists()


def test_a_submission_uploads_the_package_and_neither_data_nor_results(two_nodes: RayNodes) -> None:
    """From a checkout with all that people keep in one; what the job finds is what was uploaded."""
    checkout = two_nodes.network.shared / "checkout"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for name in filter(None, tracked.stdout.split("\0")):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, checkout / name)
    heavy = [".git/objects/pack", ".venv/lib/torch.so", "data/MNIST/raw/t10k-images-idx3-ubyte", "runs/a/metrics.jsonl"]
    heavy += ["cache/mnist.arrow", "results/a/checkpoints/epoch=0001/weights.safetensors", ".mypy_cache/cache.json"]
    for name in heavy:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(b"x" * 1_000_000)
    listing = two_nodes.network.shared / "uploaded"
    job = two_nodes.submit("sh", "-c", f"find . -type f -printf '%s %P\\n' > {listing}", cwd=checkout)
    succeeded(job)
    sizes = {name: int(size) for size, name in (line.split(maxsplit=1) for line in listing.read_text().splitlines())}
    assert {"jobs/train.py", "vae_ray/config/experiment.py", "vae_ray/config/presets/mnist.yaml"} <= set(sizes)
    assert set(sizes) & set(heavy) == set()
    assert sum(sizes.values()) < 2_000_000
