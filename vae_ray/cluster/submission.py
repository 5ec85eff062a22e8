"""`vae-ray submit`: run a command of this package as a Ray job, checked before it is sent and followed until it ends.

The job runs `python -m vae_ray COMMAND ...` with the cluster's Python, in a working directory of its own. Ray uploads
that directory and this package, each once for each content.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.job_submission import JobStatus, JobSubmissionClient

from vae_ray.cluster.dashboard import connect, describe_error
from vae_ray.config.sections.workers import WorkersConfig
from vae_ray.distributed import RAY_ENVIRONMENT
from vae_ray.distributed.resources import check_workers_fit
from vae_ray.errors import TrainingFailed, UserError, one_line
from vae_ray.storage.locations import is_uri, local_path, parse_location

AGENT_SECONDS = 60.0
STOP_SECONDS = "30"
"""How long a stopped job has for its last checkpoint; Ray's own default is 3."""
ENDED = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
PACKAGE = Path(__file__).parents[1]
LOCAL_NAMES = {
    ".git",
    ".venv",
    "venv",
    "__pycache__",
    "vae_ray",
    "data",
    "datasets",
    "runs",
    "results",
    "build",
    "dist",
}
"""Not uploaded from the top of a working directory. Ray leaves out what a .gitignore or .rayignore there names."""
EXCLUDES = ("__pycache__", "*.pyc", "*.egg-info", ".*_cache", ".hypothesis", ".ipynb_checkpoints", "node_modules")


@dataclass(frozen=True)
class Job:
    """A submitted job, and what `submit --json` prints; `exit_code` is None until it has ended by itself."""

    job_id: str
    address: str
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


class Detached(Exception):
    """Ctrl-C while following a job, which keeps running."""

    def __init__(self, job: Job) -> None:
        super().__init__(f"{job.job_id} keeps running; stop it with: ray job stop --address {job.address} {job.job_id}")
        self.job = job


def submit(
    arguments: Sequence[str],
    *,
    address: str | None,
    files: Mapping[str, Path],
    working_dir: str | Path | None = None,
    workers: WorkersConfig | None = None,
    environment: Mapping[str, str] | None = None,
    python: str = "python",
    follow: bool = True,
) -> Job:
    """Run `vae-ray ARGUMENTS` as a job of the cluster whose dashboard is at `address`; its log goes to stderr.

    The job's working directory has the `files` (name there: file or directory here) and a copy of `working_dir`. Raises
    `UserError` before anything is sent if the cluster cannot be reached, refuses the token or has too few resources;
    `Detached` at Ctrl-C.
    """
    directory = None if working_dir is None else local_path(working_dir, key="--working-dir")
    if directory is not None and not directory.is_dir():
        raise UserError(f"--working-dir: got '{working_dir}', which is not a directory")
    dashboard = connect(address)
    # a head that has just started lists no node yet, not even itself
    if workers is not None and workers.num != "auto" and (nodes := dashboard.nodes()):
        check_workers_fit(workers, nodes, where="the cluster")
    if dashboard.is_open:
        _print(f"warning: {dashboard.url} requires no token: anyone who can reach it can run code there")
    variables = {**RAY_ENVIRONMENT, "RAY_JOB_STOP_WAIT_TIME_S": STOP_SECONDS, **(environment or {})}
    command = [python, "-m", "vae_ray", *arguments]
    job_id = send(dashboard.client, command, working_dir=directory, files=files, environment=variables)
    job = Job(job_id, dashboard.url, status=JobStatus.PENDING.value)
    _print(f"job {job_id} at {dashboard.url}")
    try:
        return _followed(dashboard.client, job) if follow else job
    except KeyboardInterrupt:
        raise Detached(job) from None


def check_places(values: Mapping[str, Any]) -> None:
    """Raise `UserError` for a relative path among values by dotted keys: a job has another working directory."""
    values = {key.replace("-", "_"): value for key, value in values.items()}
    for key in ("run.storage", "data.root", "data.cache_dir"):
        place = values.get(key)
        if place is not None:
            check_place(key, str(place), flag="--storage" if key == "run.storage" else f"--{key.replace('_', '-')}")


def check_place(key: str, place: str, *, flag: str) -> None:
    """Raise `UserError` if `place` is a relative path: a job's working directory is removed with the job."""
    try:
        place = parse_location(place)
    except ValueError as error:
        raise UserError(f"{key}: got {place!r}, {error}") from None
    if not is_uri(place) and not place.startswith(("/", "~")):
        raise UserError(
            f"{key}: got {place!r}, relative to a directory of this machine; should be an absolute path that all nodes "
            f"of the cluster see, or a URI, for example {flag} /shared/{Path(place).name}"
        )


