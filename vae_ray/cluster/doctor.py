"""`vae-ray doctor`: check this machine, or a cluster, and report problems, each with what to do.

`node_info` collects the facts: here, or as a job on one node of a cluster. This module judges them.
"""

from __future__ import annotations

import glob
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ray.job_submission import JobSubmissionClient

from vae_ray.cluster.dashboard import connect
from vae_ray.cluster.node_info import ANSWER, collect_node_info, storage_problem
from vae_ray.cluster.submission import ENDED, check_place, send
from vae_ray.errors import TrainingFailed, UserError, one_line
from vae_ray.machine import num_local_cpus

GIB = 2**30
JOB_SECONDS = 180.0
CLOCK_WARNING_SECONDS, CLOCK_ERROR_SECONDS = 2.0, 300.0
"""Object stores refuse requests whose clock is off by 15 minutes; log lines of two nodes are out of order before."""
SHARED_MEMORY_BYTES = GIB // 4
"""Workers of one node add their gradients in /dev/shm, and Ray keeps its objects there."""
RAY_DISK_SHARE = 0.05
"""Ray refuses to write objects to a disk that is 95 % full."""
CACHE_BYTES = GIB
OPEN_ADVICE = "run `ray get-auth-token --generate`, then restart every node with RAY_AUTH_MODE=token and that token"

Node = Mapping[str, Any]
"""The facts about one node, from `node_info`."""


@dataclass(frozen=True)
class Finding:
    """One line of `vae-ray doctor`."""

    level: Literal["ok", "warning", "error"]
    subject: str
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.level:<8} {self.subject:<14} {self.text}" + (f": {self.advice}" if self.advice else "")


