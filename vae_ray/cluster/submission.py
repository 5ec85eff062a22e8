"""`vae-ray submit`: run a command of this package as a Ray job, checked before it is sent and followed until it ends.

The job runs `python -m vae_ray COMMAND ...` with the cluster's Python, in a working directory that has the package.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient

from vae_ray.cluster.dashboard import cluster_nodes, describe_error, find_dashboard, job_client
from vae_ray.cluster.upload import Upload, mebibytes
from vae_ray.config.experiment import Experiment
from vae_ray.config.sections import WorkersConfig
from vae_ray.distributed.environment import DEFAULTS
from vae_ray.distributed.resources import check_workers_fit
from vae_ray.errors import TrainingFailed, UserError, one_line

AGENT_SECONDS = 60.0
STOP_SECONDS = "30"
"""How long a stopped job has for its last checkpoint; Ray's own default is 3."""
ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)


@dataclass(frozen=True)
class Job:
    """A submitted job; `exit_code` is None until it has ended by itself."""

    job_id: str
    url: str
    status: str
    exit_code: int | None = None

    @property
    def command_exit_code(self) -> int:
        """The exit code for the shell: the command's own, 130 for a job that was stopped, 1 for one that was killed."""
        if self.status == JobStatus.STOPPED:
            return 130
        if self.status == JobStatus.SUCCEEDED:
            return 0
        return self.exit_code if self.exit_code is not None and 0 < self.exit_code < 256 else 1

    def to_dict(self) -> dict[str, Any]:
        """What `submit --json` prints."""
        return {"job_id": self.job_id, "address": self.url, "status": self.status, "exit_code": self.exit_code}


class Detached(Exception):
    """Ctrl-C while following a job, which keeps running."""

    def __init__(self, job: Job) -> None:
        super().__init__(f"{job.job_id} keeps running; stop it with: ray job stop --address {job.url} {job.job_id}")
        self.job = job


def submit(
    arguments: Sequence[str],
    *,
    address: str | None,
    upload: Upload,
    workers: WorkersConfig | None = None,
    environment: Mapping[str, str] | None = None,
    python: str = "python",
    follow: bool = True,
) -> Job:
    """Run `vae-ray ARGUMENTS` as a job of the cluster whose dashboard is at `address`; its log goes to stderr.

    Raises `UserError` before anything is sent if the cluster cannot be reached, refuses the token or has too few
    resources, or if the upload is too large; `Detached` at Ctrl-C.
    """
    upload.check_size()
    dashboard = find_dashboard(address)
    client = job_client(dashboard)
    # a head that has just started lists no node yet, not even itself
    if workers is not None and workers.num != "auto" and (nodes := cluster_nodes(dashboard)):
        check_workers_fit(workers, nodes, uses_gpu=workers.device == "cuda", where="the cluster")
    if dashboard.is_open:
        _print(f"warning: {dashboard.url} requires no token: anyone who can reach it can run code there")
    _print(f"uploading {len(upload.files)} files, {mebibytes(upload.num_bytes)}")
    job_id = send(
        client,
        [python, "-m", "vae_ray", *arguments],
        upload,
        environment={**DEFAULTS, "RAY_JOB_STOP_WAIT_TIME_S": STOP_SECONDS, **(environment or {})},
    )
    job = Job(job_id, dashboard.url, status=JobStatus.PENDING.value)
    _print(f"job {job_id} at {dashboard.url}")
    try:
        return _followed(client, job) if follow else job
    except KeyboardInterrupt:
        raise Detached(job) from None


def check_places(experiment: Experiment) -> None:
    """Raise `UserError` for each relative path of `experiment`: a job has another working directory."""
    for key in ("run.storage", "data.root", "data.cache_dir"):
        place = experiment.flat().get(key)
        if place is not None:
            check_place(key, str(place), flag="--storage" if key == "run.storage" else f"--{key.replace('_', '-')}")


def check_place(key: str, place: str, *, flag: str) -> None:
    """Raise `UserError` if `place` is a relative path: a job's working directory is removed with the job."""
    if "://" not in place and not place.startswith(("/", "~")):
        raise UserError(
            f"{key}: got {place!r}, relative to a directory of this machine; should be an absolute path that all nodes "
            f"of the cluster see, or a URI, for example {flag} /shared/{Path(place).name}"
        )


def send(
    client: JobSubmissionClient,
    command: Sequence[str],
    upload: Upload,
    *,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Submit `command` as a job with `upload` as its working directory; returns the job's id."""
    deadline = time.monotonic() + AGENT_SECONDS
    with tempfile.TemporaryDirectory(prefix="vae_ray-") as directory:
        archive = Path(directory, "vae_ray.zip")
        upload.write(archive)
        runtime_env = {"working_dir": str(archive), "env_vars": dict(environment or {})}
        while True:
            try:
                return client.submit_job(entrypoint=shlex.join(command), runtime_env=runtime_env)
            except (RuntimeError, OSError) as error:
                # a head node that has just started answers before it can run jobs
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    lines = [line for line in str(error).splitlines() if line.strip()]
                    raise TrainingFailed(f"the cluster did not accept the job: {lines[-1].strip()}") from None
                time.sleep(1)


def _followed(client: JobSubmissionClient, job: Job) -> Job:
    """Copy the job's log to stderr until the job ends; returns the ended job."""
    printed = 0
    while True:
        printed = asyncio.run(_print_log(client, job.job_id, printed))
        try:
            info = client.get_job_info(job.job_id)
        except (RuntimeError, OSError) as error:
            raise TrainingFailed(f"{job.url} stopped answering ({describe_error(error)}); job {job.job_id}") from None
        if info.status in ENDED:
            if info.status == JobStatus.FAILED and info.driver_exit_code is None:
                _print(f"job {job.job_id} failed: {one_line(info.message or '')[:500]}")
            return Job(job.job_id, job.url, info.status.value, info.driver_exit_code)
        time.sleep(0.5)


async def _print_log(client: JobSubmissionClient, job_id: str, skip: int) -> int:
    """Print the log from the character `skip` on until the connection ends; returns how many have been printed."""
    seen = 0  # each connection begins at the beginning of the log
    with contextlib.suppress(RuntimeError, OSError):
        async for text in client.tail_job_logs(job_id):
            sys.stderr.write(text[max(0, skip - seen) :])
            sys.stderr.flush()
            seen += len(text)
    return max(seen, skip)


def _print(text: str) -> None:
    sys.stderr.write(f"vae-ray: {text}\n")
