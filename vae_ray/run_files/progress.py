"""How training is going, for people: a live view on a terminal, plain lines elsewhere. Writes to stderr.

The view follows the run's own files, so it is the same whether the loop runs in this process, in Ray
workers or on another node.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from vae_ray.config.experiment import Experiment
from vae_ray.run_files.run_directory import RunDirectory

POLL_SECONDS = 0.25
FETCH_SECONDS = 2.0


class ProgressView:
    """Shows epochs as they are finished, and on a terminal how far the current one is; a context manager."""

    def __init__(self, run: RunDirectory, experiment: Experiment, *, console: Console | None = None) -> None:
        self._run, self._epochs = run, experiment.training.epochs
        self._console = console or Console(stderr=True, highlight=False)
        self._last_shown = max((line["epoch"] for line in run.history()), default=0)
        self._read_bytes = 0
        self._next_fetch = 0.0
        self._attempts_shown, self._warnings_shown = len(run.attempts()), len(run.warnings())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[terms]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("starting workers", total=1.0, terms="")

    def __enter__(self) -> ProgressView:
        self._bar.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._show()
        self._bar.stop()

    def _follow(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self._show()

    def _fetch(self, *, is_last: bool) -> None:
        """Of a run at a URI, its metrics as they now are; a look that fails is followed by the next."""
        mirror = self._run.mirror
        if mirror is not None and (is_last or time.monotonic() >= self._next_fetch):
            self._next_fetch = time.monotonic() + FETCH_SECONDS
            with contextlib.suppress(OSError):
                shown = (self._run.metrics_file, self._run.attempts_file, self._run.warnings_file)
                mirror.pull(lambda name: name in [file.name for file in shown])

    def _show(self) -> None:
        self._fetch(is_last=self._stop.is_set())
        for warning in self._run.warnings()[self._warnings_shown :]:
            self._warnings_shown += 1
            self._console.print(warning, soft_wrap=True, markup=False, emoji=False)
        for attempt in self._run.attempts()[self._attempts_shown :]:
            self._attempts_shown += 1
            if self._attempts_shown > 1:
                self._console.print(describe_attempt(attempt), soft_wrap=True)
        size = self._run.metrics_file.stat().st_size if self._run.metrics_file.exists() else 0
        if size != self._read_bytes:
            self._read_bytes, history = size, self._run.history()
            for line in history:
                if line["epoch"] > self._last_shown:
                    # soft_wrap: a line stays one line, however narrow the terminal or the log
                    self._console.print(describe_epoch(line, self._epochs), soft_wrap=True)
                    self._last_shown = line["epoch"]
        try:
            state = json.loads(self._run.progress_file.read_text())
        except (OSError, ValueError):  # between epochs there is none
            return
        self._bar.update(
            self._task,
            completed=state["done"],
            description=f"epoch {state['epoch']}/{self._epochs}",
            terms=f"{_terms(state, 'train')}  {state['images_per_second']:,.0f} images/s",
        )


def describe_epoch(line: dict[str, Any], epochs: int) -> str:
    """One line for people from one line of `metrics.jsonl`; nats per image."""
    splits = [split for split in ("train", "val", "test") if f"{split}/nelbo" in line]
    parts = [
        f"epoch {line['epoch']:>{len(str(epochs))}}/{epochs}",
        *(_terms(line, split) for split in splits),
    ]
    return "  ".join([*parts, f"{line['images_per_second']:,.0f} images/s"])


def describe_attempt(attempt: dict[str, Any]) -> str:
    """One line for people from one line of `attempts.jsonl` that is not the first: what was lost, and who goes on."""
    epochs, steps = attempt["epochs_done"], attempt["steps_done"]
    whence = f"epoch {epochs + 1}, step {steps}" if steps else f"the end of epoch {epochs}" if epochs else "the start"
    lost = ""
    if attempt.get("last_epoch") == epochs + 1 and attempt["last_step"] > steps:
        lost = f"; {attempt['last_step'] - steps} steps or some more are computed again"
    num = attempt["num_workers"]
    who = f"{num} worker{'s' if num > 1 else ''} on {', '.join(sorted(set(attempt['nodes'])))}"
    return f"started again from {whence}: {who}{lost}"


def _terms(values: dict[str, Any], split: str) -> str:
    nelbo, distortion, rate = (values[f"{split}/{name}"] for name in ("nelbo", "distortion", "rate"))
    return f"{split} nelbo {nelbo:.2f} = {distortion:.2f} + {rate:.2f}"
