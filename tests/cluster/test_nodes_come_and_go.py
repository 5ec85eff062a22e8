"""A run on two hosts while a node leaves and joins again, and while its job is stopped and submitted again."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.cluster.followed_jobs import EPOCHS, Job
from tests.cluster.ray_nodes import RayNodes, succeeded
from vae_ray.run_files.run_directory import RunDirectory

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]


@pytest.fixture(scope="module")
def undisturbed(two_nodes: RayNodes) -> RunDirectory:
    """The run with two workers to which nothing happens."""
    job = Job(two_nodes, "undisturbed", "--workers.num", "2")
    assert job.end() == 0, job.log_text()
    return job.run


def last_nelbo(run: RunDirectory) -> float:
    return float(run.records.history()[-1]["train/nelbo"])


def assert_nothing_repeated(run: RunDirectory, before: list[dict[str, Any]]) -> None:
    """The epochs that were saved before the fault have their lines from before; none is there twice or missing."""
    assert [line["epoch"] for line in run.records.history()] == list(range(1, EPOCHS + 1))
    resumed_from = run.records.attempts()[1]["epochs_done"]
    assert resumed_from >= len(before) - 1
    assert run.records.history()[:resumed_from] == before[:resumed_from]


def test_a_range_of_workers_continues_with_one_when_a_node_leaves_and_grows_when_it_joins(
    whole: RayNodes, undisturbed: RunDirectory
) -> None:
    second = whole.nodes[1]
    job = Job(whole, "elastic", "--workers.num", "1..2")
    job.wait_for_epochs(3)
    before = job.run.records.history()
    second.kill_everything()
    job.wait_until(lambda: len(job.run.records.attempts()) > 1, "the restart with one worker", seconds=150)
    assert job.run.records.attempts()[1]["num_workers"] == 1
    assert job.end() == 0, job.log_text()
    assert f"node {second.address} left the cluster" in job.log_text()
    assert_nothing_repeated(job.run, before)
    assert abs(last_nelbo(job.run) - last_nelbo(undisturbed)) < 0.5


def test_a_fixed_number_of_workers_waits_for_the_node_and_says_so(whole: RayNodes, undisturbed: RunDirectory) -> None:
    second = whole.nodes[1]
    job = Job(whole, "fixed", "--workers.num", "2")
    job.wait_for_epochs(3)
    before = job.run.records.history()
    second.kill_everything()
    job.wait_until(lambda: "waiting for nodes" in job.log_text(), "the message", seconds=90)
    assert "room for 1 of 2 workers" in job.log_text()
    time.sleep(5)
    assert len(job.run.records.attempts()) == 1, "it waits"
    whole.start(second)
    assert job.end() == 0, job.log_text()
    assert "room for 2 workers; training continues" in job.log_text()
    assert_nothing_repeated(job.run, before)
    assert last_nelbo(job.run) == pytest.approx(last_nelbo(undisturbed), abs=1e-3)


def test_a_stopped_job_continues_when_it_is_submitted_again_with_resume(
    whole: RayNodes, undisturbed: RunDirectory
) -> None:
    job = Job(whole, "stopped", "--workers.num", "2")
    job.wait_for_epochs(3)
    stop = ["ray", "job", "stop", f"--address={whole.job_address}", job.id]
    succeeded(whole.client.run(*stop, env=whole.credentials, timeout=60))
    job.end()
    attempt = job.run.records.attempts()[-1]
    again = Job(whole, "stopped", "--workers.num", "2", "--resume")
    assert again.end() == 0, again.log_text()
    resumed = job.run.records.attempts()[-1]
    assert (resumed["epochs_done"], resumed["steps_done"]) > (attempt["epochs_done"], attempt["steps_done"])
    assert resumed["epochs_done"] >= 3
    assert last_nelbo(job.run) == pytest.approx(last_nelbo(undisturbed), abs=1e-6)
    summaries = [json.loads(run.records.summary_file.read_text())["metrics"] for run in (job.run, undisturbed)]
    assert summaries[0] == pytest.approx({**summaries[1], **_timing(summaries[0])}, abs=1e-6)


def _timing(metrics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if "/" not in key}
