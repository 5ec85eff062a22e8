"""`report.html` of a sweep: everything on one page, read from the sweep's files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vae_ray.config.experiment import Experiment
from vae_ray.evaluation.table import unit_of
from vae_ray.report.page import render
from vae_ray.report.pictures import PICTURE_KINDS
from vae_ray.report.text import as_text, short_names
from vae_ray.runs.results import versions
from vae_ray.storage.atomic import atomic_write
from vae_ray.tuning.configurations import Configuration, verdict
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.leaderboard import new_columns, ranked_configurations, trial_rows
from vae_ray.tuning.metrics import better, curve_metrics, value_text, without_siblings
from vae_ray.tuning.records import TrialRecord
from vae_ray.tuning.report.charts import seed_charts, sweep_charts
from vae_ray.tuning.report.trials import ReportTrial, first_keys, in_order, report_trials
from vae_ray.tuning.schedulers import rungs
from vae_ray.tuning.space import SearchSpace, Values


def write_report(directory: SweepDirectory, records: Sequence[TrialRecord], table: Sequence[dict[str, Any]]) -> None:
    """Write `report.html`; `table` is `leaderboard.rows` of `records`, best first."""
    description = directory.description()
    repeats = description.get("repeats", 1)
    base = Experiment.from_dict(description["experiment"])
    space = SearchSpace.from_dict(description["search"]).checked(base)
    metrics = description["metrics"]
    split = metrics[0].partition("/")[0]
    names = [f"{split}/{term}" for term in ("nelbo", "distortion", "rate", "bits_per_dim")]
    terms = dict.fromkeys([*metrics, *names, "test/nelbo", "test/bits_per_dim"])
    columns = [term for term in terms if table and term in table[0]]
    columns += [key for key in without_siblings(new_columns(records), metrics) if key not in columns]
    shown = [*columns, *space.domains]
    entries = trials = report_trials(directory, base, records, table, shown)
    configurations: list[Configuration] = []
    if repeats > 1:
        rows = trial_rows(records, metrics, directory, repeats)
        trials = report_trials(directory, base, records, rows, shown, with_pictures=False)
        configurations = ranked_configurations(records, metrics, repeats)
    epochs = max((trial.experiment.training.epochs for trial in trials), default=base.training.epochs)
    asha_rungs = rungs(epochs) if description["scheduler"] == "asha" else []
    values = {
        "directory": directory,
        "description": description,
        "base": base,
        "space": space,
        "metrics": metrics,
        "better": better(metrics),
        "curves_of": curve_metrics(metrics),
        "value_text": value_text,
        "unit_of": unit_of,
        "columns": columns,
        "epochs": epochs,
        "rungs": asha_rungs,
        "repeats": repeats,
        "seeds": sorted({record.seed for record in records}),
        "entries": entries,
        "trials": trials,
        "verdict": verdict(configurations, metrics),
        "best": next((entry for entry in entries if entry.is_best), None),
        "states": Counter(trial.record.state for trial in trials),
        "gallery": gallery(entries, space),
        "gallery_keys": [short_names(space.domains)[key] for key in first_keys(space.domains)],
        "picture_kinds": [kind for kind in PICTURE_KINDS if any(kind in entry.pictures for entry in entries)],
        "charts": sweep_charts(trials, entries, space, metrics, asha_rungs) | seed_charts(configurations, metrics),
        "versions": versions(),
    }
    atomic_write(directory.report, render("tuning/report/sweep.html.j2", values))


def gallery(trials: Sequence[ReportTrial], space: SearchSpace) -> dict[str, list[tuple[ReportTrial, str]]]:
    """Trials with their captions, such as `beta 0.5`, by heading, such as `latent_dim 10`; in order of their values.

    The headings are the values of the first key if it has a few; the captions are those of the others.
    """
    keys, names = first_keys(space.domains), short_names(space.domains)

    def assigned(values: Mapping[str, Any]) -> str:
        return ", ".join(f"{names[key]} {as_text(value)}" for key, value in values.items())

    num_above = 1 if len(keys) > 1 and isinstance(space.domains[keys[0]], Values) else 0
    ordered = sorted(trials, key=lambda each: ([in_order(v) for v in each.values(keys).values()], each.record.name))
    groups: dict[str, list[tuple[ReportTrial, str]]] = {}
    for trial in ordered:
        above, below = trial.values(keys[:num_above]), trial.values(keys[num_above:])
        groups.setdefault(assigned(above), []).append((trial, assigned(below)))
    return groups
