"""The one line about workers that failed, from what Ray 2.60 said when each of these things happened to it."""

from __future__ import annotations

import pytest
import torch
from ray.exceptions import ActorDiedError, NodeDiedError, RayActorError
from ray.train import ControllerError, WorkerGroupError

from vae_ray.config.user_code import failures_named
from vae_ray.distributed.failures import describe_failure
from vae_ray.distributed.group import RayWorkers
from vae_ray.distributed.launch import _cause
from vae_ray.errors import Diverged, TrainingFailed, UserError, WorkersFailed

SOCKET_CLOSED = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed "
    "unexpectedly due to SIGSEGV or another unexpected error. If the process was killed by the kernel OOM killer "
    "(verifiable by checking for OOM in dmesg of the OOMing node), consider enabling resource isolation via "
    "--enable-resource-isolation to prevent node deaths by resource contention and significant loss of progress by "
    "uninformed kernel OOM killing."
)


def died(class_name: str, why: str) -> RayActorError:
    text = f"{ActorDiedError.BASE_ERROR_MSG}\n\tclass_name: {class_name}\n\tactor_id: a9d4fcb3\n\tpid: 277\n{why}"
    return RayActorError(error_msg=text)


WORKER = "RayTrainWorker"
CAUSES = {
    "SIGKILL, SIGBUS, SIGSEGV": (died(WORKER, SOCKET_CLOSED), "the process of a worker died (killed, out of memory,"),
    "memory monitor": (
        died(
            WORKER,
            "The actor is dead because its worker process has died. Worker exit type: NODE_OUT_OF_MEMORY Worker exit "
            "detail: Task was killed due to the node running low on memory.\nMemory on the node (IP: 192.0.2.2) was "
            "23.1GB / 24GB (0.96)",
        ),
        "Ray ended a process because its node ran low on memory",
    ),
    "node": (died(WORKER, "The actor died because its node has died. Node Id: 5a1f\n\tthe actor's node..."), "a node"),
    "another node": (NodeDiedError("Task failed because the node it was running on was marked dead."), "a node died"),
}


@pytest.mark.parametrize("name", CAUSES)
def test_the_death_of_a_process_is_one_line_with_its_cause(name: str) -> None:
    failure, expected = CAUSES[name]
    cause = _cause(WorkerGroupError(f"[Rank 0 Error Snippet]:\n{failure}", {0: failure}))
    assert type(cause) is WorkersFailed
    assert str(cause).startswith(expected)
    assert "\n" not in str(cause)
    assert len(str(cause)) < 100


@pytest.mark.parametrize("wrap", [lambda error: error, ControllerError], ids=["itself", "wrapped"])
def test_the_death_of_the_controller_is_named(wrap: type[Exception]) -> None:
    cause = _cause(wrap(died("TrainController", SOCKET_CLOSED)))
    assert str(cause) == "the process of Ray Train's controller died (killed, or out of memory)"


def test_the_error_that_others_follow_from_is_shown_wherever_it_was_raised() -> None:
    waited = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    own = IndexError("index 5 is out of bounds\nfor dimension 0 with size 5")
    cause = _cause(WorkerGroupError("...", {0: waited, 1: own, 2: waited}))
    assert str(cause) == "IndexError: index 5 is out of bounds for dimension 0 with size 5"


@pytest.mark.parametrize("kind", [Diverged, TrainingFailed, UserError])
def test_our_own_errors_keep_their_type_and_text(kind: type[Exception]) -> None:
    cause = _cause(WorkerGroupError("...", {0: died(WORKER, SOCKET_CLOSED), 1: kind("epoch 3: no")}))
    assert (type(cause), str(cause)) == (kind, "epoch 3: no")


def test_a_collective_that_fails_is_not_blamed_on_the_code_that_called_it() -> None:
    group = object.__new__(RayWorkers)  # without a process group
    group.size = 2
    with pytest.raises(ValueError, match="process group"), failures_named(["own_code:tiny"], where="epoch 1, step 4"):
        group.sum(torch.zeros(1))


def test_a_text_without_a_known_cause_is_itself_on_one_line() -> None:
    assert describe_failure("The autoscaler\n  is away") == "The autoscaler is away"
    assert str(_cause(WorkerGroupError("...", {}))) == "Training failed due to worker errors: ..."
