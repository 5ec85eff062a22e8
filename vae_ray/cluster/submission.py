"""`vae-ray submit`: a command of this package as a Ray job, checked before it is sent, followed until it ends.

The job runs `python -m vae_ray COMMAND ...` in a working directory that brings the package, on the cluster's Python.
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

from vae_ray.cluster.dashboard import Dashboard, cluster_nodes, find_dashboard, job_client, one_line
from vae_ray.cluster.upload import Upload, mebibytes
from vae_ray.config.experiment import Experiment, WorkersConfig
from vae_ray.distributed.autoscaling import with_nodes_to_come
from vae_ray.distributed.environment import DEFAULTS
from vae_ray.distributed.nodes import max_workers_fitting
from vae_ray.errors import TrainingFailed, UserError

AGENT_SECONDS = 60.0
STOP_SECONDS = "30"
"""How long a stopped job has for its last checkpoint; Ray's own default is 3."""
ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)


@dataclass(frozen=True)
class Job:
    """A submitted job; `exit_code` once it has ended by itself."""

    job_id: str
    url: str
    status: str
    exit_code: int | None = None

    @property
    def command_exit_code(self) -> int:
        """What a shell is told: the command's own code, 130 for a job that was stopped, 1 for one that was killed."""
        if self.status == JobStatus.STOPPED:
            return 130
        if self.status == JobStatus.SUCCEEDED:
            return 0
        return self.exit_code if self.exit_code is not None and 0 < self.exit_code < 256 else 1

    def to_dict(self) -> dict[str, Any]:
        """What `submit --json` prints."""
        return {"job_id": self.job_id, "address": self.url, "status": self.status, "exit_code": self.exit_code}


class Detached(Exception):
    """Nobody follows the job any more; it goes on."""

    def __init__(self, job: Job) -> None:
        super().__init__(f"{job.job_id} goes on; stop it with: ray job stop --address {job.url} {job.job_id}")
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

    Raises `UserError` before anything is sent if there is no such cluster, it lets nobody in, has not what the run
    needs, or the upload is too large; `Detached` at Ctrl-C.
    """
    upload.check_size()
    dashboard = find_dashboard(address)
    client = job_client(dashboard)
    if workers is not None:
        _check_room(workers, dashboard)
    if dashboard.is_open:
        _say(f"warning: {dashboard.url} asks for no token: anyone who reaches it can run code there")
    _say(f"uploading {len(upload.files)} files, {mebibytes(upload.num_bytes)}")
    with tempfile.TemporaryDirectory(prefix="vae_ray-") as directory:
        archive = Path(directory, "vae_ray.zip")
        upload.write(archive)
        job_id = send(
            client,
            entrypoint=shlex.join([python, "-m", "vae_ray", *arguments]),
            runtime_env={
                "working_dir": str(archive),
                "env_vars": {**DEFAULTS, "RAY_JOB_STOP_WAIT_TIME_S": STOP_SECONDS, **(environment or {})},
            },
        )
    job = Job(job_id, dashboard.url, status=JobStatus.PENDING.value)
    _say(f"job {job_id} at {dashboard.url}")
    try:
        return _followed(client, job) if follow else job
    except KeyboardInterrupt:
        raise Detached(job) from None


def check_places(experiment: Experiment) -> None:
    """Raise `UserError` for a path that would mean another place in the job than it means here."""
    for key in ("run.storage", "data.root", "data.cache_dir"):
        place = experiment.flat()[key]
        if place is not None:
            check_place(key, str(place), flag="--storage" if key == "run.storage" else f"--{key.replace('_', '-')}")


def check_place(key: str, place: str, *, flag: str) -> None:
    """Raise `UserError` for a relative path: a job's own directory is removed with it."""
    if "://" not in place and not place.startswith(("/", "~")):
        raise UserError(
            f"{key}: got {place!r}, relative to a directory of this machine; should be an absolute path that all nodes "
            f"of the cluster see, or a URI, for example {flag} /shared/{Path(place).name}"
        )


def _check_room(workers: WorkersConfig, dashboard: Dashboard) -> None:
    """Refuse more workers than the cluster has room for, or may come to have."""
    nodes = with_nodes_to_come(cluster_nodes(dashboard))
    each = {"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.device == "cuda" else {})}
    fitting = max_workers_fitting(nodes, each)
    if nodes and workers.min > fitting:  # a head that has just started knows no node yet, not even itself
        wants = " and ".join(f"{amount} {kind}" for kind, amount in each.items())
        has = " and ".join(f"{sum(node.get(kind, 0) for node in nodes):g} {kind}s" for kind in each)
        raise UserError(
            f"workers.num: got {workers.min} with {wants} each, should be at most what the cluster has room for "
            f"({fitting}, with {has} on {len(nodes)} nodes); for example --workers.num {max(1, fitting)}"
        )


def send(client: JobSubmissionClient, **job: Any) -> str:
    """The id of the submitted job. A head node that has just started answers before it can run jobs."""
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            return client.submit_job(**job)
        except (RuntimeError, OSError) as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                lines = [line for line in str(error).splitlines() if line.strip()]
                raise TrainingFailed(f"the cluster did not take the job: {lines[-1].strip()}") from None
            time.sleep(1)


def _followed(client: JobSubmissionClient, job: Job) -> Job:
    """The job once it has ended, with its log on stderr until then."""
    shown = 0
    while True:
        shown = asyncio.run(_show(client, job.job_id, shown))
        try:
            info = client.get_job_info(job.job_id)
        except (RuntimeError, OSError) as error:
            raise TrainingFailed(f"{job.url} does not answer any more ({one_line(error)}); job {job.job_id}") from None
        if info.status in ENDED:
            if info.status == JobStatus.FAILED and info.driver_exit_code is None:
                _say(f"job {job.job_id} failed: {' '.join((info.message or '').split())[:500]}")
            return Job(job.job_id, job.url, info.status.value, info.driver_exit_code)
        time.sleep(0.5)


async def _show(client: JobSubmissionClient, job_id: str, skip: int) -> int:
    """Print the log from the character `skip` on while the connection lasts; returns how many are printed."""
    seen = 0
    # a connection that breaks is followed by another one, which begins at the beginning
    with contextlib.suppress(RuntimeError, OSError):
        async for text in client.tail_job_logs(job_id):
            sys.stderr.write(text[max(0, skip - seen) :])
            sys.stderr.flush()
            seen += len(text)
    return max(seen, skip)


def _say(text: str) -> None:
    sys.stderr.write(f"vae-ray: {text}\n")
