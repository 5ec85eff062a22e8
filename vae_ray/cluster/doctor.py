"""`vae-ray doctor`: what this machine or a cluster can run, and what stands in the way.

A cluster is examined from one of its nodes: by a process of this machine if it is one (`auto`, HOST:PORT), else by a
job, which is this same command there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import shlex
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray

from vae_ray.cluster import node_info
from vae_ray.cluster.checks import Finding, run_checks
from vae_ray.cluster.dashboard import (
    PROBE_SECONDS,
    TOKEN_ADVICE,
    answers_without_token,
    find_dashboard,
    job_client,
    one_line,
)
from vae_ray.cluster.submission import ENDED, check_place, send
from vae_ray.cluster.upload import collect
from vae_ray.distributed import nodes
from vae_ray.errors import TrainingFailed, UserError
from vae_ray.storage.locations import check_writable, directory_of, is_uri

CONNECT_SECONDS = 90.0
JOB_SECONDS = 180.0
OPEN_ADVICE = "run `ray get-auth-token --generate`, then restart every node with RAY_AUTH_MODE=token and that token"


@dataclass(frozen=True)
class Diagnosis:
    """All findings, and the facts about every node that they rest on."""

    address: str
    findings: list[Finding]
    nodes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_healthy(self) -> bool:
        """Whether nothing is an error."""
        return all(finding.level != "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """What `doctor --json` prints."""
        findings = [finding.to_dict() for finding in self.findings]
        return {"address": self.address, "healthy": self.is_healthy, "findings": findings, "nodes": self.nodes}


def examine(address: str | None, *, storage: str | None = None, python: str = "python") -> Diagnosis:
    """Examine the cluster at `address` (or $RAY_ADDRESS), else this machine; what goes wrong is a finding too.

    `http://HOST:8265` is a cluster's dashboard, `HOST:6379` or `auto` the one that this machine belongs to.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        if address is None:
            return _this_machine(storage)
        if address != "auto" and _is_dashboard(address):
            return _by_job(address, storage, python)
        return _by_connection(address, storage)
    except (UserError, TrainingFailed, OSError) as error:
        text = " ".join(str(error).removeprefix("address: ").split())
        return Diagnosis(address or "this machine", [Finding("error", "cluster", text)])


def _this_machine(storage: str | None) -> Diagnosis:
    answer = node_info.this_machine()
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    token = Finding("ok", "token", "a Ray that is started here asks for a token")
    if mode != "token":
        text = f"RAY_AUTH_MODE={mode}: a Ray that is started here lets anyone in"
        token = Finding("warning", "token", text, "unset RAY_AUTH_MODE")
    found = [*run_checks([answer], {}), token, *_storage(storage or "runs", several=False)]
    return Diagnosis("this machine", found, [_plain(answer)])


def _by_job(address: str, storage: str | None, python: str) -> Diagnosis:
    """Ask the cluster's head node, through a job, and add what only a client sees."""
    if storage:
        check_place("run.storage", storage, flag="--storage")
    dashboard = find_dashboard(address)
    client = job_client(dashboard)
    command = [python, "-m", "vae_ray", "doctor", "--address", "auto", "--json"]
    command += ["--storage", storage] if storage else []
    with tempfile.TemporaryDirectory(prefix="vae_ray-") as directory:
        archive = Path(directory, "vae_ray.zip")
        collect().write(archive)
        job_id = send(client, entrypoint=shlex.join(command), runtime_env={"working_dir": str(archive)})
    deadline = time.monotonic() + JOB_SECONDS
    while (status := client.get_job_status(job_id)) not in ENDED and time.monotonic() < deadline:
        time.sleep(0.5)
    log = client.get_job_logs(job_id)
    answer = _diagnosis_in(log)
    if answer is None:
        if status not in ENDED:
            client.stop_job(job_id)
        lines = [line.strip() for line in log.splitlines() if line.strip()]
        reason = lines[-1][:200] if lines else client.get_job_info(job_id).message or "no output"
        text = f"a job could not examine it ({reason})" if status in ENDED else f"no answer in {JOB_SECONDS:g} s"
        advice = f"does `{python}` there have constraints.txt installed (--python PATH)?" if status in ENDED else ""
        return Diagnosis(dashboard.url, [_token(dashboard.is_open), Finding("error", "job", text, advice)])
    found = [Finding(**finding) for finding in answer["findings"] if finding["subject"] != "token"]
    return Diagnosis(dashboard.url, [_token(dashboard.is_open), *found], answer["nodes"])