def send(
    client: JobSubmissionClient,
    command: Sequence[str],
    *,
    working_dir: Path | None = None,
    files: Mapping[str, Path] | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Submit `command` as a job; returns the job's id."""
    deadline = time.monotonic() + AGENT_SECONDS
    with tempfile.TemporaryDirectory(prefix="vae_ray-") as stage:
        top = [path for path in (working_dir.iterdir() if working_dir else ()) if path.name not in LOCAL_NAMES]
        for name, path in {**{path.name: path for path in top}, **(files or {})}.items():
            Path(stage, name).symlink_to(path.absolute())  # Ray follows it
        runtime_env = {
            "working_dir": stage,
            "py_modules": [str(PACKAGE)],
            "excludes": [*EXCLUDES, *_unsendable(Path(stage))],
            "env_vars": dict(environment or {}),
        }
        while True:
            try:
                return client.submit_job(entrypoint=shlex.join(command), runtime_env=runtime_env)
            except (RuntimeError, OSError) as error:
                if "status code 413" in str(error):
                    raise UserError(
                        "--working-dir: the cluster does not accept so large an upload (usually 100 MiB at most); name "
                        "what the job does not need in a .rayignore file there"
                    ) from None
                # a head node that has just started answers before it can run jobs
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    lines = [line for line in str(error).splitlines() if line.strip()]
                    raise TrainingFailed(f"the cluster did not accept the job: {lines[-1].strip()}") from None
                time.sleep(1)


def _unsendable(stage: Path) -> list[str]:
    """Patterns of what Ray cannot upload of `stage`, each with a warning; linked directories are followed.

    Ray waits for a pipe indefinitely, calls a name that is not UTF-8 a missing directory, and uploads a directory that
    links to itself forty times.
    """
    patterns = []
    for folder, folders, names in os.walk(stage, followlinks=True):
        for name in [*folders, *names]:
            path = Path(folder, name)
            real = path.readlink() if path.parent == stage else path.parent.resolve() / name
            if (why := _why_unsendable(path, real)) is None:
                continue
            _print(f"warning: {str(real)!r} {why}; it is not uploaded")
            patterns.append("/" + re.sub(r"[^\w./-]", "?", path.relative_to(stage).as_posix()))
            if name in folders:
                folders.remove(name)  # do not descend
    return patterns


def _why_unsendable(path: Path, real: Path) -> str | None:
    """What Ray cannot send about `path`, which is `real` without the links of its directories; None if it can."""
    if not path.name.isprintable():
        return "has a name that is not printable UTF-8"
    if not path.exists():
        return "is a link to nothing"
    if real.is_symlink() and real.resolve() in {*real.parents, *(parent.resolve() for parent in path.parents)}:
        return "is a link to a directory that contains it"
    if not path.is_dir() and not path.is_file():
        return "is a pipe, a socket or a device"
    return None if os.access(path, os.R_OK) else "cannot be read"


def _followed(client: JobSubmissionClient, job: Job) -> Job:
    """Copy the job's log to stderr until the job ends; returns the ended job."""
    printed = 0
    while True:
        printed = asyncio.run(_print_log(client, job.job_id, printed))
        try:
            info = client.get_job_info(job.job_id)
        except (RuntimeError, OSError) as error:
            raise TrainingFailed(
                f"{job.address} stopped answering ({describe_error(error)}); job {job.job_id}"
            ) from None
        if info.status in ENDED:
            if info.status == JobStatus.FAILED and info.driver_exit_code is None:
                _print(f"job {job.job_id} failed: {one_line(info.message or '')[:500]}")
            return Job(job.job_id, job.address, info.status.value, info.driver_exit_code)
        time.sleep(0.5)


async def _print_log(client: JobSubmissionClient, job_id: str, skip: int) -> int:
    """Print the log from the character `skip` on until the connection ends; returns how many have been printed."""
    read = 0  # each connection begins at the beginning of the log
    with contextlib.suppress(RuntimeError, OSError):
        async for text in client.tail_job_logs(job_id):
            sys.stderr.write(text[max(0, skip - read) :])
            sys.stderr.flush()
            read += len(text)
    return max(read, skip)


def _print(text: str) -> None:
    sys.stderr.write(f"vae-ray: {text}\n")
