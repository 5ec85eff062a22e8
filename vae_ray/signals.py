"""Ctrl-C and SIGTERM: once for a checkpoint and an end in good order, twice for an end at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vae_ray.run_files.run_directory import RunDirectory

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAID = b"vae-ray: stopping after a checkpoint; once more to stop at once\n"


@contextlib.contextmanager
def stopping(run: RunDirectory) -> Iterator[None]:
    """In its body the first signal asks those who train in `run` to stop; the second raises `KeyboardInterrupt`.

    So does the first where nobody trains yet: there is nothing to save. No effect outside the main thread, the only one
    that may set handlers.
    """
    if not _is_main_thread():
        yield
        return
    was_asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal was_asked
        if not was_asked and _someone_trains(run):
            was_asked = True
            with contextlib.suppress(OSError):  # then only the second signal helps
                run.request_stop()
            os.write(2, SAID)  # print() is not safe in a handler: it may have interrupted one
        else:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)
            raise KeyboardInterrupt

    before = {each: signal.signal(each, ask) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """In its body SIGTERM does what SIGINT does."""
    if not _is_main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """After its body this process has its own handlers again: `ray.init` sets others, which abort at SIGTERM."""
    if not _is_main_thread():
        yield
        return
    before = {each: signal.getsignal(each) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            if callable(handler):
                signal.signal(each, handler)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _someone_trains(run: RunDirectory) -> bool:
    """Whether rank 0, in this process or in another, holds the run's directory; of a URI that is not known."""
    if run.mirror is not None:
        return True
    import filelock  # here, because the command line imports this module before it knows what it will do

    try:
        with run.lock("writer").acquire(blocking=False):
            return False
    except (filelock.Timeout, RuntimeError):  # RuntimeError: held by this very thread
        return True
