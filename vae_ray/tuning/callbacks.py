"""The driver's eyes on its trials: every end is written to the journal, every epoch shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.progress import SweepView
from vae_ray.tuning.records import TrialRecord, read_failure
from vae_ray.tuning.trial import overrides_of


class JournalCallback(tune.Callback):  # type: ignore[misc]
    """Tune calls it in the driver; `epochs_of` says how many epochs a trial of given overrides has.

    `records` are the trials of earlier starts.
    """

    def __init__(
        self,
        directory: SweepDirectory,
        view: SweepView,
        epochs_of: Callable[[dict[str, Any]], int],
        records: Sequence[TrialRecord],
    ) -> None:
        self._directory, self._view, self._epochs_of = directory, view, epochs_of
        self._warnings_shown = {record.name: len(directory.trial(record.name).records.warnings()) for record in records}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune saves its callbacks for a restore of its own, which we never ask for."""
        return {}

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """An epoch has been reported."""
        self._warn(str(trial))
        self._view.epoch(str(trial), overrides_of(trial.config), result)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """All epochs are done, or the scheduler has stopped it."""
        is_whole = trial.last_result.get("epoch", 0) >= self._epochs_of(overrides_of(trial.config))
        self._end(trial, {"state": "finished" if is_whole else "stopped", "reason": ""})

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """It raised an error, or its process died."""
        name = str(trial)
        self._directory.pull()
        self._end(trial, read_failure(self._directory.trial(name)) or {"state": "killed", "reason": _why_killed(trial)})

    def all_ended(self) -> None:
        """Show what trials at a URI have warned of, once all of it is here."""
        for name in list(self._warnings_shown):
            self._warn(name)

    def _warn(self, name: str) -> None:
        """Show what a trial has warned of since the last look."""
        shown, warnings = self._warnings_shown.get(name, 0), self._directory.trial(name).records.warnings()
        for warning in warnings[shown:]:
            self._view.warned(name, warning)
        self._warnings_shown[name] = len(warnings)

    def _end(self, trial: Trial, end: dict[str, str]) -> None:
        name = str(trial)
        self._warn(name)
        epoch = trial.last_result.get("epoch", 0) or len(self._directory.trial(name).records.history())
        self._directory.append_to_journal({"trial": name, "event": "ended", "epoch": epoch, **end})
        self._view.ended(name, end["state"], end["reason"], epoch)


def _why_killed(trial: Trial) -> str:
    """One line from Ray's report on the death of a process."""
    file = Path(trial.error_file) if trial.error_file else None
    text = file.read_text(encoding="utf-8", errors="replace") if file and file.exists() else ""
    if "OutOfMemoryError" in text or "low on memory" in text:
        return "out of memory: Ray ended its process because the node ran low; try fewer --max-concurrent"
    return "its process died (killed, or out of memory); --resume goes on from its last checkpoint"
