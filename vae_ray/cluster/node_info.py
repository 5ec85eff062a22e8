"""What `vae-ray doctor` collects: facts about each node, how far its clock is off, and whether it can write a storage.

Run on a cluster as a job, `python -m vae_ray.cluster.node_info [STORAGE]`, which brings this package to all nodes. It
prints one line: `ANSWER` and JSON.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray._common.utils import get_system_memory  # knows a container's limit, unlike psutil

from vae_ray.distributed.nodes import NodeAnswer, check_shared_storage, on_every_node
from vae_ray.distributed.ray_temp_dir import default_temp_dir, temp_dir_problem
from vae_ray.errors import UserError
from vae_ray.storage.filesystems import check_writable, missing_directories, removed_if_empty
from vae_ray.storage.locations import absolute, cache_root, is_uri

ANSWER = "vae-ray examination: "


def examine_cluster(storage: str | None) -> dict[str, Any]:
    """The facts about all nodes of the cluster where this job runs, and the problem with `storage`, if there is one."""
    ray.init(log_to_driver=False, logging_level=logging.CRITICAL)
    nodes = [
        {"node_id": answer.node_id, "address": answer.address, "resources": answer.resources}
        | ({"error": answer.error} if answer.error else answer.result)
        for answer in on_every_node(collect_node_info)
    ]
    offsets = clock_offsets()
    for node in nodes:
        node["clock_offset"] = offsets.get(node["node_id"], 0.0)
    return {"nodes": nodes, "storage_problem": storage_problem(storage) if storage else ""}


def collect_node_info() -> dict[str, Any]:
    """The facts about the machine where this runs, as plain data."""
    if ray.is_initialized():
        temp_dir = Path(ray.get_runtime_context().get_temp_dir())
        problem = "" if os.access(temp_dir, os.W_OK | os.X_OK) else "cannot be written"
    else:
        problem = temp_dir_problem(temp_dir := default_temp_dir())
    return {
        "host": socket.gethostname(),
        "versions": {"python": platform.python_version(), "torch": _version("torch"), "ray": _version("ray")},
        "shared_memory": shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None,
        "memory": get_system_memory(),
        "temp": {**_directory_info(temp_dir), "problem": problem},
        "cache": _directory_info(cache_root()),
    }


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


def storage_problem(storage: str) -> str:
    """Why this machine, or a node of the connected cluster, cannot write to `storage`; empty if all can.

    Leaves nothing there.
    """
    failed = list[NodeAnswer]()
    try:
        storage = absolute(storage, key="run.storage")
        check_writable(storage)
        if ray.is_initialized() and is_uri(storage):  # each node writes itself, with its own network and credentials
            failed = [answer for answer in on_every_node(check_writable, storage) if answer.error is not None]
        elif ray.is_initialized():
            with removed_if_empty(missing_directories(Path(storage))):
                check_shared_storage(Path(storage))
    except UserError as error:
        return str(error).removeprefix("run.storage: ")
    return "; ".join(f"{answer.address}: {answer.error}" for answer in failed)


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _directory_info(path: Path) -> dict[str, Any]:
    """Of a directory, or of its nearest existing parent, in which it would be created."""
    existing = next((parent for parent in (path, *path.parents) if parent.exists()), path)
    usage = shutil.disk_usage(existing)
    writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    return {"path": str(path), "writable": writable, "free": usage.free, "total": usage.total}


if __name__ == "__main__":
    sys.stdout.write(f"\n{ANSWER}{json.dumps(examine_cluster(sys.argv[1] if len(sys.argv) > 1 else None))}\n")
