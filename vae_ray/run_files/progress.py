"""The progress of a run on stderr: a live view on a terminal, plain lines elsewhere.

It reads the run's own files, so it is the same wherever the loop runs.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from vae_ray.config.experiment import Experiment
from vae_ray.errors import UserError
from vae_ray.run_files.run_directory import RunDirectory

POLL_SECONDS = 0.25
LINE_SECONDS = 10.0
"""Between lines about the preparation of images where there is no terminal."""
PULL_SECONDS = 2.0


class StderrConsole(Console):
    """A terminal on stderr; a reader that goes away ends the output, and not the process."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__(stderr=True, highlight=False, quiet=quiet)

    def on_broken_pipe(self) -> None:
        """Called by rich, whose own method ends the process."""
        self.quiet = True


@contextlib.contextmanager
def preparation_view(*, quiet: bool) -> Iterator[Callable[[int, int | None], None]]:
    """A function that shows how many images are prepared: on a terminal as a bar, elsewhere as a line at times."""
    console, started, told = StderrConsole(quiet=quiet), time.monotonic(), time.monotonic()
    bar = Progress(
        TextColumn("preparing images"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[terms]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
    task = bar.add_task("", total=None, terms="")

    def show(num_done: int, num_images: int | None) -> None:
        nonlocal told
        speed = num_done / max(time.monotonic() - started, 1e-3)
        of_all = f" of {num_images:,}" if num_images else ""
        terms = f"{num_done:,}{of_all} images, {speed:,.{0 if speed >= 10 else 1}f}/s"
        bar.update(task, completed=num_done, total=num_images, terms=terms)
        if not console.is_terminal and time.monotonic() - told > LINE_SECONDS:
            told = time.monotonic()
            left = f", {(num_images - num_done) / speed:.0f} s left" if num_images else ""
            console.print(f"preparing images: {terms}{left}", soft_wrap=True)

    with bar:
        yield show


class ProgressView:
    """Prints each epoch when it ends and, on a terminal, shows the position in the current one, until it is closed.

    `images` is a line about what is trained on, which is printed first.
    """

    def __init__(self, run: RunDirectory, experiment: Experiment, *, images: str) -> None:
        self._run, self._epochs = run, experiment.training.epochs
        self._console = StderrConsole()
        with contextlib.suppress(OSError):
            self._console.print(images, soft_wrap=True, markup=False, emoji=False)
        self._last_epoch = max((record["epoch"] for record in run.records.history()), default=0)
        self._num_attempts, self._num_warnings = len(run.records.attempts()), len(run.records.warnings())
        self._num_bytes = 0
        self._next_pull = 0.0
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
        self._bar.start()
        self._thread.start()

    def close(self) -> None:
        """Show the last records and leave the terminal."""
        self._stop.set()
        self._thread.join()
        self._next_pull = 0.0
        with contextlib.suppress(OSError):
            self._update()
            self._bar.stop()

    def _follow(self) -> None:
        with contextlib.suppress(OSError):  # the terminal is gone: training is not ended by that
            while not self._stop.wait(POLL_SECONDS):
                self._update()

    def _update(self) -> None:
        if time.monotonic() >= self._next_pull:
            self._next_pull = time.monotonic() + PULL_SECONDS
            with contextlib.suppress(UserError):  # the next pull is soon
                self._run.pull()
        records = self._run.records
        for warning in records.warnings()[self._num_warnings :]:
            self._num_warnings += 1
            self._console.print(warning, soft_wrap=True, markup=False, emoji=False)
        for attempt in records.attempts()[self._num_attempts :]:
            self._num_attempts += 1
            if self._num_attempts > 1:
                self._console.print(describe_attempt(attempt), soft_wrap=True)
        num_bytes = records.metrics_file.stat().st_size if records.metrics_file.exists() else 0
        if num_bytes != self._num_bytes:
            self._num_bytes = num_bytes
            for record in records.history():
                if record["epoch"] > self._last_epoch:
                    # soft_wrap: one line stays one line, however narrow the terminal or the log
                    self._console.print(describe_epoch(record, self._epochs), soft_wrap=True)
                    self._last_epoch = record["epoch"]
        with contextlib.suppress(OSError, ValueError):  # between epochs there is none
            state = json.loads(records.progress_file.read_text())
            self._bar.update(
                self._task,
                completed=state["done"],
                description=f"epoch {state['epoch']}/{self._epochs}",
                terms=f"{_terms(state, 'train')}  {state['images_per_second']:,.0f} images/s",
            )


def format_nats(value: float) -> str:
    """A metric with two decimals, or of 1,000 and more with five significant digits."""
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.5g}"


def format_metric(key: str, value: float) -> str:
    """A metric with its unit: `105.32 nats`, or `3.592 bits/dim` of `test/bits_per_dim`."""
    return f"{value:.3f} bits/dim" if key.endswith("/bits_per_dim") else f"{format_nats(value)} nats"


def describe_epoch(record: dict[str, Any], epochs: int) -> str:
    """A line about an epoch; nats per image."""
    splits = [split for split in ("train", "val", "test") if f"{split}/nelbo" in record]
    number = f"epoch {record['epoch']:>{len(str(epochs))}}/{epochs}"
    parts = [number, *(_terms(record, split) for split in splits), f"{record['images_per_second']:,.0f} images/s"]
    if num_skipped := record.get("num_skipped"):
        parts.append(f"train over {record['num_images']:,} of {record['num_images'] + num_skipped:,} images")
    return "  ".join(parts)


def describe_attempt(attempt: dict[str, Any]) -> str:
    """A line about an attempt that is not the first: which workers continue from where, and what is lost."""
    epochs, steps = attempt["epochs_done"], attempt["steps_done"]
    position = f"epoch {epochs + 1}, step {steps}" if steps else f"the end of epoch {epochs}" if epochs else "the start"
    lost = ""
    if attempt.get("last_epoch") == epochs + 1 and attempt["last_step"] > steps:
        num_lost = attempt["last_step"] - steps
        lost = f"; at least {num_lost} step{'s' if num_lost > 1 else ''} will be recomputed"
    num = attempt["num_workers"]
    workers = f"{num} worker{'s' if num > 1 else ''} on {', '.join(sorted(set(attempt['nodes'])))}"
    return f"started again from {position}: {workers}{lost}"


def _terms(values: dict[str, Any], split: str) -> str:
    nelbo, distortion, rate = (format_nats(values[f"{split}/{name}"]) for name in ("nelbo", "distortion", "rate"))
    line, key = f"{split} nelbo {nelbo} = {distortion} + {rate}", f"{split}/bits_per_dim"
    return f"{line} ({format_metric(key, values[key])})" if key in values else line
