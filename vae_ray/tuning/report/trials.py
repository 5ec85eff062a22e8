"""What the report shows of each trial: its row of the leaderboard and its pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vae_ray.checkpoints.listing import checkpoint_name
from vae_ray.config.experiment import Experiment
from vae_ray.report.pictures import PICTURE_KINDS, data_uri, limit_of
from vae_ray.report.text import as_text
from vae_ray.storage.records import read_records
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.records import LINEAGE_FILE, TrialRecord, trial_experiment

FIRST_KEYS = ("model.latent_dim", "objective.beta")
"""By which pictures are ordered and points are drawn, if they were searched."""


@dataclass(frozen=True)
class ReportTrial:
    """One trial of the report, or the best seed of a configuration with the configuration's row."""

    record: TrialRecord
    row: dict[str, Any]
    """Its row of the leaderboard."""
    experiment: Experiment
    """Of its best checkpoint; the proposed experiment if there is no checkpoint."""
    lineage: list[dict[str, Any]]
    """The exploits of PBT: epoch, whose weights, new overrides."""
    pictures: dict[str, str]
    """Data URIs by kind: the files of its best epoch, or smaller ones where all are too large for one page."""
    tooltip: dict[str, str]
    """Its tooltip in every chart."""

    @property
    def name(self) -> str:
        """What its row is of: a trial, or a configuration."""
        return str(self.row.get("configuration", self.record.name))

    @property
    def is_best(self) -> bool:
        return self.row["rank"] == 1

    def values(self, keys: Sequence[str]) -> dict[str, Any]:
        """The values of those of the keys that its best checkpoint has; under PBT they change."""
        flat = self.experiment.flat()
        return {key: flat[key] for key in keys if key in flat}


def report_trials(
    directory: SweepDirectory,
    base: Experiment,
    records: Sequence[TrialRecord],
    table: Sequence[dict[str, Any]],
    tooltip_columns: Sequence[str],
    *,
    with_pictures: bool = True,
) -> list[ReportTrial]:
    """The trials of the rows of a `table`, in its order; its `tooltip_columns` are the tooltip."""
    by_name = {record.name: record for record in records}
    limit = limit_of(len(PICTURE_KINDS) * sum(by_name[row["trial"]].best is not None for row in table))
    trials = []
    for row in table:
        record = by_name[row["trial"]]
        proposed = trial_experiment(base, directory.location, record.name, record.proposed)
        experiment = record.best.experiment() if record.best else proposed
        lineage = read_records(record.run.path / LINEAGE_FILE)
        tooltip = {
            column: as_text(row[column])
            for column in ("configuration", "trial", "state", *tooltip_columns)
            if column in row
        }
        pictures = _pictures(directory, record, lineage, limit=limit) if with_pictures else {}
        trials.append(ReportTrial(record, row, experiment, lineage, pictures, tooltip))
    return trials


def _pictures(
    directory: SweepDirectory, record: TrialRecord, lineage: Sequence[dict[str, Any]], *, limit: int
) -> dict[str, str]:
    """The pictures of the best epoch, each of at most `limit` bytes."""
    if record.best is None:
        return {}
    run, pictures = record.run, {}
    for exploit in lineage:
        if exploit["epoch"] == record.best.epoch:  # the trial's own pictures show the weights that it gave up
            run = directory.trial(exploit["weights_of"])
    for kind in PICTURE_KINDS:
        file = run.images / kind / f"{checkpoint_name(record.best.epoch)}.png"
        # a full disk ends no run, but loses pictures
        if file.exists() and (uri := data_uri(file.read_bytes(), limit=limit)):
            pictures[kind] = uri
    return pictures


def first_keys(keys: Iterable[str]) -> list[str]:
    """Searched keys in the order of the gallery: latent_dim, beta, and then the others as they were given."""
    order = {key: number for number, key in enumerate(FIRST_KEYS)}
    return sorted(keys, key=lambda key: order.get(key, len(order)))


def in_order(value: object) -> tuple[bool, list[float], str]:
    """By which values of a key are sorted: numbers, and lists of them, by size, and then all others as text."""
    numbers = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int | float)]
    is_numeric = len(numbers) == (len(value) if isinstance(value, list) else 1)
    return not is_numeric, numbers if is_numeric else [], "" if is_numeric else as_text(value)
