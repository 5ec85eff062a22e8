"""Ctrl-C and SIGTERM: once to stop after a checkpoint, twice to stop at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vae_ray.run_files.run_directory import RunDirectory

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPING = b"vae-ray: stopping after a checkpoint; once more to stop at once\n"


@contextlib.contextmanager
def stopping(run: RunDirectory) -> Iterator[None]:
    """In its body the first signal requests a stop of the training in `run`; the second raises `KeyboardInterrupt`.

    So does the first before training starts: there is nothing to save. No effect outside the main thread, the only one
    that may set handlers.
    """
    is_requested = False

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal is_requested
        if not is_requested and _is_training(run):
            is_requested = True
            with contextlib.suppress(OSError):  # then only the second signal helps
                run.request_stop()
            os.write(2, STOPPING)  # print() is not safe in a handler: it may have interrupted one
        else:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)
            raise KeyboardInterrupt

    with _handlers(dict.fromkeys(SIGNALS, request)):
        yield


def sigterm_as_ctrl_c() -> contextlib.AbstractContextManager[None]:
    """In its body SIGTERM does what SIGINT does."""
    return _handlers({signal.SIGTERM: lambda number, frame: signal.raise_signal(signal.SIGINT)})


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """In its body Ctrl-C and SIGTERM wait until its end: an interrupted import can leave half a module."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def handlers_kept() -> contextlib.AbstractContextManager[None]:
    """After its body this process has its own handlers again: `ray.init` sets others, which abort at SIGTERM."""
    return _handlers({})


@contextlib.contextmanager
def _handlers(handlers: Mapping[signal.Signals, Callable[[int, FrameType | None], Any]]) -> Iterator[None]:
    """Set `handlers` in its body; afterwards restore those of `SIGNALS`. No effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.getsignal(each) for each in SIGNALS}
    for each, handler in handlers.items():
        signal.signal(each, handler)
    try:
        yield
    finally:
        for each, previous in before.items():
            # Ray's handler stays in place of a default one: it ends Ray's processes
            if each in handlers or callable(previous):
                signal.signal(each, previous)


def _is_training(run: RunDirectory) -> bool:
    """Whether rank 0, in this process or in another, holds the run's directory; True for a URI, which has no lock."""
    if run.mirror is not None:
        return True
    import filelock  # here, because the command line imports this module before it knows what it will do

    try:
        with run.lock("writer").acquire(blocking=False):
            return False
    except (filelock.Timeout, RuntimeError):  # RuntimeError: held by this very thread
        return True
