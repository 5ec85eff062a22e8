"""A real `vae-ray train` in a session of its own, for tests that send it signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from vae_ray import Experiment
from vae_ray.run_files.run_directory import RunDirectory


class Ended(NamedTuple):
    """How the process ended."""

    exit_code: int
    seconds: float
    """From the last signal to the end of the process and of all its descendants."""
    stderr: str


class Training:
    """`vae-ray train` of an experiment, or another `command`, with `--resume` and with more `environment`."""

    def __init__(
        self, experiment: Experiment, directory: Path, *, command: Sequence[str] = ("train",), **environment: str
    ) -> None:
        self.run = RunDirectory(Path(experiment.run.storage) / str(experiment.run.name))
        file = directory / "experiment.yaml"
        file.write_text(experiment.to_yaml())
        name, *options = command
        process = [sys.executable, "-m", "vae_ray", name, str(file), "--resume", *options]
        self._log = directory / "stderr.txt"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                process, env={**os.environ, **environment}, stdout=log, stderr=log, start_new_session=True
            )

    def wait_for_epoch(self, epoch: int) -> None:
        """Return once some steps of that epoch are done."""
        self.wait_until(lambda: self._epoch_begun() >= epoch)

    def wait_until(
        self, condition: Callable[[], bool], *, timeout_seconds: float = 120, poll_seconds: float = 0.01
    ) -> None:
        """Return once `condition` holds; the process must live so long."""
        deadline = time.monotonic() + timeout_seconds
        while not condition():
            assert self.process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(poll_seconds)

    def _epoch_begun(self) -> int:
        try:
            return int(json.loads(self.run.records.progress_file.read_text())["epoch"])
        except (OSError, ValueError):  # not begun, or just being written
            return 0

    def ends_after(self, *signals: signal.Signals, pause_seconds: float = 0.05, whole_group: bool = False) -> Ended:
        """Send the signals, to the whole process group as a terminal does if so told, and wait for the end of all."""
        family = descendants(self.process.pid)
        for number, each in enumerate(signals):
            time.sleep(pause_seconds if number else 0)
            (os.killpg if whole_group else os.kill)(self.process.pid, each)
        sent = time.monotonic()
        code = self.process.wait(60)
        while any(is_alive(pid) for pid in family) and time.monotonic() < sent + 60:
            time.sleep(0.05)
        return Ended(code, time.monotonic() - sent, self._log.read_text())


def descendants(pid: int) -> list[int]:
    """All children of a process, and theirs."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, waiting = [], [pid]
    while waiting:
        mine = children.get(waiting.pop(), [])
        found += mine
        waiting += mine
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
