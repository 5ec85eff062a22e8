"""What Ray's errors mean: the reason why workers failed, on one line.

Ray reports the death of a process as a page of text whose last line may be about anything, in a type that differs with
the place where it was noticed. Its words for the cause are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable

from vae_ray.errors import one_line

CAUSES = {
    ("low on memory", "killed due to memory pressure", "OUT_OF_MEMORY"): (
        "Ray ended a process because its node ran low on memory"
    ),
    ("node has died", "its node is dead", "node was terminated", "was marked dead", "NODE_DIED"): "a node died",
    ("class_name: TrainController",): "the process of Ray Train's controller died (killed, or out of memory)",
    ("worker process has died", "SYSTEM_ERROR", "The actor died unexpectedly"): (
        "the process of a worker died (killed, out of memory, or a crash)"
    ),
    ("health check",): "a worker did not answer any more",
}
"""Words of Ray's, and what they say; the first that is found counts."""
CONSEQUENCES = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL")
"""Words in the errors of workers that only waited for the one that failed."""


def describe_failure(text: str) -> str:
    """The cause in a text of Ray's on one line; the text itself where it says no cause that is known."""
    for words, cause in CAUSES.items():
        if any(word in text for word in words):
            return cause
    return one_line(text)[:300]


def first_cause(errors: Iterable[BaseException]) -> str:
    """The cause of the error of which the others are consequences."""
    ordered = sorted(errors, key=lambda error: any(word in str(error) for word in CONSEQUENCES))
    if not ordered:
        return "Ray gave no reason"
    first = ordered[0]
    if type(first).__module__.startswith("ray."):
        return describe_failure(str(first))
    return f"{type(first).__name__}: {one_line(first)[:300]}"