def _by_connection(address: str, storage: str | None) -> Diagnosis:
    """Connect to the cluster in a process of its own: Ray's connection may hang or take its process down."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile(prefix="vae_ray-") as complaints:
        arguments = (address, storage, there, complaints.name)
        process = context.Process(target=_examine_connected, args=arguments, daemon=True)
        process.start()
        there.close()
        try:
            answer = _received(here, Path(complaints.name), address)
        finally:
            process.kill()
            process.join()
    if isinstance(answer, str):
        raise UserError(answer)
    return Diagnosis(address, *answer)


def _received(answer: Connection, complaints: Path, address: str) -> Any:
    """What comes; `UserError` as soon as it is clear that nothing will."""
    deadline = time.monotonic() + CONNECT_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(EOFError):
            if answer.poll(0.25):
                return answer.recv()
            if b"Unauthenticated" not in complaints.read_bytes():  # Ray's core asks again for 20 s before it says so
                continue
            raise UserError(f"{address} refuses the token of this process, or it has none; {TOKEN_ADVICE}")
        raise UserError(
            f"{address}: Ray's connection died; is this machine one of its nodes? If not, try --address http://HOST:8265"
        )
    raise UserError(f"{address} does not answer within {CONNECT_SECONDS:g} s; is every node of it up?")


def _is_dashboard(address: str) -> bool:
    """Whether jobs are submitted at that address; raises `UserError` if nothing answers there."""
    if address.startswith(("http://", "https://")):
        return True
    parts = urlsplit(f"//{address}")
    try:
        host, port = (None, None) if "://" in address else (parts.hostname, parts.port)
    except ValueError:
        host, port = None, None
    if not host or not port:
        raise UserError(f"{address!r} is no address; should be HOST:6379, http://HOST:8265 or auto")
    try:
        socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
    except OSError as error:
        raise UserError(f"nothing answers at {host}:{port} ({one_line(error)}); is the cluster up?") from None
    with contextlib.suppress(OSError):
        answers_without_token(f"http://{host}:{port}")
        return True
    return False


def _examine_connected(address: str, storage: str | None, answer: Connection, complaints: str) -> None:
    """In the process of its own: send findings and nodes, or one line that says why not."""
    os.dup2(os.open(complaints, os.O_WRONLY), 2)  # Ray's core writes there what it tries
    try:
        context = ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
    except ray.exceptions.AuthenticationError:
        return answer.send(f"{address} wants a token that this process has not; {TOKEN_ADVICE}")
    except (RuntimeError, OSError, ValueError) as error:
        return answer.send(f"{address} cannot be used from this machine ({one_line(error)}); try http://HOST:8265")
    answers = nodes.on_every_node(node_info.collect_node_info())
    found = run_checks(answers, node_info.clock_offsets())
    found += _access(context.dashboard_url, answers)
    if storage:
        found += _storage(storage, several=len(answers) > 1)
    return answer.send((found, [_plain(each) for each in answers]))


def _access(dashboard_url: str | None, answers: Sequence[nodes.NodeAnswer]) -> list[Finding]:
    """Who may use the cluster, and from where: asked of the dashboard, else read from the nodes' own settings."""
    is_open = any(answer.error is None and answer.result["auth_mode"] != "token" for answer in answers)
    if not dashboard_url:
        return [_token(is_open)]
    with contextlib.suppress(OSError):  # bound to another node's loopback: then what the nodes say stands
        is_open = answers_without_token(f"http://{dashboard_url}")
    host = dashboard_url.rpartition(":")[0]
    if host in ("127.0.0.1", "localhost", "[::1]"):
        return [_token(is_open), Finding("ok", "dashboard", "listens on the head node alone")]
    text = f"listens on the network, at {dashboard_url}"
    if not is_open:
        return [_token(is_open), Finding("ok", "dashboard", text + ", and asks for the token")]
    advice = "start the head with --dashboard-host=127.0.0.1 and reach it by `ssh -L 8265:localhost:8265 HEAD`"
    return [_token(is_open), Finding("warning", "dashboard", text, advice)]


def _token(is_open: bool) -> Finding:
    if is_open:
        return Finding("error", "token", "none is asked for: anyone who reaches the cluster can run code", OPEN_ADVICE)
    return Finding("ok", "token", "the cluster asks for one")


def _storage(storage: str, *, several: bool) -> list[Finding]:
    """Whether runs can be stored there, by every node of several."""
    shown = "writable from every node" if several else "writable"
    try:
        if is_uri(storage):
            check_writable(storage)
            return _uri_from_nodes(storage) if several else [Finding("ok", "storage", f"{storage} is {shown}")]
        with _made(directory_of(storage)) as path:
            check_writable(str(path))
            if several:
                nodes.check_shared_storage(path)
    except UserError as error:
        return [Finding("error", "storage", str(error).removeprefix("run.storage: "))]
    except OSError as error:
        return [Finding("error", "storage", f"{storage} cannot be written ({error.strerror})", "--storage DIR|URI")]
    return [Finding("ok", "storage", f"{path} is {shown}")]


def _uri_from_nodes(uri: str) -> list[Finding]:
    """Every node writes to an object store for itself, with its own network and credentials."""

    def write() -> None:
        from vae_ray.storage.locations import check_writable

        check_writable(uri)

    failed = [answer for answer in nodes.on_every_node(write) if answer.error is not None]
    if not failed:
        return [Finding("ok", "storage", f"{uri} is writable from every node")]
    reasons = "; ".join(f"{answer.address}: {str(answer.error).removeprefix('UserError: ')}" for answer in failed)
    return [Finding("error", "storage", f"not all nodes can write to {uri} ({reasons})")]


@contextlib.contextmanager
def _made(path: Path) -> Iterator[Path]:
    """The directory, which is gone afterwards if it was not there before."""
    new = [parent for parent in (path, *path.parents) if not parent.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield path
    finally:
        for directory in new:
            with contextlib.suppress(OSError):
                directory.rmdir()


def _plain(answer: nodes.NodeAnswer) -> dict[str, Any]:
    facts_or_error = {"error": answer.error} if answer.error else answer.result
    return {"node_id": answer.node_id, "address": answer.address, "resources": answer.resources, **facts_or_error}


def _diagnosis_in(log: str) -> dict[str, Any] | None:
    """The diagnosis in a job's log."""
    start = log.find("\n{\n")
    if start < 0:
        return None
    try:
        answer, _ = json.JSONDecoder().raw_decode(log[start + 1 :])
    except ValueError:
        return None
    return answer if isinstance(answer, dict) and "findings" in answer else None
