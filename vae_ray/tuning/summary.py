"""Build the result of a sweep from its files: leaderboard, `best/`, report and summary."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vae_ray.checkpoints.saving import copy_checkpoint
from vae_ray.errors import CorruptFile, UserError
from vae_ray.inference import TrainedVAE
from vae_ray.runs.results import versions
from vae_ray.tuning import leaderboard
from vae_ray.tuning.configurations import verdict
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.evaluations import with_evaluations
from vae_ray.tuning.records import TrialRecord, read_trials
from vae_ray.tuning.report.page import write_report

logger = logging.getLogger(__name__)

OPTIONAL = ("configurations", "verdict", "evaluations")
"""Of a result, what only a sweep with repeats or evaluations has."""


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep; `to_dict` is the object that `vae-ray sweep --json` prints."""

    sweep_dir: Path | str
    """A path; of a storage that is a URI, the URI. So are the files."""
    num_trials: int
    """Of all seeds."""
    num_failed: int
    states: dict[str, int]
    """How many trials finished, were stopped, diverged, ..."""
    metrics: list[str]
    """Those by which trials are compared."""
    best: dict[str, Any]
    """`trial`, `overrides`, `checkpoint`, `metrics` and `warnings` of the winner.

    With repeats that is the best seed of the best configuration, and `seed` says which."""
    pareto_front: list[str]
    """Trials, or configurations, that are not dominated in rate and distortion."""
    leaderboard: Path | str
    report: Path | str
    seconds: float
    """Of this call."""
    versions: dict[str, str]
    configurations: list[dict[str, Any]] = field(default_factory=list)
    """With repeats, the rows of the leaderboard, best first."""
    verdict: list[str] = field(default_factory=list)
    """With repeats, lines that say how surely the first configuration is better than the second."""
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)
    """What was evaluated of trials, or the means over seeds of configurations, by name, best first."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        content = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
        return {key: value for key, value in content.items() if value or key not in OPTIONAL}


def summarize_sweep(directory: SweepDirectory, *, started_at: float, trust_code: bool) -> SweepResult:
    """Write the leaderboard, `best/`, the report and the summary of all trials as they are now."""
    description = directory.description()
    metrics, repeats = description["metrics"], description.get("repeats", 1)
    directory.pull()
    records = with_evaluations(directory, read_trials(directory))
    table = leaderboard.rows(records, metrics, directory, repeats)
    leaderboard.write_leaderboard(table, directory)
    best = install_best(records, metrics, repeats, directory, trust_code=trust_code)
    ranked = leaderboard.ranked_configurations(records, metrics, repeats) if repeats > 1 else []
    if ranked and best:
        best["seed"] = next(record.seed for record in records if record.name == best["trial"])
    states = [record.state for record in records]
    result = SweepResult(
        sweep_dir=directory.public_path(directory.path),
        num_trials=len(records),
        num_failed=sum(record.failed for record in records),
        states={state: states.count(state) for state in sorted(set(states))},
        metrics=metrics,
        best=best,
        pareto_front=[row["configuration" if ranked else "trial"] for row in table if row["pareto_front"]],
        leaderboard=directory.public_path(directory.leaderboard_csv),
        report=directory.public_path(directory.report),
        seconds=time.time() - started_at,
        versions=versions(),
        configurations=table if ranked else [],
        verdict=verdict(ranked, metrics),
        evaluations=_by_name(table, leaderboard.new_columns(records)),
    )
    directory.write_summary(result.to_dict())
    write_report(directory, records, table)  # last: if it fails, all results are written
    directory.push()
    return result


def _by_name(table: Sequence[dict[str, Any]], columns: Sequence[str]) -> dict[str, dict[str, float]]:
    """The columns of the rows that have a value in one, by configuration or trial."""
    found = {
        row.get("configuration", row["trial"]): {key: row[key] for key in columns if row[key] is not None}
        for row in table
    }
    return {name: values for name, values in found.items() if values}


def install_best(
    records: Sequence[TrialRecord], metrics: Sequence[str], repeats: int, directory: SweepDirectory, *, trust_code: bool
) -> dict[str, Any]:
    """Copy the first intact best checkpoint of a trial with a rank to `best/`; its description, empty if there is none.

    The model is judged, on test images too where no epoch was, unless it is a user's own code without `trust_code`.
    """
    for winner in leaderboard.ranked_trials(records, metrics, repeats):
        if winner.best is None or not leaderboard.is_comparable(winner, metrics):
            continue
        try:
            directory.pull(winner.best.path)
            copy_checkpoint(winner.best, directory.best)
        except CorruptFile as error:
            logger.warning("%s; trial %s is left out", error, winner.name)
            continue
        found = {key: value for key, value in winner.best.metrics.items() if "/" in key}
        found |= {key: value for key, value in winner.evaluated.items() if key in metrics}
        warnings: list[str] = []
        try:
            model = TrainedVAE.load(directory.best, trust_code=trust_code)
            if "test/nelbo" not in found:  # no epoch evaluated it
                found |= model.evaluate("test", "elbo").metrics
            warnings = model.failures()
        except UserError as error:  # its code is not trusted, or this machine has no data
            logger.warning("trial %s: its model is not examined (%s)", winner.name, error)
        return {
            "trial": winner.name,
            "overrides": winner.overrides,
            "checkpoint": str(directory.public_path(directory.best)),
            "metrics": found,
            "warnings": warnings,
        }
    return {}
