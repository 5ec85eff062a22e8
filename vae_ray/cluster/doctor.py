"""`vae-ray doctor`: check this machine, or a cluster, and report problems.

A cluster is examined by a job on one of its nodes (`examination.py`); its facts are judged here (`checks.py`).
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from typing import Any

from vae_ray.cluster.checks import Finding, run_checks
from vae_ray.cluster.dashboard import find_dashboard, job_client
from vae_ray.cluster.examination import ANSWER
from vae_ray.cluster.node_info import this_machine
from vae_ray.cluster.storage_check import check_storage
from vae_ray.cluster.submission import ENDED, check_place, send
from vae_ray.cluster.upload import collect
from vae_ray.distributed.nodes import NodeAnswer
from vae_ray.errors import TrainingFailed, UserError, one_line

JOB_SECONDS = 180.0
OPEN_ADVICE = "run `ray get-auth-token --generate`, then restart every node with RAY_AUTH_MODE=token and that token"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True)
class Diagnosis:
    """All findings, and the facts about every node from which they follow."""

    address: str
    findings: list[Finding]
    nodes: list[NodeAnswer] = field(default_factory=list)

    @property
    def is_healthy(self) -> bool:
        """Whether nothing is an error."""
        return all(finding.level != "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """What `doctor --json` prints."""
        findings = [finding.to_dict() for finding in self.findings]
        nodes = [
            {"node_id": node.node_id, "address": node.address, "resources": node.resources}
            | ({"error": node.error} if node.error else node.result)
            for node in self.nodes
        ]
        return {"address": self.address, "healthy": self.is_healthy, "findings": findings, "nodes": nodes}


def examine(address: str | None, *, storage: str | None = None, python: str = "python") -> Diagnosis:
    """Examine the cluster whose dashboard is at `address` (or $RAY_ADDRESS), else this machine.

    What prevents the examination is a finding too. `auto` is a cluster whose head is this machine; `python` is the
    command that runs Python on the cluster.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        return _cluster(address, storage, python) if address else _this_machine(storage)
    except (UserError, TrainingFailed, OSError) as error:
        text = one_line(str(error).removeprefix("address: "))
        return Diagnosis(address or "this machine", [Finding("error", "cluster", text)])


def _this_machine(storage: str | None) -> Diagnosis:
    node = this_machine()
    token = Finding("ok", "token", "a Ray that is started here requires a token")
    if (mode := os.environ.get("RAY_AUTH_MODE", "token")) != "token":
        text = f"RAY_AUTH_MODE={mode}: a Ray that is started here requires no token"
        token = Finding("warning", "token", text, "unset RAY_AUTH_MODE")
    return Diagnosis("this machine", [*run_checks([node], {}), token, check_storage(storage or "runs")], [node])


def _cluster(address: str, storage: str | None, python: str) -> Diagnosis:
    if storage:
        check_place("run.storage", storage, flag="--storage")
    dashboard = find_dashboard(address)
    client = job_client(dashboard)
    command = [python, "-m", "vae_ray.cluster.examination", *([storage] if storage else [])]
    job_id = send(client, command, collect())
    deadline = time.monotonic() + JOB_SECONDS
    while (status := client.get_job_status(job_id)) not in ENDED and time.monotonic() < deadline:
        time.sleep(0.5)
    lines = [line.strip() for line in client.get_job_logs(job_id).splitlines() if line.strip()]
    answer = next((json.loads(line.removeprefix(ANSWER)) for line in lines if line.startswith(ANSWER)), None)
    if answer is None:
        text, advice = f"no answer within {JOB_SECONDS:g} s", "see `ray status` on the head node"
        if status in ENDED:
            reason = lines[-1][:200] if lines else client.get_job_info(job_id).message or "no output"
            text = f"a job could not examine the cluster ({reason})"
            advice = f"`{python}` there needs the packages of constraints.txt; try --python PATH"
        else:
            client.stop_job(job_id)
        return Diagnosis(dashboard.url, [_token(dashboard.is_open), Finding("error", "job", text, advice)])
    nodes = [NodeAnswer(**node) for node in answer["nodes"]]
    findings = [*run_checks(nodes, answer["clock_offsets"]), _token(dashboard.is_open)]
    findings += [_dashboard(answer["dashboard"], dashboard.is_open)] if answer["dashboard"] else []
    findings += [Finding(**answer["storage"])] if answer["storage"] else []
    return Diagnosis(dashboard.url, findings, nodes)


def _token(is_open: bool) -> Finding:
    if is_open:
        text = "authentication is off: anyone who can reach the cluster can run code"
        return Finding("error", "token", text, OPEN_ADVICE)
    return Finding("ok", "token", "the cluster requires a token")


def _dashboard(url: str, is_open: bool) -> Finding:
    """Who can reach the dashboard and the job API."""
    if url.rpartition(":")[0] in LOOPBACK:
        return Finding("ok", "dashboard", "listens on the head node's loopback only")
    text = f"listens on the network, at {url}"
    if not is_open:
        return Finding("ok", "dashboard", text + ", and requires the token")
    advice = "start the head with --dashboard-host=127.0.0.1 and reach it by `ssh -L 8265:localhost:8265 HEAD`"
    return Finding("warning", "dashboard", text, advice)
