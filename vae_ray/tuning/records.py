"""The state of each trial, read from its own files and from the sweep's journal.

States: `pending` (proposed, perhaps begun), `finished`, `stopped` (early, by the scheduler or its patience), and the
failures `diverged` (a loss that is not finite), `failed` (an error) and `killed` (its process died).
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vae_ray.checkpoints.listing import best_checkpoint, complete_checkpoints
from vae_ray.checkpoints.loading import Checkpoint
from vae_ray.config.experiment import Experiment, is_place_key
from vae_ray.config.sections.run import NAME_PATTERN
from vae_ray.errors import CorruptFile
from vae_ray.run_files.run_directory import TRIALS, RunDirectory
from vae_ray.storage.locations import join_location
from vae_ray.storage.reading import parse_json, read_bytes, short_repr
from vae_ray.storage.records import read_records
from vae_ray.tuning.directory import SweepDirectory

FAILURES = ("diverged", "failed", "killed")
FAILURE_FILE = "failure.json"
"""Why a trial failed, left in its directory by its own process; one that was killed leaves none."""

LINEAGE_FILE = "lineage.jsonl"
"""From whose weights a trial continued, and with which overrides; only under PBT."""


@dataclass(frozen=True)
class TrialRecord:
    """One trial, as its files describe it."""

    name: str
    proposed: dict[str, Any]
    """The overrides it began with."""
    state: str
    reason: str
    """Why it failed; empty for the others."""
    run: RunDirectory
    checkpoints: list[Checkpoint]
    """Of whole epochs, oldest first."""
    history: list[dict[str, Any]]
    """Its records of `metrics.jsonl` up to its last complete checkpoint."""
    seed: int = 0
    evaluated: Mapping[str, float] = field(default_factory=dict)
    """What evaluations of its best checkpoint have found (`evaluations.with_evaluations`)."""

    @property
    def epochs_done(self) -> int:
        return self.checkpoints[-1].epoch if self.checkpoints else 0

    @cached_property
    def best(self) -> Checkpoint | None:
        """Its best checkpoint by the selection metric, by which trials are compared too."""
        return best_checkpoint(self.checkpoints) if self.checkpoints else None

    @property
    def failed(self) -> bool:
        return self.state in FAILURES

    @property
    def has_ended(self) -> bool:
        """Whether it ended without a failure, and has a checkpoint."""
        return self.state in ("finished", "stopped") and self.best is not None

    @cached_property
    def overrides(self) -> dict[str, Any]:
        """The searched keys as the best checkpoint had them: PBT changes them during a trial."""
        return self._values_of(self.best) if self.best is not None else self.proposed

    @property
    def lineage(self) -> list[dict[str, Any]]:
        """What it adopted from other trials, oldest first: `epoch`, `weights_of` and its `overrides` from there on."""
        return read_lineage(self.run)

    @property
    def current(self) -> dict[str, Any]:
        """The overrides with which it continues: those of its newest intact checkpoint.

        Under PBT that may be another trial's. Then they are those of the adoption, or its donor's if a kill left no
        record of it.
        """
        for checkpoint in reversed(self.checkpoints):
            with contextlib.suppress(CorruptFile):
                owner = checkpoint.experiment().run.name
                adoptions = [e for e in self.lineage if (e["epoch"], e["weights_of"]) == (checkpoint.epoch, owner)]
                return dict(adoptions[-1]["overrides"]) if adoptions else self._values_of(checkpoint)
        return self.proposed

    def value(self, metric: str) -> float | None:
        """The metric of the best checkpoint, as training recorded it or else as evaluated; None without one."""
        return self.best.metrics.get(metric, self.evaluated.get(metric)) if self.best is not None else None

    @property
    def score(self) -> float:
        """The selection metric of the best checkpoint."""
        return math.inf if self.best is None else self.best.score

    def _values_of(self, checkpoint: Checkpoint) -> dict[str, Any]:
        flat = checkpoint.experiment().flat()
        return {key: flat[key] for key in self.proposed}


def read_trials(directory: SweepDirectory) -> list[TrialRecord]:
    """Every trial that was ever proposed, once, in order of its name; reads the manifests of all checkpoints."""
    experiment = Experiment.from_dict(directory.description()["experiment"], origin=str(directory.description_file))
    proposed: dict[str, dict[str, Any]] = {}
    ended: dict[str, dict[str, Any]] = {}
    for entry in read_journal(directory):
        if entry["event"] == "proposed":
            proposed.setdefault(entry["trial"], entry["overrides"])
        elif entry["event"] == "ended":
            ended[entry["trial"]] = entry
    return [
        _read_trial(directory, experiment, name, proposed[name], ended.get(name, {}))
        for name in sorted(proposed, key=lambda name: (configuration_of(name), repeat_of(name)))
    ]


def read_journal(directory: SweepDirectory) -> list[dict[str, Any]]:
    """The journal's entries, oldest first; raises `CorruptFile` for one that no sweep writes."""
    entries = directory.journal()
    for entry in entries:
        if not _is_entry(entry):
            raise CorruptFile(f"{directory.journal_file}: damaged, {short_repr(entry)} is nothing that a sweep writes")
    return entries


