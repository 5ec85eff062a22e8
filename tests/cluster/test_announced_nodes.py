"""A run on two hosts while one of them is announced to be preempted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.followed_jobs import Job
from tests.cluster.ray_nodes import RayNodes, succeeded

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]


def test_a_node_that_is_announced_to_go_leads_to_a_checkpoint(whole: RayNodes, mnist_root: Path) -> None:
    """One long epoch, not saved inside by itself: what is saved when the node goes is all that there is."""
    second = whole.nodes[1]
    options = ["--workers.num", "1..2", "--run.checkpoint-every-steps", "0", "--training.epochs", "2"]
    options += ["--data.source", "mnist", "--data.root", str(mnist_root), "--training.global-batch-size", "8"]
    job = Job(whole, "drained", *options)
    job.wait_until(lambda: job.run.records.progress_file.exists(), "steps", seconds=120)
    node_id = whole.node_id(second)
    drain = ["ray", "drain-node", f"--address={whole.nodes[0].address}:6379", f"--node-id={node_id}"]
    drain += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=20"]
    succeeded(whole.nodes[0].run(*drain, env=whole.credentials, timeout=60))
    job.wait_until(lambda: any(job.run.checkpoints.glob("epoch=0001-step=*")), "a checkpoint", seconds=30)
    second.kill_everything()
    job.wait_until(lambda: len(job.run.records.attempts()) > 1, "the restart", seconds=150)
    assert job.run.records.attempts()[1]["steps_done"] > 0
    stop = ["ray", "job", "stop", f"--address={whole.job_address}", job.id]
    succeeded(whole.client.run(*stop, env=whole.credentials, timeout=60))
    job.end()
