"""Questions to every node of the connected cluster: a plain function runs once on each, and each answers.

A function nested in another one travels whole to the nodes (Ray pickles it by value). One from a module is looked up
there by name, which imports that module and its package, torch too, or fails where they are not installed.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vae_ray.errors import UserError

ANSWER_SECONDS = 30.0


@dataclass(frozen=True)
class NodeAnswer:
    """What one node answered: the function's `result`, or one line of `error` in its place."""

    node_id: str
    address: str
    resources: dict[str, float]
    result: Any = None
    error: str | None = None


def on_every_node(
    function: Callable[..., Any],
    *arguments: Any,
    timeout_seconds: float = ANSWER_SECONDS,
    but: Sequence[str] = (),
) -> list[NodeAnswer]:
    """The answer of every alive node, but those ids, to `function(*arguments)`; all of them at the same time.

    Takes no CPU from anybody, so that a busy cluster answers too. A node that fails, dies or says nothing for
    `timeout_seconds` has an answer with an `error`. Ray must be connected.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in but]
    asked = [_ask(node["NodeID"], function, arguments) for node in nodes]
    with_timeout, _ = ray.wait(asked, num_returns=len(asked), timeout=timeout_seconds) if asked else ([], [])
    answers = []
    for node, reference in zip(nodes, asked, strict=True):
        result: Any = None
        error: str | None = f"no answer within {timeout_seconds:g} s"
        if reference in with_timeout:
            result, error = _outcome(reference)
        else:
            ray.cancel(reference, force=True)
        answers.append(NodeAnswer(node["NodeID"], node["NodeManagerAddress"], dict(node["Resources"]), result, error))
    return answers


def max_workers_fitting(nodes: Sequence[Mapping[str, float]], each: Mapping[str, float]) -> int:
    """How many workers that need `each` all nodes together have room for; a worker's resources are of one node."""
    return sum(int(min(node.get(kind, 0) // amount for kind, amount in each.items())) for node in nodes)


def check_shared_storage(directory: Path) -> None:
    """Raise `UserError`, naming the nodes, unless all nodes of the cluster share `directory` and can write there.

    The driver leaves a marker that every other node must read, and reads the one that each of them leaves. Where
    there is no other node, nothing runs.
    """
    own = ray.get_runtime_context().get_node_id()
    if not any(node["Alive"] and node["NodeID"] != own for node in ray.nodes()):
        return
    # names that nobody has looked up before: a network file system has nothing stale to say about them
    markers, content = directory / f".vae_ray-probe-{secrets.token_hex(8)}", secrets.token_hex(16)
    path = str(markers)

    def exchange() -> tuple[str, str]:
        """The name of this node's marker and no complaint, or a complaint."""
        import os
        import uuid

        try:
            with open(os.path.join(path, "driver"), encoding="utf-8") as file:
                if file.read() != content:
                    return "", "sees another one under this path"
        except OSError as error:
            return "", f"cannot see it ({error.strerror})"
        name = uuid.uuid4().hex
        try:
            with open(os.path.join(path, name), "w", encoding="utf-8") as file:
                file.write(content)
        except OSError as error:
            return "", f"cannot write it ({error.strerror})"
        return name, ""

    try:
        markers.mkdir(parents=True)
        markers.chmod(0o777)  # nodes may run as other users
        (markers / "driver").write_text(content, encoding="utf-8")
        answers = on_every_node(exchange, but=[own])
        complaints = [
            f"{answer.address} {text}" for answer in answers if (text := _complaint(answer, markers, content))
        ]
    except OSError as error:
        raise UserError(
            f"run.storage: got '{directory}', cannot be written ({error.strerror}); try --storage DIR"
        ) from None
    finally:
        shutil.rmtree(markers, ignore_errors=True)
    if complaints:
        raise UserError(
            f"run.storage: got '{directory}', which not all nodes of the cluster share: {', '.join(complaints)}; try a "
            "directory that every node sees and may write, or --storage s3://BUCKET/runs"
        )


def _complaint(answer: NodeAnswer, markers: Path, content: str) -> str:
    if answer.error:
        return f"did not say ({answer.error})"
    name, complaint = answer.result
    if complaint:
        return str(complaint)
    with contextlib.suppress(OSError):
        if (markers / name).read_text(encoding="utf-8") == content:
            return ""
    return "writes to a place that the driver does not see"


def _ask(node_id: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> ray.ObjectRef:
    where = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=where).remote(*arguments)


def _outcome(reference: ray.ObjectRef) -> tuple[Any, str | None]:
    """The result and no error, or none and one line."""
    try:
        return ray.get(reference), None
    except RayTaskError as error:
        cause = error.cause
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
        missing = next((line for line in reversed(lines) if "No module named" in line), None)
        if missing:  # Ray hides it at the end of a page about functions that could not be imported
            module = missing.rpartition("No module named ")[2].strip("'\" ")
            return (
                None,
                f"Python there has no module {module!r}: install it on that node, or submit a job that brings it",
            )
        return None, f"{type(cause).__name__}: {lines[0]}"
    except RayError as error:
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
