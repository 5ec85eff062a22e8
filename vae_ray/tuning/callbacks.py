"""Tune's callback in the driver: it writes the end of each trial to the journal, and shows every epoch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from vae_ray.distributed.failures import describe_failure
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.progress import SweepView
from vae_ray.tuning.records import TrialRecord, read_failure
from vae_ray.tuning.trial import overrides_of


class JournalCallback(tune.Callback):  # type: ignore[misc]
    """`epochs` is the number of a trial whose overrides have none; `records` are the trials of earlier starts.

    `milestones` are the epochs at which the scheduler compares trials; the journal keeps their order.
    """

    def __init__(
        self,
        directory: SweepDirectory,
        view: SweepView,
        *,
        epochs: int,
        records: Sequence[TrialRecord],
        milestones: Collection[int] = (),
    ) -> None:
        self._directory, self._view, self._epochs, self._milestones = directory, view, epochs, milestones
        self._warnings_shown = {record.name: len(record.run.records.warnings()) for record in records}
        self.ended: set[str] = set()
        """Trials that have ended in this start."""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune saves its callbacks for a restore of its own, which is never used."""
        return {}

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial has reported an epoch, and the scheduler has decided on it."""
        if result["epoch"] in self._milestones:
            self._directory.append_to_journal({"trial": str(trial), "event": "compared", "epoch": result["epoch"]})
        self.show_warnings(str(trial))
        self._view.epoch(str(trial), overrides_of(trial.config), result)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial has done its last epoch, or the scheduler has stopped it."""
        is_whole = trial.last_result.get("epoch", 0) >= trial.config.get("training.epochs", self._epochs)
        self._end(trial, {"state": "finished" if is_whole else "stopped", "reason": ""})

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """A trial has raised an error, or its process died."""
        self._directory.pull()
        failure = read_failure(self._directory.trial(str(trial)))
        self._end(trial, failure or {"state": "killed", "reason": _why_killed(trial)})

    def show_warnings(self, *names: str) -> None:
        """Show the new warnings of these trials; without a name, of all that are known."""
        for name in names or list(self._warnings_shown):
            warnings = self._directory.trial(name).records.warnings()
            for warning in warnings[self._warnings_shown.get(name, 0) :]:
                self._view.warned(name, warning)
            self._warnings_shown[name] = len(warnings)

    def _end(self, trial: Trial, end: dict[str, str]) -> None:
        name = str(trial)
        self.show_warnings(name)
        epoch = trial.last_result.get("epoch", 0) or len(self._directory.trial(name).records.history())
        self._directory.append_to_journal({"trial": name, "event": "ended", "epoch": epoch, **end})
        self._view.ended(name, end["state"], end["reason"], epoch)
        self.ended.add(name)


def _why_killed(trial: Trial) -> str:
    """One line from Ray's report on the death of a process."""
    file = Path(trial.error_file) if trial.error_file else None
    text = file.read_text(encoding="utf-8", errors="replace") if file and file.exists() else ""
    if "low on memory" in (cause := describe_failure(text)):
        return f"{cause}; try fewer --max-concurrent"
    return "its process died (killed, or out of memory); --resume continues from its last checkpoint"