def _is_entry(entry: dict[str, Any]) -> bool:
    """Whether an entry of the journal is ours: of a trial inside the sweep, and of keys that can be searched."""
    name, overrides = entry.get("trial"), entry.get("overrides", {})
    return (
        isinstance(name, str)
        and re.fullmatch(NAME_PATTERN, name) is not None
        and entry.get("event") in ("proposed", "compared", "ended", "evaluated")
        and isinstance(overrides, dict)
        and not any(is_place_key(key) for key in overrides)
        and (entry["event"] != "evaluated" or _is_evaluation(entry))
    )


def _is_evaluation(entry: dict[str, Any]) -> bool:
    """Whether it names a file of the trial's own, of an epoch and of metrics."""
    file, metrics = entry.get("file"), entry.get("metrics")
    is_file = isinstance(file, str) and re.fullmatch(r"[A-Za-z0-9][\w.=-]*\.json", file, re.ASCII) is not None
    return is_file and isinstance(entry.get("epoch"), int) and isinstance(metrics, list)


def _read_trial(
    directory: SweepDirectory, experiment: Experiment, name: str, overrides: dict[str, Any], end: dict[str, Any]
) -> TrialRecord:
    run = directory.trial(name)
    checkpoints = complete_checkpoints(run.checkpoints)
    epochs_done = checkpoints[-1].epoch if checkpoints else 0
    is_whole = epochs_done >= experiment.with_overrides(overrides).training.epochs
    # A driver that was killed may have missed the end of a trial; the trial's own files have not.
    state = "finished" if is_whole else end.get("state", "pending")
    return TrialRecord(
        name=name,
        proposed=overrides,
        state=state,
        reason=end.get("reason", "") if state in FAILURES else "",
        run=run,
        checkpoints=checkpoints,
        history=[line for line in run.records.history() if line["epoch"] <= epochs_done],
        seed=experiment.run.seed + repeat_of(name),
    )


def trial_name(number: int, repeat: int = 0) -> str:
    """The name of a trial: `0003` is configuration 3 by the first seed, `0003-1` the same by the next one."""
    return f"{number:04d}-{repeat}" if repeat else f"{number:04d}"


def configuration_of(name: str) -> str:
    """The name of the configuration of a trial: that of its first trial."""
    return name.partition("-")[0]


def repeat_of(name: str) -> int:
    """How many seeds of its configuration come before a trial's."""
    repeat = name.partition("-")[2]
    return int(repeat) if re.fullmatch("[1-9][0-9]{0,8}", repeat) else 0


def trial_experiment(base: Experiment, sweep: str, name: str, overrides: dict[str, Any]) -> Experiment:
    """What the trial of that name, of the sweep at that location, trains: by a seed of its own, on the same images."""
    place = {"run.name": name, "run.storage": join_location(sweep, TRIALS)}
    repeat = repeat_of(name)
    seeds = {"run.seed": base.run.seed + repeat, "data.split_seed": base.split_seed} if repeat else {}
    return base.with_overrides({**overrides, **place, **seeds})


def read_lineage(run: RunDirectory) -> list[dict[str, Any]]:
    """The records of `lineage.jsonl`, oldest first."""
    return read_records(run.path / LINEAGE_FILE)


def read_failure(run: RunDirectory) -> dict[str, str]:
    """The state and the reason that a failed trial left; empty if it left none."""
    try:
        content = parse_json(read_bytes(run.path / FAILURE_FILE))
        return {"state": str(content["state"]), "reason": str(content["reason"])}
    except (OSError, ValueError, KeyError, TypeError, CorruptFile):
        return {}
