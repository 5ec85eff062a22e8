"""The checks of `vae-ray doctor`: from facts about nodes to findings, each with what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from vae_ray.distributed.nodes import NodeAnswer

GIB = 2**30
CLOCK_WARNING_SECONDS = 2.0
CLOCK_ERROR_SECONDS = 300.0
"""Object stores refuse requests whose clock is off by 15 minutes; log lines of two nodes are out of order before."""
SHARED_MEMORY_BYTES = GIB // 4
"""Workers of one node add their gradients in /dev/shm, and Ray keeps its objects there."""
CACHE_BYTES = GIB
RAY_DISK_SHARE = 0.05
"""Ray refuses to write objects to a disk that is 95 % full."""


@dataclass(frozen=True)
class Finding:
    """One line of `vae-ray doctor`."""

    level: Literal["ok", "warning", "error"]
    subject: str
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.level:<8} {self.subject:<14} {self.text}" + (f": {self.advice}" if self.advice else "")

    def to_dict(self) -> dict[str, str]:
        """Plain data."""
        return asdict(self)


def run_checks(answers: Sequence[NodeAnswer], clock_offsets: Mapping[str, float]) -> list[Finding]:
    """The findings about nodes from their answers to `node_info.collect_node_info`, one a subject."""
    advice = "see its Ray logs and `ray status`"
    failed = [
        Finding("error", "nodes", f"{answer.address} did not answer ({answer.error})", advice)
        for answer in answers
        if answer.error is not None
    ]
    answers = [answer for answer in answers if answer.error is None]
    if not answers:
        return failed or [Finding("error", "nodes", "the cluster has no nodes", "start one: ray start --head")]
    checks = (_nodes, _versions, _gpus, _memory, _shared_memory, _temp, _cache)
    return [*failed, *(check(answers) for check in checks), *_clocks(answers, clock_offsets)]


def _nodes(answers: Sequence[NodeAnswer]) -> Finding:
    each = [
        f"{answer.address} ({_count(answer, 'CPU')} CPUs, {_count(answer, 'GPU')} GPUs, "
        f"{answer.result['memory']['total'] / GIB:.0f} GiB memory)"
        for answer in answers
    ]
    return Finding("ok", "nodes", f"{len(answers)}: {', '.join(each)}")


def _versions(answers: Sequence[NodeAnswer]) -> Finding:
    versions, problems = [], []
    for package in answers[0].result["versions"]:
        addresses: dict[str | None, list[str]] = {}
        for answer in answers:
            addresses.setdefault(answer.result["versions"][package], []).append(answer.address)
        if None in addresses:
            problems.append(f"{package} is not installed on {', '.join(addresses[None])}")
        elif len(addresses) > 1:
            each = [f"{version} on {', '.join(those)}" for version, those in addresses.items()]
            problems.append(f"{package} is {', '.join(each)}")
        else:
            versions.append(f"{package} {next(iter(addresses))}")
    if problems:
        return Finding("error", "versions", "; ".join(problems), "install constraints.txt on every node")
    return Finding("ok", "versions", ", ".join(versions))


def _gpus(answers: Sequence[NodeAnswer]) -> Finding:
    unused = [answer.address for answer in answers if answer.result["num_gpus"] and not answer.resources.get("GPU")]
    if unused:
        text = f"{', '.join(unused)} has GPUs that Ray was not started with"
        return Finding("warning", "gpus", text, "ray start --num-gpus N there")
    total = sum(answer.resources.get("GPU", 0) for answer in answers)
    return Finding("ok", "gpus", f"{total:g}" if total else "no GPU; training runs on CPUs")


def _memory(answers: Sequence[NodeAnswer]) -> Finding:
    least = min(answer.result["memory"]["available"] for answer in answers)
    low = _addresses(answers, lambda facts: facts["memory"]["available"] < GIB)
    if low:
        return Finding("warning", "memory", f"less than 1 GiB is free on {low}", "Ray kills workers when it runs out")
    return Finding("ok", "memory", f"at least {least / GIB:.1f} GiB free on every node")


def _shared_memory(answers: Sequence[NodeAnswer]) -> Finding:
    def is_small(facts: Mapping[str, Any]) -> bool:
        return facts["shared_memory"] is not None and facts["shared_memory"] < SHARED_MEMORY_BYTES

    if small := _addresses(answers, is_small):
        return Finding(
            "warning", "/dev/shm", f"is smaller than {SHARED_MEMORY_BYTES >> 20} MiB on {small}", "docker --shm-size=2g"
        )
    sizes = [size for answer in answers if (size := answer.result["shared_memory"]) is not None]
    return Finding("ok", "/dev/shm", f"at least {min(sizes) / GIB:.1f} GiB" if sizes else "this system has none")


def _temp(answers: Sequence[NodeAnswer]) -> Finding:
    path, advice = answers[0].result["temp"]["path"], "free some space, or use ray start --temp-dir DIR"
    if closed := _addresses(answers, lambda facts: not facts["temp"]["writable"]):
        return Finding("error", "disk", f"Ray's directory {path} cannot be written on {closed}", advice)
    if full := _addresses(answers, lambda facts: facts["temp"]["free"] < RAY_DISK_SHARE * facts["temp"]["total"]):
        return Finding("error", "disk", f"the disk of Ray's directory {path} is over 95 % full on {full}", advice)
    least = min(answer.result["temp"]["free"] for answer in answers)
    return Finding("ok", "disk", f"at least {least / GIB:.1f} GiB free for Ray on every node")


def _cache(answers: Sequence[NodeAnswer]) -> Finding:
    advice = "set VAE_RAY_CACHE where Ray is started, or --data.cache-dir DIR"
    path = answers[0].result["cache"]["path"]
    if closed := _addresses(answers, lambda facts: not facts["cache"]["writable"]):
        return Finding("error", "data cache", f"{path} cannot be written on {closed}", advice)
    if full := _addresses(answers, lambda facts: facts["cache"]["free"] < CACHE_BYTES):
        return Finding("warning", "data cache", f"{path} has less than {CACHE_BYTES >> 30} GiB free on {full}", advice)
    return Finding("ok", "data cache", f"{path} is writable on every node")


def _clocks(answers: Sequence[NodeAnswer], offsets: Mapping[str, float]) -> list[Finding]:
    of_others = {answer.address: offsets[answer.node_id] for answer in answers if answer.node_id in offsets}
    if not of_others:
        return []
    worst = max(of_others, key=lambda address: abs(of_others[address]))
    offset = of_others[worst]
    if abs(offset) < CLOCK_WARNING_SECONDS:
        return [Finding("ok", "clocks", f"agree within {CLOCK_WARNING_SECONDS:g} s")]
    level: Literal["warning", "error"] = "error" if abs(offset) > CLOCK_ERROR_SECONDS else "warning"
    text = f"{worst} is {abs(offset):.0f} s {'ahead' if offset > 0 else 'behind'}"
    return [Finding(level, "clocks", text, "run chrony or systemd-timesyncd on every node")]


def _addresses(answers: Sequence[NodeAnswer], holds: Callable[[Mapping[str, Any]], bool]) -> str:
    return ", ".join(answer.address for answer in answers if holds(answer.result))


def _count(answer: NodeAnswer, resource: str) -> str:
    return f"{answer.resources.get(resource, 0):g}"
