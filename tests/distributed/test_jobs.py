"""`ray job submit` of the jobs/ on a cluster of one node, with token authentication as clusters should have."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from vae_ray import TrainedVAE

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[str, dict[str, str]]]:
    """The dashboard's address of a running head node, and the environment of its clients."""
    port = free_port()
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as directory:  # Ray's sockets need a short path
        process = subprocess.Popen(
            [
                *(
                    RAY,
                    "start",
                    "--head",
                    "--block",
                    "--num-cpus=2",
                    f"--port={free_port()}",
                    f"--temp-dir={directory}",
                ),
                *("--dashboard-host=127.0.0.1", f"--dashboard-port={port}"),
                f"--dashboard-agent-listen-port={free_port()}",  # another Ray on this host may have the default
            ],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_until_up(f"{address}/api/version", environment["RAY_AUTH_TOKEN"])
            yield address, environment
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            # --block waits for its children for longer than a test should; they are all in its session
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_up(url: str, token: str) -> None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 90
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < deadline, "the head node did not come up"
            time.sleep(0.5)


def submit(head: tuple[str, dict[str, str]], job_file: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    address, environment = head
    excluded = json.dumps({"excludes": ["/.venv", "/.git", "/runs"]})
    deadline = time.monotonic() + 90
    while True:
        job = subprocess.run(
            [
                *(RAY, "job", "submit", f"--address={address}", "--working-dir", ".", f"--runtime-env-json={excluded}"),
                *("--", sys.executable, job_file, *arguments),
            ],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        # a head node answers before the agent that runs jobs is up
        if "No available agent" not in job.stderr or time.monotonic() > deadline:
            return job
        time.sleep(1)


def test_a_submitted_job_trains_on_two_workers(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    job = submit(
        head,
        "jobs/train.py",
        "digits",
        "--workers.num",
        "2",
        "--training.epochs",
        "2",
        "--storage",
        str(tmp_path),
        "--name=job",
    )
    assert job.returncode == 0, job.stdout + job.stderr
    assert "best checkpoint" in job.stdout
    summary = json.loads((tmp_path / "job" / "summary.json").read_text())
    assert summary["num_workers"] == 2
    assert TrainedVAE.load(tmp_path / "job").checkpoint.epoch == 2


def test_a_job_with_bad_input_fails_with_the_commands_one_line(head: tuple[str, dict[str, str]]) -> None:
    job = submit(head, "jobs/train.py", "digits", "--workers.num", "64")
    assert job.returncode != 0
    assert "vae-ray: workers.num: got 64 with 1 CPU each, should be at most what the Ray cluster has" in job.stdout
    assert "Traceback" not in job.stdout


def test_a_submitted_job_sweeps(head: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    options = ["--num-trials", "2", "--training.epochs", "1", "--storage", str(tmp_path), "--name=job"]
    job = submit(head, "jobs/sweep.py", "digits", *options)
    assert job.returncode == 0, job.stdout + job.stderr
    assert "best trial" in job.stdout
    assert json.loads((tmp_path / "job" / "summary.json").read_text())["num_trials"] == 2
    assert TrainedVAE.load(tmp_path / "job" / "best").checkpoint.epoch == 1
