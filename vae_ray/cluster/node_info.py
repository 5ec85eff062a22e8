"""Facts that every node of a cluster reports about itself, and how far its clock is off."""

from __future__ import annotations

import glob
import importlib.metadata
import os
import platform
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import ray
from ray._common.utils import get_default_ray_temp_dir

from vae_ray.distributed.nodes import NodeAnswer, on_every_node
from vae_ray.distributed.resources import memory_bytes, num_cpus

CHECKED_PACKAGES = ("torch", "ray")


def collect_node_info() -> dict[str, Any]:
    """The facts about the machine where this runs, as plain data."""
    temp_dir = ray.get_runtime_context().get_temp_dir() if ray.is_initialized() else get_default_ray_temp_dir()
    cache_dir = os.environ.get("VAE_RAY_CACHE") or os.path.expanduser("~/.cache/vae_ray")
    return {
        "host": socket.gethostname(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in CHECKED_PACKAGES}},
        "num_cpus": num_cpus(),
        "num_gpus": len(glob.glob("/dev/nvidia[0-9]*")),
        "memory": memory_bytes(),
        "shared_memory": shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None,
        "temp": _directory_info(Path(temp_dir)),
        "cache": _directory_info(Path(cache_dir)),
    }


def this_machine() -> NodeAnswer:
    """The facts about this machine, as if it were a node."""
    facts = collect_node_info()
    resources = {"CPU": float(facts["num_cpus"]), "GPU": float(facts["num_gpus"])}
    return NodeAnswer("", facts["host"], resources, facts)


def clock_offsets() -> dict[str, float]:
    """The least number of seconds by which each node's clock is ahead of ours (behind: negative), by node id.

    A difference within the time that the answer takes counts as 0, so ask nodes that have answered something else.
    """

    def now() -> float:  # Ray takes no builtin
        return time.time()

    before = time.time()
    answers = on_every_node(now)
    after = time.time()
    times = {answer.node_id: float(answer.result) for answer in answers if answer.error is None}
    return {node: t - after if t > after else min(0.0, t - before) for node, t in times.items()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _directory_info(path: Path) -> dict[str, Any]:
    """Of a directory, or of its nearest existing parent, in which it would be created."""
    existing = next((parent for parent in (path, *path.parents) if parent.exists()), path)
    usage = shutil.disk_usage(existing)
    return {
        "path": str(path),
        # the path is relative where no home directory exists
        "writable": path.is_absolute() and existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
        "free": usage.free,
        "total": usage.total,
    }
