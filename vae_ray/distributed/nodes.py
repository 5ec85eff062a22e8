"""Runs a plain function once on every node of the connected cluster, and checks that the nodes share a storage.

Ray pickles a nested function by value. It pickles a function of a module by name: each node imports that module, or
fails where it is not installed.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vae_ray.errors import UserError

ANSWER_SECONDS = 30.0


@dataclass
class NodeAnswer:
    """The answer of one node: the function's `result`, or one line of `error`."""

    node_id: str
    address: str
    resources: dict[str, float]
    result: Any = None
    error: str | None = None


def on_every_node(function: Callable[..., Any], *arguments: Any) -> list[NodeAnswer]:
    """Run `function(*arguments)` on every alive node, concurrently; return all answers.

    Reserves no CPU, so that a busy cluster answers too. The answer of a node that fails, dies or takes longer than
    `ANSWER_SECONDS` has an `error`. Ray must be connected.
    """
    tasks: dict[ray.ObjectRef, NodeAnswer] = {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            answer = NodeAnswer(node["NodeID"], node["NodeManagerAddress"], dict(node["Resources"]))
            tasks[task.remote(*arguments)] = answer
    done, late = ray.wait(list(tasks), num_returns=len(tasks), timeout=ANSWER_SECONDS)
    for reference in done:
        try:
            tasks[reference].result = ray.get(reference)
        except RayError as error:
            cause = getattr(error, "cause", error)  # of a RayTaskError
            lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
            tasks[reference].error = ": ".join([type(cause).__name__, *lines[-1:]])
    for reference in late:
        ray.cancel(reference, force=True)
        tasks[reference].error = f"no answer within {ANSWER_SECONDS:g} s"
    return list(tasks.values())


def check_shared_storage(directory: Path) -> None:
    """Raise `UserError` with the addresses of the nodes that do not see `directory` or cannot write there.

    The driver writes a marker that every node must read, and reads the marker that each of them writes. Does nothing
    on a cluster of one node, which is the driver's.
    """
    if sum(node["Alive"] for node in ray.nodes()) < 2:
        return
    # new names: a network file system has no stale entries for them
    markers, content = directory / f".vae_ray-probe-{secrets.token_hex(8)}", secrets.token_hex(16)

    def exchange() -> str:  # nested: a driver that is no job does not bring this package to the nodes
        """Read the driver's marker and write this node's; return the problem, if there is one."""
        verb = "see"
        try:
            if (markers / "driver").read_text(encoding="utf-8") != content:
                return "sees another directory under this path"
            verb = "write"
            (markers / ray.get_runtime_context().get_node_id()).write_text(content, encoding="utf-8")
        except OSError as error:
            return f"cannot {verb} it ({error.strerror})"
        return ""

    problems = []
    try:
        markers.mkdir(parents=True)
        markers.chmod(0o777)  # nodes may run as other users
        (markers / "driver").write_text(content, encoding="utf-8")
        for answer in on_every_node(exchange):
            problem = f"did not answer ({answer.error})" if answer.error else answer.result
            if not problem and not (markers / answer.node_id).is_file():
                problem = "writes to a directory that the driver does not see"
            problems += [f"{answer.address} {problem}"] if problem else []
    except OSError as error:
        raise UserError(
            f"run.storage: got '{directory}', cannot be written ({error.strerror}); try --storage DIR"
        ) from None
    finally:
        shutil.rmtree(markers, ignore_errors=True)
    if problems:
        raise UserError(
            f"run.storage: got '{directory}', which not all nodes of the cluster share: {', '.join(problems)}; try a "
            "directory that every node sees and may write to, or --storage s3://BUCKET/runs"
        )
