"""A node dies, comes back, is announced to go; a job is stopped: what a run on two hosts then does."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.ray_nodes import REPOSITORY, RayNodes, succeeded, wait_until
from vae_ray.artifacts.run_directory import RunDirectory

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]

EPOCHS = 16
# epochs of half a second or more, saved several times in each
RUN = ["digits", "--training.epochs", str(EPOCHS), "--training.global-batch-size", "16", "--model.hidden", "256,128"]
RUN += ["--training.test-every-epochs", "0", "--run.checkpoint-every-steps", "20", "--run.seed", "5"]


class Job:
    """A job that was submitted from the client's place and is followed in the background."""

    def __init__(self, cluster: RayNodes, name: str, *options: str) -> None:
        self.cluster, self.name = cluster, name
        storage = cluster.network.shared / "come-and-go"
        self.run, self.log = RunDirectory(storage / name), cluster.network.shared / f"job-{time.monotonic_ns()}.log"
        entrypoint = ["python", "jobs/train.py", *RUN, "--storage", str(storage), "--name", name, *options]
        self.process: subprocess.Popen[Any] = cluster.client.start(
            *cluster.submission(*entrypoint),
            env={**cluster.credentials, "PYTHONUNBUFFERED": "1"},  # the log is read while the job runs
            cwd=REPOSITORY,
            log=self.log,
        )

    @property
    def id(self) -> str:
        """As Ray calls it."""
        return next(word.strip("'") for word in self.said().split() if word.startswith("'raysubmit_"))

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for_epochs(self, number: int, *, seconds: float = 120) -> None:
        self.wait_until(lambda: len(self.run.history()) >= number, f"{number} epochs", seconds=seconds)

    def wait_until(self, condition: Any, what: str, *, seconds: float) -> None:
        def holds_or_ended() -> bool:
            assert self.process.poll() is None or condition(), f"the job ended before: {what}\n{self.said()}"
            return bool(condition())

        try:
            wait_until(holds_or_ended, what, seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}") from None

    def end(self, *, seconds: float = 240) -> int:
        return int(self.process.wait(timeout=seconds))


@pytest.fixture(scope="module")
def undisturbed(two_nodes: RayNodes) -> RunDirectory:
    """The run with two workers to which nothing happens."""
    job = Job(two_nodes, "undisturbed", "--workers.num", "2")
    assert job.end() == 0, job.said()
    return job.run


@pytest.fixture
def whole(two_nodes: RayNodes) -> Iterator[RayNodes]:
    """Both nodes alive before and after a test."""
    two_nodes.wait_until_alive(*two_nodes.nodes)
    yield two_nodes
    first, second = two_nodes.nodes
    if not any("raylet" in line for line in second.processes()):
        two_nodes.wait_until_alive(first)  # the dashboard learns late of a death
        two_nodes.start(second)
        two_nodes.wait_until_alive(first, second)


def last_nelbo(run: RunDirectory) -> float:
    return float(run.history()[-1]["train/nelbo"])


def assert_nothing_repeated(run: RunDirectory, before: list[dict[str, Any]]) -> None:
    """The epochs that were saved before the fault have their lines from before; none is there twice or missing."""
    assert [line["epoch"] for line in run.history()] == list(range(1, EPOCHS + 1))
    resumed_from = run.attempts()[1]["epochs_done"]
    assert resumed_from >= len(before) - 1
    assert run.history()[:resumed_from] == before[:resumed_from]


def test_a_range_of_workers_goes_on_with_one_when_a_node_dies_and_grows_when_it_is_back(
    whole: RayNodes, undisturbed: RunDirectory
) -> None:
    second = whole.nodes[1]
    job = Job(whole, "elastic", "--workers.num", "1..2")
    job.wait_for_epochs(3)
    before = job.run.history()
    second.kill_everything()
    job.wait_until(lambda: len(job.run.attempts()) > 1, "going on with one worker", seconds=150)
    assert job.run.attempts()[1]["num_workers"] == 1
    assert job.end() == 0, job.said()
    assert f"node {second.address} is gone" in job.said()
    assert_nothing_repeated(job.run, before)
    assert abs(last_nelbo(job.run) - last_nelbo(undisturbed)) < 0.5


def test_a_fixed_number_of_workers_waits_for_the_node_and_says_so(whole: RayNodes, undisturbed: RunDirectory) -> None:
    second = whole.nodes[1]
    job = Job(whole, "fixed", "--workers.num", "2")
    job.wait_for_epochs(3)
    before = job.run.history()
    second.kill_everything()
    job.wait_until(lambda: "waiting for nodes" in job.said(), "the message", seconds=90)
    assert "room for 1 of 2 workers" in job.said()
    time.sleep(5)
    assert len(job.run.attempts()) == 1, "it waits"
    whole.start(second)
    assert job.end() == 0, job.said()
    assert "room for 2 workers again" in job.said()
    assert_nothing_repeated(job.run, before)
    assert last_nelbo(job.run) == pytest.approx(last_nelbo(undisturbed), abs=1e-3)


def test_a_stopped_job_goes_on_when_it_is_submitted_again_with_resume(
    whole: RayNodes, undisturbed: RunDirectory
) -> None:
    job = Job(whole, "stopped", "--workers.num", "2")
    job.wait_for_epochs(3)
    stop = ["ray", "job", "stop", f"--address={whole.job_address}", job.id]
    succeeded(whole.client.run(*stop, env=whole.credentials, timeout=60))
    job.end()
    attempt = job.run.attempts()[-1]
    again = Job(whole, "stopped", "--workers.num", "2", "--resume")
    assert again.end() == 0, again.said()
    resumed = job.run.attempts()[-1]
    assert (resumed["epochs_done"], resumed["steps_done"]) > (attempt["epochs_done"], attempt["steps_done"])
    assert resumed["epochs_done"] >= 3
    assert last_nelbo(job.run) == pytest.approx(last_nelbo(undisturbed), abs=1e-6)
    summaries = [json.loads(run.summary_file.read_text())["metrics"] for run in (job.run, undisturbed)]
    assert summaries[0] == pytest.approx({**summaries[1], **_timing(summaries[0])}, abs=1e-6)


def _timing(metrics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if "/" not in key}


def test_a_node_that_is_announced_to_go_leads_to_a_checkpoint(whole: RayNodes, mnist_root: Path) -> None:
    """One long epoch, not saved inside by itself: what is saved when the node goes is all that there is."""
    second = whole.nodes[1]
    options = ["--workers.num", "1..2", "--run.checkpoint-every-steps", "0", "--training.epochs", "2"]
    options += ["--data.source", "mnist", "--data.root", str(mnist_root), "--training.global-batch-size", "8"]
    job = Job(whole, "drained", *options)
    job.wait_until(lambda: job.run.progress_file.exists(), "steps", seconds=120)
    node_id = whole.node_id(second)
    drain = ["ray", "drain-node", f"--address={whole.nodes[0].address}:6379", f"--node-id={node_id}"]
    drain += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", "--deadline-remaining-seconds=20"]
    succeeded(whole.nodes[0].run(*drain, env=whole.credentials, timeout=60))
    job.wait_until(lambda: any(job.run.checkpoints.glob("epoch=0001-step=*")), "a checkpoint", seconds=30)
    second.kill_everything()
    job.wait_until(lambda: len(job.run.attempts()) > 1, "going on", seconds=150)
    assert job.run.attempts()[1]["steps_done"] > 0
    stop = ["ray", "job", "stop", f"--address={whole.job_address}", job.id]
    succeeded(whole.client.run(*stop, env=whole.credentials, timeout=60))
    job.end()
