"""Ctrl-C, SIGTERM and SIGHUP: once to stop after a checkpoint, twice to stop at once.

SIGHUP counts once: when a terminal closes, the system and the shell both send it.
"""

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

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOPPING = b"vae-ray: stopping after a checkpoint; once more to stop at once\n"
WAITING = b"vae-ray: stopping when Ray has started; once more to stop at once\n"


@contextlib.contextmanager
def stopping(run: RunDirectory) -> Iterator[None]:
    """In its body the first signal requests a stop of the training in `run`; the second raises `KeyboardInterrupt`.

    So does the first before training starts: there is nothing to save. No effect outside the main thread, the only one
    that may set handlers.
    """
    is_requested = False

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal is_requested
        was_requested, is_requested = is_requested, True  # first: another signal may interrupt this very function
        if was_requested and number == signal.SIGHUP:
            return
        if not was_requested and _is_training(run):
            with contextlib.suppress(OSError):  # then only the second signal helps
                run.request_stop()
            with contextlib.suppress(OSError):  # after SIGHUP there may be no terminal
                os.write(2, STOPPING)  # print() is not safe in a handler: it may have interrupted one
        else:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)
            raise KeyboardInterrupt

    with _handlers(dict.fromkeys(SIGNALS, request)):
        yield


def all_as_ctrl_c() -> contextlib.AbstractContextManager[None]:
    """In its body SIGTERM and SIGHUP do what SIGINT does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            signal.signal(number, signal.SIG_IGN)
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's script starts what ends in `&`
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)

    return _handlers(dict.fromkeys((signal.SIGTERM, signal.SIGHUP), interrupt))


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """In its body `SIGNALS` wait until its end: an interrupted import can leave half a module."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def deferred_while_ray_starts() -> Iterator[None]:
    """In its body signals wait until its end; a second Ctrl-C ends the process at once.

    An interrupted `ray.init` leaves processes behind, and threads that crash. SIGHUP is blocked, because the processes
    that it starts inherit that: a terminal that closes signals them too. (SIGTERM is not: Ray ends them by it. It is
    the one signal that may still interrupt, by a handler that `ray.init` sets.) Afterwards this process has its own
    handlers again.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(130)
        received.append(number)
        with contextlib.suppress(OSError):
            os.write(2, WAITING)

    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP,))
    try:
        with _handlers(dict.fromkeys(SIGNALS, note)):
            yield
    except SystemExit:  # raised by Ray's handler
        received.append(signal.SIGTERM)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if received:
        raise KeyboardInterrupt


def restored() -> contextlib.AbstractContextManager[None]:
    """After its body the handlers are what they were: Ray Tune leaves one that does nothing at the first Ctrl-C."""
    return _handlers({})


@contextlib.contextmanager
def _handlers(handlers: Mapping[signal.Signals, Callable[[int, FrameType | None], Any]]) -> Iterator[None]:
    """Set `handlers` in its body; afterwards restore those of `SIGNALS`. No effect outside the main thread.

    SIGHUP stays ignored where it is: `nohup` asks for that.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.getsignal(each) for each in SIGNALS}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        handlers = {each: handler for each, handler in handlers.items() if each != signal.SIGHUP}
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
