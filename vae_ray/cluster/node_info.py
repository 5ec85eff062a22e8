"""What a node is: the facts that every node of a cluster reports about itself, and how far its clock is off."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from vae_ray.distributed.nodes import NodeAnswer, on_every_node

CHECKED_PACKAGES = ("torch", "ray")


def collect_node_info(cache_dir: str | None = None) -> Callable[[], dict[str, Any]]:
    """A function that returns the facts about the machine where it runs, as plain data.

    It is nested, and imports what it needs inside, so that Ray brings it whole to nodes that have not this package.
    """
    packages = CHECKED_PACKAGES

    def facts() -> dict[str, Any]:
        import glob
        import importlib
        import importlib.metadata
        import os
        import platform
        import shutil
        import socket
        from pathlib import Path

        def version(package: str) -> str | None:
            try:
                return importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                return None

        def our_version() -> str | None:
            try:
                return str(importlib.import_module("vae_ray.version").VERSION)
            except ImportError:
                return None

        def memory_bytes() -> dict[str, int]:
            lines = Path("/proc/meminfo").read_text().splitlines() if os.path.exists("/proc/meminfo") else []
            fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
            return {"total": fields.get("MemTotal", 0), "available": fields.get("MemAvailable", 0)}

        def place(path: Path) -> dict[str, Any]:
            """Of a directory, or of the nearest existing one above it, where it would be made."""
            existing = next((parent for parent in (path, *path.parents) if parent.exists()), path)
            usage = shutil.disk_usage(existing)
            return {
                "path": str(path),
                "writable": existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
                "free": usage.free,
                "total": usage.total,
            }

        cache = Path(cache_dir or os.environ.get("VAE_RAY_CACHE") or Path.home() / ".cache" / "vae_ray")
        return {
            "host": socket.gethostname(),
            "versions": {
                "python": platform.python_version(),
                "vae_ray": our_version(),
                **{package: version(package) for package in packages},
            },
            "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "num_gpus": len(glob.glob("/dev/nvidia[0-9]*")),
            "memory": memory_bytes(),
            "shared_memory": shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None,
            "temp": place(Path("/tmp")),
            "cache": place(cache),
            "auth_mode": os.environ.get("RAY_AUTH_MODE"),
        }

    return facts


def this_machine(cache_dir: str | None = None) -> NodeAnswer:
    """The facts about this machine, as if it were a node; no Ray is needed."""
    facts = collect_node_info(cache_dir)()
    resources = {"CPU": float(facts["num_cpus"]), "GPU": float(facts["num_gpus"])}
    return NodeAnswer("", facts["host"], resources, facts)


def clock_offsets() -> dict[str, float]:
    """Seconds by which each node's clock is surely ahead of ours (or behind: negative), by node id; 0 for as good as.

    Ask after the nodes have answered something else: the time that an answer takes is what cannot be told.
    """

    def now() -> float:
        import time

        return time.time()

    before = time.time()
    answers = on_every_node(now)
    after = time.time()
    times = {answer.node_id: float(answer.result) for answer in answers if answer.error is None}
    return {node: t - after if t > after else min(0.0, t - before) for node, t in times.items()}