@dataclass(frozen=True)
class Diagnosis:
    """All findings, and the facts about every node from which they follow."""

    address: str
    findings: list[Finding]
    nodes: Sequence[Node] = field(default_factory=list)

    @property
    def is_healthy(self) -> bool:
        """Whether nothing is an error."""
        return all(finding.level != "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """What `doctor --json` prints."""
        return {**asdict(self), "healthy": self.is_healthy}


def examine(address: str | None, *, storage: str | None = None, python: str = "python") -> Diagnosis:
    """Examine the cluster whose dashboard is at `address` (or $RAY_ADDRESS), else this machine.

    What prevents the examination is a finding too. `auto` is a cluster whose head is this machine; `python` is the
    command that runs Python on the cluster.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        return _cluster(address, storage, python) if address else _this_machine(storage or "runs")
    except (UserError, TrainingFailed, OSError) as error:
        text = one_line(str(error).removeprefix("address: "))
        return Diagnosis(address or "this machine", [Finding("error", "cluster", text)])


def _this_machine(storage: str) -> Diagnosis:
    facts = collect_node_info()
    resources = {"CPU": num_local_cpus(), "GPU": len(glob.glob("/dev/nvidia[0-9]*"))}
    node = {"node_id": "", "address": facts["host"], "resources": resources, **facts}
    token = Finding("ok", "token", "a Ray that vae-ray starts here requires a token")
    if (mode := os.environ.get("RAY_AUTH_MODE", "token")) != "token":
        text = f"RAY_AUTH_MODE={mode}: a Ray that is started here requires no token"
        token = Finding("warning", "token", text, "unset RAY_AUTH_MODE")
    storage_finding = _storage(storage, storage_problem(storage), num_nodes=1)
    return Diagnosis("this machine", [*node_findings([node]), token, storage_finding], [node])


def _cluster(address: str, storage: str | None, python: str) -> Diagnosis:
    if storage:
        check_place("run.storage", storage, flag="--storage")
    dashboard = connect(address)
    token = Finding("ok", "token", "the cluster requires a token")
    if dashboard.is_open:
        text = "authentication is off: anyone who can reach the cluster can run code"
        token = Finding("error", "token", text, OPEN_ADVICE)
    answer = _examined_by_job(dashboard.client, storage, python)
    if isinstance(answer, Finding):
        return Diagnosis(dashboard.url, [token, answer])
    nodes = answer["nodes"]
    findings = [*node_findings(nodes), token]
    findings += [_storage(storage, answer["storage_problem"], num_nodes=len(nodes))] if storage else []
    return Diagnosis(dashboard.url, findings, nodes)


def _examined_by_job(client: JobSubmissionClient, storage: str | None, python: str) -> dict[str, Any] | Finding:
    """The answer of a job that runs `node_info` on the cluster, or a finding about why there is none."""
    job_id = send(client, [python, "-m", "vae_ray.cluster.node_info", *([storage] if storage else [])])
    deadline = time.monotonic() + JOB_SECONDS
    while (status := client.get_job_status(job_id)) not in ENDED and time.monotonic() < deadline:
        time.sleep(0.5)
    lines = [line.strip() for line in client.get_job_logs(job_id).splitlines() if line.strip()]
    for line in lines:
        if line.startswith(ANSWER):
            return dict(json.loads(line.removeprefix(ANSWER)))
    if status not in ENDED:
        client.stop_job(job_id)
        return Finding("error", "job", f"no answer within {JOB_SECONDS:g} s", "see `ray status` on the head node")
    reason = lines[-1][:200] if lines else client.get_job_info(job_id).message or "no output"
    advice = f"`{python}` there needs the packages of constraints.txt; try --python PATH"
    return Finding("error", "job", f"a job could not examine the cluster ({reason})", advice)


def _storage(storage: str, problem: str, *, num_nodes: int) -> Finding:
    if problem:
        return Finding("error", "storage", problem)
    return Finding("ok", "storage", f"{storage} is writable{' from every node' if num_nodes > 1 else ''}")


def node_findings(nodes: Sequence[Node]) -> list[Finding]:
    """The findings about nodes, one for each subject and one for each node that did not answer."""
    failed = [
        Finding("error", "nodes", f"{node['address']} did not answer ({node['error']})", "see its Ray logs")
        for node in nodes
        if "error" in node
    ]
    nodes = [node for node in nodes if "error" not in node]
    checks = (_nodes, _versions, _shared_memory, _disk, _cache, *([_clocks] if len(nodes) > 1 else []))
    return [*failed, *(check(nodes) for check in checks if nodes)]


def _nodes(nodes: Sequence[Node]) -> Finding:
    each = [
        f"{node['address']} ({node['resources'].get('CPU', 0):g} CPUs, {node['resources'].get('GPU', 0):g} GPUs, "
        f"{node['memory'] / GIB:.1f} GiB of memory)"
        for node in nodes
    ]
    return Finding("ok", "nodes", f"{len(nodes)}: {', '.join(each)}")


def _versions(nodes: Sequence[Node]) -> Finding:
    versions, problems = [], []
    for package in nodes[0]["versions"]:
        addresses: dict[str, list[str]] = {}
        for node in nodes:
            addresses.setdefault(node["versions"][package] or "missing", []).append(node["address"])
        if len(addresses) > 1 or "missing" in addresses:
            each = [f"{version} on {', '.join(those)}" for version, those in addresses.items()]
            problems.append(f"{package} is {', '.join(each)}")
        versions.append(f"{package} {next(iter(addresses))}")
    if problems:
        return Finding("error", "versions", "; ".join(problems), "install constraints.txt on every node")
    return Finding("ok", "versions", ", ".join(versions))


def _shared_memory(nodes: Sequence[Node]) -> Finding:
    sizes = {node["address"]: node["shared_memory"] for node in nodes if node["shared_memory"] is not None}
    if small := ", ".join(address for address, size in sizes.items() if size < SHARED_MEMORY_BYTES):
        text = f"is smaller than {SHARED_MEMORY_BYTES >> 20} MiB on {small}"
        return Finding("warning", "/dev/shm", text, "docker --shm-size=2g")
    return Finding("ok", "/dev/shm", f"at least {min(sizes.values()) / GIB:.1f} GiB" if sizes else "there is none")


def _disk(nodes: Sequence[Node]) -> Finding:
    advice = "set RAY_TMPDIR, or use ray start --temp-dir DIR: a short path on a disk with free space"
    if problems := [f"{node['temp']['path']} {node['temp']['problem']}" for node in nodes if node["temp"]["problem"]]:
        closed = _addresses(nodes, lambda node: bool(node["temp"]["problem"]))
        return Finding("error", "disk", f"Ray's directory {problems[0]} on {closed}", advice)
    path = nodes[0]["temp"]["path"]
    if full := _addresses(nodes, lambda node: node["temp"]["free"] < RAY_DISK_SHARE * node["temp"]["total"]):
        return Finding("error", "disk", f"the disk of Ray's directory {path} is over 95 % full on {full}", advice)
    least = min(node["temp"]["free"] for node in nodes)
    return Finding("ok", "disk", f"at least {least / GIB:.1f} GiB free for Ray on every node")


def _cache(nodes: Sequence[Node]) -> Finding:
    path, advice = nodes[0]["cache"]["path"], "set VAE_RAY_CACHE where Ray is started, or --data.cache-dir DIR"
    if closed := _addresses(nodes, lambda node: not node["cache"]["writable"]):
        return Finding("error", "data cache", f"{path} cannot be written on {closed}", advice)
    if full := _addresses(nodes, lambda node: node["cache"]["free"] < CACHE_BYTES):
        return Finding("warning", "data cache", f"{path} has less than {CACHE_BYTES >> 30} GiB free on {full}", advice)
    return Finding("ok", "data cache", f"{path} is writable on every node")


def _clocks(nodes: Sequence[Node]) -> Finding:
    worst = max(nodes, key=lambda node: abs(node["clock_offset"]))
    offset = worst["clock_offset"]
    if abs(offset) < CLOCK_WARNING_SECONDS:
        return Finding("ok", "clocks", f"agree within {CLOCK_WARNING_SECONDS:g} s")
    text = f"{worst['address']} is {abs(offset):.0f} s {'ahead' if offset > 0 else 'behind'}"
    level: Literal["warning", "error"] = "error" if abs(offset) > CLOCK_ERROR_SECONDS else "warning"
    return Finding(level, "clocks", text, "run chrony or systemd-timesyncd on every node")


def _addresses(nodes: Iterable[Node], has_problem: Callable[[Node], bool]) -> str:
    return ", ".join(node["address"] for node in nodes if has_problem(node))
