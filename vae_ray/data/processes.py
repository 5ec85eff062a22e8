"""Decoding in parallel: tasks of a preparation in processes of this machine.

Processes are started only where the work is worth their start, and end with this one, whatever ends it.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator

from vae_ray.data.preparation import PartRecord, Task, run_task

ALONE_SECONDS = 0.5
"""A preparation that is done so soon needs no other process."""


def run_tasks(tasks: Iterator[Task], *, num_processes: int) -> Iterator[PartRecord]:
    """Run tasks in this process for a moment, the rest in `num_processes`; yields records as they are done."""
    started = time.perf_counter()
    for task in tasks:
        yield run_task(task)
        is_alone = num_processes < 2 or task.source.in_process
        if not is_alone and time.perf_counter() - started > ALONE_SECONDS:
            break
    remaining = list(itertools.islice(tasks, 1))
    if remaining:
        yield from _run_in_processes(itertools.chain(remaining, tasks), num_processes)


def _run_in_processes(tasks: Iterator[Task], num_processes: int) -> Iterator[PartRecord]:
    from concurrent.futures import FIRST_COMPLETED, wait

    from loky import ProcessPoolExecutor

    executor = ProcessPoolExecutor(num_processes, initializer=_end_with_parent, initargs=(os.getpid(),))
    try:
        running = {executor.submit(run_task, task) for task in itertools.islice(tasks, 2 * num_processes)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {executor.submit(run_task, task) for task in itertools.islice(tasks, len(done))}
            for future in done:
                yield future.result()
    finally:
        executor.shutdown(wait=True, kill_workers=True)


def _end_with_parent(parent: int) -> None:
    """Have this process end when its parent does, even by SIGKILL; Ctrl-C is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_watch, args=(parent,), name="parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
