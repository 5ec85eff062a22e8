"""Runs a plain function once on every node of the connected cluster, and checks that the nodes share a storage.

Ray pickles a nested function by value. It pickles a function of a module by name: each node imports that module, or
fails where it is not installed.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vae_ray.errors import UserError, one_line

ANSWER_SECONDS = 30.0


@dataclass(frozen=True)
class NodeAnswer:
    """The answer of one node: the function's `result`, or one line of `error`."""

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
    """Run `function(*arguments)` on every alive node except the ids in `but`, concurrently; return all answers.

    Reserves no CPU, so that a busy cluster answers too. The answer of a node that fails, dies or does not answer within
    `timeout_seconds` has an `error`. Ray must be connected.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in but]
    references = [_start(node["NodeID"], function, arguments) for node in nodes]
    done, _ = ray.wait(references, num_returns=len(nodes), timeout=timeout_seconds) if nodes else ([], [])
    answers = []
    for node, reference in zip(nodes, references, strict=True):
        result: Any = None
        error: str | None = f"no answer within {timeout_seconds:g} s"
        if reference in done:
            result, error = _outcome(reference)
        else:
            ray.cancel(reference, force=True)
        answers.append(NodeAnswer(node["NodeID"], node["NodeManagerAddress"], dict(node["Resources"]), result, error))
    return answers


def check_shared_storage(directory: Path) -> None:
    """Raise `UserError` with the addresses of the nodes that do not see `directory` or cannot write there.

    The driver writes a marker that every other node must read, and reads the marker that each of them writes. Does
    nothing if the driver's node is the only one.
    """
    own = ray.get_runtime_context().get_node_id()
    if not any(node["Alive"] and node["NodeID"] != own for node in ray.nodes()):
        return
    # new names: a network file system has no stale entries for them
    markers, content = directory / f".vae_ray-probe-{secrets.token_hex(8)}", secrets.token_hex(16)
    path = str(markers)

    def exchange() -> tuple[str, str]:  # nested: a driver that is no job does not bring this package to the nodes
        """The name of this node's marker and no problem, or a problem."""
        import os
        import uuid

        try:
            with open(os.path.join(path, "driver"), encoding="utf-8") as file:
                if file.read() != content:
                    return "", "sees another directory under this path"
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
        problems = [f"{answer.address} {text}" for answer in answers if (text := _problem(answer, markers, content))]
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


def _problem(answer: NodeAnswer, markers: Path, content: str) -> str:
    if answer.error:
        return f"did not answer ({answer.error})"
    name, problem = answer.result
    if problem:
        return str(problem)
    with contextlib.suppress(OSError):
        if (markers / name).read_text(encoding="utf-8") == content:
            return ""
    return "writes to a directory that the driver does not see"


def _start(node_id: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> ray.ObjectRef:
    on_node = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(function).options(num_cpus=0, max_retries=0, scheduling_strategy=on_node).remote(*arguments)


def _outcome(reference: ray.ObjectRef) -> tuple[Any, str | None]:
    """The result and no error, or no result and one line of error."""
    try:
        return ray.get(reference), None
    except RayTaskError as error:
        cause = error.cause
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
        missing = next((line for line in reversed(lines) if "No module named" in line), None)
        if missing:  # the last line of Ray's page about functions that cannot be imported
            module = missing.rpartition("No module named ")[2].strip("'\" ")
            return None, f"its Python has no module {module!r}: install it there, or submit a job that brings it"
        return None, f"{type(cause).__name__}: {lines[0]}"
    except RayError as error:
        return None, f"{type(error).__name__}: {one_line(error)[:200]}"
