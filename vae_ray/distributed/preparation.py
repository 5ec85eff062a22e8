"""Preparing a data set on all nodes of a Ray cluster: each part of the source is a Ray task.

Every node reads the source and writes the data set by itself. A node that sees another directory there, or none, would
count every file as unreadable and skip it: so each one first reads one image that the driver has read too, and a marker
that the driver has written. Processes that decode import this module: it imports no torch.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import RayError

from vae_ray.data.decoding import ImageRules
from vae_ray.data.preparation import PART_PREFIX, PartRecord, Plan, Task, prepare, run_task
from vae_ray.data.rows import Part, Source
from vae_ray.data.shards import Description
from vae_ray.distributed.failures import first_cause
from vae_ray.distributed.nodes import on_every_node
from vae_ray.distributed.resources import alive_resources, may_grow
from vae_ray.errors import TrainingFailed, UserError, WorkersFailed, one_line
from vae_ray.storage.directory import Directory, open_directory
from vae_ray.storage.locations import absolute
from vae_ray.storage.retry import describe_os_error

logger = logging.getLogger(__name__)

TASKS_PER_CPU = 2
"""In flight: the next task is on its node when a CPU becomes free."""
MAX_RETRIES = 3
"""Of a task whose process or node died."""
PATIENCE_SECONDS: float | None = 30.0
"""A preparation that has done nothing for so long says why that may be."""
STOP_SECONDS = 10.0
"""How long a preparation that ends early waits for the parts that are being decoded."""
NUM_TRIED = 100
"""Images from the beginning among which the driver looks for one that it can read."""


def prepare_on_cluster(
    plan: Plan, location: str, *, progress: Callable[[int, int | None], None] | None = None
) -> Description:
    """`preparation.prepare` with all nodes of the cluster to which this process is connected, or in `RAY_ADDRESS`.

    Raises `UserError` if the cluster cannot be reached, or not all nodes see the source and `location`;
    `TrainingFailed` if it could not finish. What was decoded is kept, and the next call continues.
    """
    location = absolute(location, key="--out")  # tasks run in other working directories
    if plan.source.in_process:
        return prepare(plan, location, run=run_on_ray, progress=progress)
    # here, because they import torch
    from vae_ray.distributed.connection import connected
    from vae_ray.training.placement import uses_cluster

    assert uses_cluster(), "would start a local Ray"
    with connected(advice="unset RAY_ADDRESS to prepare the images on this machine alone"):
        _check_has_cpus()
        try:
            return prepare(plan, location, run=run_on_ray, progress=progress)
        except WorkersFailed as error:
            message = f"{location}: not all images could be prepared: {error}; the same command continues"
            raise TrainingFailed(message) from error


def run_on_ray(tasks: Iterator[Task]) -> Iterator[PartRecord]:
    """Run the tasks of one preparation, whose location is absolute, on the connected cluster; a `Runner`.

    Those of an `in_process` source run in this process. After the iterator is closed no other task begins.
    Raises a task's own `UserError`, and `WorkersFailed` for any other failure.
    """
    first = next(tasks, None)
    if first is None:
        return
    tasks = itertools.chain([first], tasks)
    if first.source.in_process:
        yield from map(run_task, tasks)
        return
    with _common_to_all(first) as common:
        reference = ray.put(common)
        _check_nodes(reference, common)
        yield from _run_on_nodes(tasks, reference, common)


def _run_on_nodes(tasks: Iterator[Task], reference: ray.ObjectRef, common: Common) -> Iterator[PartRecord]:
    decode = ray.remote(_decode).options(num_cpus=1, max_retries=MAX_RETRIES, scheduling_strategy="SPREAD")
    running, patience_seconds = set[ray.ObjectRef](), PATIENCE_SECONDS
    try:
        while True:
            room = _max_running() - len(running)
            for task in itertools.islice(tasks, max(0, room)):
                running.add(decode.remote(reference, *task[1:]))
            if not running:
                return
            if not ray.wait(list(running), timeout=patience_seconds)[0]:
                logger.warning("no part is done yet: if others use all CPUs of the cluster, this waits (`ray status`)")
            patience_seconds = None
            done, _ = ray.wait(list(running), num_returns=len(running), timeout=0)
            for each in done:
                running.remove(each)
                yield _result(each)
    finally:
        _stop(running, common)


def _max_running() -> int:
    """Counted again each time: nodes come and go. An autoscaler adds them for tasks that wait."""
    return max(1, TASKS_PER_CPU * int(ray.cluster_resources().get("CPU", 0)))


def _result(reference: ray.ObjectRef) -> PartRecord:
    try:
        record: PartRecord | None = ray.get(reference)
    except RayError as error:
        cause = getattr(error, "cause", None) or error  # of a RayTaskError
        if isinstance(cause, UserError):
            raise cause from None
        raise WorkersFailed(first_cause([cause])) from error
    if record is None:
        raise WorkersFailed("files were deleted while they were in use")
    return record


def _stop(running: set[ray.ObjectRef], common: Common) -> None:
    """Have the tasks end: without the marker one that begins does nothing.

    `ray.cancel` is not used: Ray 2.60 may abort this process if a task ends while it is cancelled ("Tried to complete
    task that was not pending").
    """
    if not running:
        return
    with contextlib.suppress(OSError):
        open_directory(common.location, key="--out").delete(common.marker)
    done, _ = ray.wait(list(running), num_returns=len(running), timeout=STOP_SECONDS)
    for each in done:
        with contextlib.suppress(RayError):  # Ray prints an error that nobody asks for
            ray.get(each)


def _check_has_cpus() -> None:
    """Raise `UserError` if tasks would wait indefinitely."""
    nodes = ray.nodes()
    if not may_grow(nodes) and not any(node.get("CPU", 0) >= 1 for node in alive_resources(nodes)):
        raise UserError(
            "RAY_ADDRESS: no node of the Ray cluster has a CPU for tasks (ray start --num-cpus); add one, or unset "
            "RAY_ADDRESS to prepare the images on this machine alone"
        )


class Common(NamedTuple):
    """What all tasks of a preparation have in common; sent to each node once."""

    source: Source
    rules: ImageRules
    location: str
    marker: str
    """A file at the location that the driver has written, and deletes when it stops."""
    part: Part | None
    """One row that the driver can read; None if none of the first rows can be read."""
    image: NDArray[np.uint8] | None
    """That row's, as the driver decodes it."""


@contextlib.contextmanager
def _common_to_all(task: Task) -> Iterator[Common]:
    """With a marker at the location during its body."""
    directory = open_directory(task.location, key="--out")
    # a name like those of parts: a later preparation deletes it if this process is killed
    marker = f"{PART_PREFIX}{secrets.token_hex(4)}-nodes.json"
    try:
        directory.write(marker, b"")
    except OSError as error:
        raise UserError(f"--out: got {task.location!r}, cannot be written ({describe_os_error(error)})") from None
    try:
        part, image = _first_readable(task.source, task.rules)
        yield Common(task.source, task.rules, task.location, marker, part, image)
    finally:
        with contextlib.suppress(OSError):
            directory.delete(marker)


def _first_readable(source: Source, rules: ImageRules) -> tuple[Part | None, NDArray[np.uint8] | None]:
    for part in itertools.islice(source.parts(1), NUM_TRIED):
        if images := source.read(part, rules).images:
            return part, images[0]
    return None, None


class Problem(NamedTuple):
    """Why a node cannot take part."""

    key: str
    text: str


def _check_nodes(reference: ray.ObjectRef, common: Common) -> None:
    """Raise `UserError` with the addresses of the nodes that cannot take part, before any starts to work."""
    answers = on_every_node(_problem_here, reference)
    problems = [
        (answer.address, Problem("", f"({answer.error})") if answer.error else answer.result)
        for answer in answers
        if answer.error or answer.result
    ]
    if problems:
        raise _refusal(problems, common)


def _refusal(problems: Sequence[tuple[str, Problem]], common: Common) -> UserError:
    """The error that names the addresses of the nodes that have problems with one key."""
    key = min(problem.key for _, problem in problems)
    named = ", ".join(f"{address} {problem.text}" for address, problem in problems if problem.key == key)
    if key == "--out":
        return UserError(
            f"--out: got {common.location!r}, which not all nodes of the cluster share: {named}; try a directory that "
            "all nodes see and may write to, or a URI, for example s3://BUCKET/images"
        )
    if key == "data.root":
        return UserError(
            f"data.root: not all nodes of the cluster can read {common.source.describe()}: {named}; try a directory "
            "that all nodes see, or a URI"
        )
    return UserError(
        f"RAY_ADDRESS: not all nodes of the cluster can run this vae_ray: {named}; install the same packages on all, "
        "or use vae-ray submit, which brings this one along"
    )


def _problem_here(common: Common) -> Problem | None:
    """Why this node cannot take part; None if it can."""
    if common.part is not None:
        try:
            rows = common.source.read(common.part, common.rules)
        except (UserError, OSError) as error:
            return Problem("data.root", f"cannot read it ({one_line(error)[:200]})")
        if rows.skipped:
            return Problem("data.root", f"cannot read it ({rows.skipped[0].name}: {rows.skipped[0].reason})")
        if not np.array_equal(rows.images[0], common.image):  # type: ignore[arg-type]
            return Problem("data.root", "reads other pixels (other files, or another version of Pillow)")
    try:
        return _problem_of_output(open_directory(common.location, key="--out"), common.marker)
    except UserError as error:
        return Problem("--out", f"cannot use it ({one_line(error)[:200]})")


def _problem_of_output(directory: Directory, marker: str) -> Problem | None:
    verb = "read"
    try:
        if directory.read(marker) is None:
            return Problem("--out", "does not see what this process writes there")
        verb, own = "write", f"{marker.removesuffix('.json')}-{secrets.token_hex(4)}.json"
        directory.write(own, b"")
        directory.delete(own)
    except OSError as error:
        return Problem("--out", f"cannot {verb} there ({describe_os_error(error)})")
    return None


_directories: dict[str, Directory] = {}
"""Those to which this process writes, by the marker."""


def _decode(common: Common, *others: Any) -> PartRecord | None:
    """`run_task` on a node, in a Ray worker; None if the driver has stopped.

    `others` are the fields of the task behind its source. The first task of each process looks at what the driver has
    all nodes look at: this one may have joined the cluster since.
    """
    if common.marker not in _directories:
        if problem := _problem_here(common):
            raise _refusal([(ray.util.get_node_ip_address(), problem)], common)
        _directories[common.marker] = open_directory(common.location, key="--out")
    if _directories[common.marker].read(common.marker) is None:
        return None
    return run_task(Task(common.source, *others))
