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
from collections.abc import Callable, Sequence
from itertools import groupby
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
from vae_ray.tuning.report.trials import PICTURE_KINDS, as_text, report_trials, reproduction
from vae_ray.tuning.schedulers import rungs
from vae_ray.tuning.space import SearchSpace


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
    in_order = sorted(trials, key=lambda trial: (trial.latent_dim, trial.beta, trial.record.name))
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
        "gallery": {size: list(group) for size, group in groupby(in_order, key=lambda trial: trial.latent_dim)},
        "picture_kinds": PICTURE_KINDS,
        "charts": sweep_charts(trials, space, metrics, asha_rungs),
        "bundle": Markup(_drawing_code()),
        "versions": versions(),
    }
    page = _environment().get_template("report.html.j2").render(values)
    atomic_write(directory.report, page.encode())


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
