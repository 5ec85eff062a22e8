"""`ray job submit` of the jobs/ on a cluster of one node, with token authentication as clusters should have."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.heads import RAY, Head
from vae_ray import TrainedVAE

pytestmark = pytest.mark.ray


def submit(head: Head, *entrypoint: str) -> subprocess.CompletedProcess[str]:
    deadline = time.monotonic() + 90
    command = [RAY, "job", "submit", f"--address={head.dashboard}", "--working-dir", ".", "--", *entrypoint]
    while True:
        job = head.run(*command)
        # a head node answers before the agent that runs jobs is up
        if "No available agent" not in job.stderr or time.monotonic() > deadline:
            return job
        time.sleep(1)


def test_submitted_jobs_train_on_two_workers_and_evaluate(head: Head, tmp_path: Path) -> None:
    where = ["--storage", str(tmp_path), "--name=job"]
    job = submit(
        head, sys.executable, "jobs/train.py", "digits", "--workers.num", "2", "--training.epochs", "2", *where
    )
    assert job.returncode == 0, job.stdout + job.stderr
    assert "best checkpoint" in job.stdout
    summary = json.loads((tmp_path / "job" / "summary.json").read_text())
    assert summary["num_workers"] == 2
    assert TrainedVAE.load(tmp_path / "job").checkpoint.epoch == 2
    job = submit(head, sys.executable, "jobs/evaluate.py", str(tmp_path / "job"))
    assert job.returncode == 0, job.stdout + job.stderr
    assert re.search(rf"^test/nelbo +{summary['metrics']['test/nelbo']:.3f} nats$", job.stdout, re.MULTILINE)


def test_a_job_with_bad_input_fails_with_the_commands_one_line(head: Head) -> None:
    job = submit(head, sys.executable, "jobs/train.py", "digits", "--workers.num", "64")
    assert job.returncode != 0
    assert "vae-ray: workers.num: got 64 with 1 CPU each, should be at most what the Ray cluster has" in job.stdout
    assert "Traceback" not in job.stdout


def test_the_repository_is_a_small_upload(head: Head) -> None:
    """Although gigabytes may lie in it: .venv, data, runs."""
    job = submit(head, "sh", "-c", "ls -A; du -sk . | sed 's/^/kilobytes /'")
    assert job.returncode == 0, job.stdout + job.stderr
    lines = job.stdout.splitlines()
    assert {"vae_ray", "jobs"} <= set(lines)
    assert {".git", ".venv", "tests", "docs"} & set(lines) == set()
    (size,) = (int(line.split()[1]) for line in lines if line.startswith("kilobytes "))
    assert size < 2000


def test_a_submitted_job_sweeps(head: Head, tmp_path: Path) -> None:
    options = ["--num-trials", "2", "--training.epochs", "1", "--storage", str(tmp_path), "--name=job"]
    job = submit(head, sys.executable, "jobs/sweep.py", "digits", *options)
    assert job.returncode == 0, job.stdout + job.stderr
    assert "best trial" in job.stdout
    assert json.loads((tmp_path / "job" / "summary.json").read_text())["num_trials"] == 2
    assert TrainedVAE.load(tmp_path / "job" / "best").checkpoint.epoch == 1
