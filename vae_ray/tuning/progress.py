"""The progress of a sweep, for people: one live table on a terminal, plain lines elsewhere. Writes to stderr."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from statistics import fmean
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vae_ray.run_files.progress import StderrConsole, format_nats
from vae_ray.tuning.records import FAILURES, TrialRecord, configuration_of

STATUS_SECONDS = 30.0
"""Time between two lines on the whole sweep, where there is no terminal."""
MAX_RUNNING_ROWS = 12
NUM_BEST = 5
"""Rows of the table: a sweep of hundreds of trials still fits a screen."""


@dataclass
class _Trial:
    state: str
    """`running`, or a state of `TrialRecord`."""
    epoch: int = 0
    value: float | None = None
    best: float | None = None
    overrides: dict[str, Any] = field(default_factory=dict)


class SweepView:
    """Shows trials as they run and end; a context manager. `records` are the trials of earlier starts."""

    def __init__(
        self,
        name: str,
        *,
        metric: str,
        num_trials: int,
        epochs: int,
        records: Sequence[TrialRecord],
        repeats: int = 1,
        quiet: bool = False,
        console: Console | None = None,
    ) -> None:
        self._name, self._metric, self._num_trials, self._epochs = name, metric, num_trials, epochs
        self._repeats = repeats
        self._console = console or StderrConsole(quiet=quiet)
        self._trials = {
            record.name: _Trial(record.state, record.epochs_done, None, record.value(metric), record.overrides)
            for record in records
        }
        self._epochs_before = sum(trial.epoch for trial in self._trials.values())
        self._started_at = self._last_status = time.monotonic()
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> SweepView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._live.stop()
        self._print(self._status())

    def epoch(self, name: str, overrides: dict[str, Any], record: dict[str, Any]) -> None:
        """A trial has finished an epoch."""
        trial, value = self._trials.setdefault(name, _Trial("running")), record[self._metric]
        trial.state, trial.epoch, trial.value = "running", record["epoch"], value
        if trial.best is None or value <= trial.best:
            trial.best, trial.overrides = value, overrides
        if self._console.is_terminal:
            self._live.update(self._table(), refresh=True)
        elif time.monotonic() - self._last_status > STATUS_SECONDS:
            self._last_status = time.monotonic()
            self._print(self._status())

    def warned(self, name: str, warning: str) -> None:
        """A trial has logged a warning."""
        self._print(f"trial {name}  {warning}")

    def ended(self, name: str, state: str, reason: str, epoch: int) -> None:
        """A trial has ended, in whatever state."""
        trial = self._trials.setdefault(name, _Trial(state))
        trial.state, trial.epoch = state, epoch
        parts = [f"trial {name}", state if state == "finished" else f"{state} after epoch {epoch}"]
        parts += [reason] if reason else [f"{self._metric} {format_nats(trial.best)}"] if trial.best is not None else []
        self._print("  ".join([*parts, _settings(trial)]).rstrip())

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal is gone: the sweep is not ended by that
            self._console.print(text, soft_wrap=True, markup=False, emoji=False)

    def _best(self) -> list[tuple[float, str]]:
        """The best value and the name of each trial that has not failed, best first.

        With repeats the mean, and the name, of each configuration of which every seed has a value.
        """
        values: dict[str, list[float]] = {}
        for name, trial in self._trials.items():
            if trial.state not in FAILURES and trial.best is not None:
                values.setdefault(configuration_of(name) if self._repeats > 1 else name, []).append(trial.best)
        return sorted((fmean(each), name) for name, each in values.items() if len(each) == self._repeats)

    def _status(self) -> str:
        trials = self._trials.values()
        states = Counter(trial.state for trial in trials)
        num_running = states.pop("running", 0)
        num_ended = states.total() - states.pop("pending", 0)
        counts = ", ".join(f"{states[s]} {s}" for s in dict.fromkeys(["finished", "stopped", *states]) if states[s])
        parts = [
            f"sweep {self._name}: {num_ended} of {self._num_trials} trials ended" + (f" ({counts})" if counts else "")
        ]
        if num_running:
            parts.append(f"{num_running} running")
        if best := self._best():
            what = "trial" if self._repeats == 1 else "mean of configuration"
            parts.append(f"best {self._metric} {format_nats(best[0][0])} ({what} {best[0][1]})")
        epochs_seen = sum(trial.epoch for trial in trials) - self._epochs_before
        epochs_left = (self._num_trials - num_ended) * self._epochs
        epochs_left -= sum(trial.epoch for trial in trials if trial.state in ("running", "pending"))
        if epochs_seen > 0 and epochs_left > 0:
            seconds = (time.monotonic() - self._started_at) / epochs_seen * epochs_left
            parts.append(f"at most {timedelta(seconds=round(seconds))} left")
        return " · ".join(parts)

    def _table(self) -> RenderableType:
        table = Table("trial", "", box=None, pad_edge=False)
        for title in ("epoch", self._metric):
            table.add_column(title, justify="right")
        table.add_column("settings", no_wrap=True)
        running = [(name, trial) for name, trial in self._trials.items() if trial.state == "running"]
        for name, trial in running[:MAX_RUNNING_ROWS]:
            value_text = "" if trial.value is None else format_nats(trial.value)
            table.add_row(name, "running", f"{trial.epoch}/{self._epochs}", value_text, _settings(trial))
        for place, (value, name) in enumerate(self._best()[:NUM_BEST]):
            label, style = ("", "dim") if place else ("best", "bold")
            table.add_row(name, label, "", format_nats(value), _settings(self._trials[name]), style=style)
        return Group(Text(self._status()), table)


def _settings(trial: _Trial) -> str:
    return "  ".join(f"{key.rpartition('.')[2]}={value}" for key, value in trial.overrides.items())
