"""`report.html`: a sweep on one page for people, complete in itself and without a network.

Everything is read from the sweep's files. The page contains its pictures and the data of its charts. Its
Content-Security-Policy names the hashes of two scripts; no other code runs, so a user's text is never code.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup

from vae_ray.config.experiment import Experiment
from vae_ray.run_files.progress import format_nats
from vae_ray.runs.results import versions
from vae_ray.storage.atomic import atomic_write
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.records import TrialRecord
from vae_ray.tuning.report.charts import sweep_charts
from vae_ray.tuning.report.trials import (
    PICTURE_KINDS,
    ReportTrial,
    as_text,
    first_keys,
    in_order,
    report_trials,
    reproduction,
    short_names,
)
from vae_ray.tuning.schedulers import rungs
from vae_ray.tuning.space import SearchSpace, Values


def write_report(directory: SweepDirectory, records: Sequence[TrialRecord], table: Sequence[dict[str, Any]]) -> None:
    """Write `report.html`; `table` is `leaderboard.rows` of `records`, best first."""
    description = directory.description()
    base = Experiment.from_dict(description["experiment"])
    space = SearchSpace.from_dict(description["search"]).checked(base)
    metrics = description["metrics"]
    split = metrics[0].partition("/")[0]
    names = [f"{split}/{term}" for term in ("nelbo", "distortion", "rate", "bits_per_dim")]
    terms = dict.fromkeys([*metrics, *names, "test/nelbo", "test/bits_per_dim"])
    columns = [term for term in terms if table and term in table[0]]
    trials = report_trials(directory, base, records, table, [*columns, *space.domains])
    epochs = max((trial.experiment.training.epochs for trial in trials), default=base.training.epochs)
    asha_rungs = rungs(epochs) if description["scheduler"] == "asha" else []
    values = {
        "directory": directory,
        "description": description,
        "base": base,
        "space": space,
        "metrics": metrics,
        "columns": columns,
        "epochs": epochs,
        "rungs": asha_rungs,
        "trials": trials,
        "best": next((trial for trial in trials if trial.is_best), None),
        "states": Counter(trial.record.state for trial in trials),
        "gallery": gallery(trials, space),
        "gallery_keys": [short_names(space.domains)[key] for key in first_keys(space.domains)],
        "picture_kinds": [kind for kind in PICTURE_KINDS if any(kind in trial.pictures for trial in trials)],
        "charts": sweep_charts(trials, space, metrics, asha_rungs),
        "bundle": Markup(_drawing_code()),
        "versions": versions(),
    }
    page = _environment().get_template("report.html.j2").render(values)
    atomic_write(directory.report, page.encode())


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


@functools.cache
def _drawing_code() -> str:
    """Vega-Lite and all that it needs, as one script."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vae_ray", "tuning/report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # `tojson` escapes <, > and &, so that no text can end the script element
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    filters: dict[str, Callable[..., str]] = {
        "text": as_text,
        "nats": lambda value: "–" if value is None else format_nats(value),
        "assignments": lambda overrides: ", ".join(f"{key} = {as_text(value)}" for key, value in overrides.items()),
        "command": reproduction,
        "quoted": shlex.quote,
        "python": repr,
        "script_hash": _script_hash,
    }
    environment.filters |= filters
    return environment


def _script_hash(script: str) -> Markup:
    """A script as the Content-Security-Policy names it."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return Markup(f"'sha256-{digest}'")
