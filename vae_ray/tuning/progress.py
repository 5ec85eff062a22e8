"""How a sweep is going, for people: one live table on a terminal, plain lines elsewhere. Writes to stderr."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vae_ray.tuning.records import FAILURES, TrialRecord

STATUS_SECONDS = 30.0
"""Off a terminal, how often a line says how the whole sweep stands."""
MOST_ROWS = 12
"""Of running trials, and of the best; a sweep of hundreds still fits a screen."""
NUM_BEST = 5


class SweepView:
    """Shows trials as they run and end; a context manager. Its methods may be called from any thread."""

    def __init__(
        self,
        name: str,
        *,
        metric: str,
        num_trials: int,
        epochs: int,
        records: Sequence[TrialRecord],
        quiet: bool = False,
        console: Console | None = None,
    ) -> None:
        self._name, self._metric, self._num_trials, self._epochs = name, metric, num_trials, epochs
        self._console = console or Console(stderr=True, highlight=False, quiet=quiet)
        self._lock = threading.Lock()
        self._started_at = self._last_status = time.monotonic()
        self._epochs_seen = 0
        self._running: dict[str, dict[str, Any]] = {}
        self._ended = {record.name: record.state for record in records if record.state != "pending"}
        self._epochs_to_go = num_trials * epochs - sum(record.epochs_done for record in records)
        self._epochs_to_go -= sum(epochs - record.epochs_done for record in records if record.state != "pending")
        self._best = {
            record.name: (value, record.overrides)
            for record in records
            if not record.failed and (value := record.value(metric)) is not None
        }
        self._live = Live(console=self._console, get_renderable=self._table, refresh_per_second=2, transient=True)

    def __enter__(self) -> SweepView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()
        self._console.print(self._status(), soft_wrap=True, markup=False, emoji=False)

    def epoch(self, name: str, overrides: dict[str, Any], line: dict[str, Any]) -> None:
        """A trial has finished an epoch."""
        with self._lock:
            self._running[name] = {"epoch": line["epoch"], "value": line[self._metric], "overrides": overrides}
            self._epochs_seen += 1
            self._epochs_to_go -= 1
            if line[self._metric] <= self._best.get(name, (float("inf"),))[0]:
                self._best[name] = (line[self._metric], overrides)
        if not self._console.is_terminal and time.monotonic() - self._last_status > STATUS_SECONDS:
            self._last_status = time.monotonic()
            self._console.print(self._status(), soft_wrap=True, markup=False, emoji=False)

    def warned(self, name: str, warning: str) -> None:
        """A trial has warned of something."""
        self._console.print(f"trial {name}  {warning}", soft_wrap=True, markup=False, emoji=False)

    def ended(self, name: str, state: str, reason: str, epoch: int) -> None:
        """A trial has come to its end, in whatever state."""
        with self._lock:
            overrides = self._running.pop(name, {}).get("overrides", {})
            self._ended[name] = state
            self._epochs_to_go -= self._epochs - epoch
            value = self._best[name][0] if name in self._best else None
            if state in FAILURES:
                self._best.pop(name, None)
        parts = [f"trial {name}", state if state not in ("stopped", *FAILURES) else f"{state} after epoch {epoch}"]
        parts += [reason] if reason else [f"{self._metric} {value:.2f}"] if value is not None else []
        self._console.print(
            "  ".join([*parts, _settings(overrides)]).rstrip(), soft_wrap=True, markup=False, emoji=False
        )

    def _status(self) -> str:
        with self._lock:
            states = list(self._ended.values())
            counts = [
                f"{states.count(state)} {state}"
                for state in dict.fromkeys(["finished", "stopped", *states])
                if states.count(state)
            ]
            parts = [f"sweep {self._name}: {len(states)} of {self._num_trials} trials ended"]
            parts[0] += f" ({', '.join(counts)})" if counts else ""
            if self._running:
                parts.append(f"{len(self._running)} running")
            if self._best:
                name = min(self._best, key=lambda key: self._best[key][0])
                parts.append(f"best {self._metric} {self._best[name][0]:.2f} (trial {name})")
            if self._epochs_seen and self._epochs_to_go > 0:
                seconds = (time.monotonic() - self._started_at) / self._epochs_seen * self._epochs_to_go
                parts.append(f"at most {_duration(seconds)} left")
            return " · ".join(parts)

    def _table(self) -> RenderableType:
        table = Table(box=None, pad_edge=False)
        for title in ("trial", "", "epoch", self._metric, "settings"):
            table.add_column(title, justify="right" if title in ("epoch", self._metric) else "left", no_wrap=True)
        status = self._status()
        with self._lock:
            best = sorted(self._best, key=lambda key: self._best[key][0])[:NUM_BEST]
            for name, now in list(self._running.items())[:MOST_ROWS]:
                table.add_row(
                    name,
                    "running",
                    f"{now['epoch']}/{self._epochs}",
                    f"{now['value']:.2f}",
                    _settings(now["overrides"]),
                )
            for name in best:
                value, overrides = self._best[name]
                table.add_row(
                    name,
                    "best" if name == best[0] else "",
                    "",
                    f"{value:.2f}",
                    _settings(overrides),
                    style="bold" if name == best[0] else "dim",
                )
        return Group(Text(status), table)


def _settings(overrides: dict[str, Any]) -> str:
    return "  ".join(f"{key.rpartition('.')[2]}={value}" for key, value in overrides.items())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
