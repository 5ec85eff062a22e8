"""`report.html`: a sweep on one page for people, complete in itself and without a network.

Everything is read from the sweep's files. Pictures and charts' data stand in the page; the only scripts that its
Content-Security-Policy lets run are the two whose hashes it names, so that no text of a user, however it got in,
is ever code.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import shlex
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jinja2
import vl_convert
from markupsafe import Markup

from vae_ray.checkpoints.loading import checkpoint_name
from vae_ray.config.experiment import Experiment, preset_names
from vae_ray.config.keys import flag_of
from vae_ray.runs.results import versions
from vae_ray.storage.atomic import atomic_write
from vae_ray.tuning.directory import SweepDirectory, json_lines
from vae_ray.tuning.records import LINEAGE_FILE, TrialRecord
from vae_ray.tuning.report import charts
from vae_ray.tuning.report.scales import Spec, is_finite, shown
from vae_ray.tuning.schedulers import rungs
from vae_ray.tuning.space import SearchSpace

TEMPLATE = "report.html.j2"
PICTURES = ("samples", "reconstructions", "traversals")
PLACE_KEYS = ("run.name", "run.storage")


class Picture(NamedTuple):
    """A PNG file in the page."""

    data_uri: str
    width: int
    height: int


@dataclass(frozen=True)
class ShownTrial:
    """A trial as the page shows it."""

    record: TrialRecord
    row: dict[str, Any]
    """Its row of the leaderboard."""
    experiment: Experiment
    """Of its best checkpoint; what it would have been where there is none."""
    pictures: dict[str, Picture]
    """By kind; empty if it did not live to see an epoch's end."""
    lineage: list[dict[str, Any]]
    """What it took over from other trials; only under PBT."""

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def beta(self) -> float:
        return float(self.experiment.flat().get("objective.beta", 1.0))

    @property
    def latent_dim(self) -> int:
        return self.experiment.model.latent_dim

    @property
    def command(self) -> str:
        """What trains it again from the start; under PBT there is no such command."""
        return reproduction(self.experiment)


def write_report(directory: SweepDirectory, records: Sequence[TrialRecord], table: Sequence[dict[str, Any]]) -> None:
    """Write `report.html`; `table` is `leaderboard.rows` of `records`, best first."""
    atomic_write(directory.report, _page(directory, records, table).encode())


def _page(directory: SweepDirectory, records: Sequence[TrialRecord], table: Sequence[dict[str, Any]]) -> str:
    description = directory.description()
    base = Experiment.from_dict(description["experiment"])
    space = SearchSpace.from_dict(description["search"]).checked(base)
    metrics: list[str] = description["metrics"]
    trials = _shown_trials(directory, base, records, table)
    columns = _metric_columns(table, metrics)
    epochs = max((trial.experiment.training.epochs for trial in trials), default=base.training.epochs)
    at_rungs = rungs(epochs) if description.get("scheduler") == "asha" else []
    values = {
        "directory": directory,
        "description": description,
        "base": base,
        "base_command": reproduction(base),
        "space": space,
        "metrics": metrics,
        "columns": columns,
        "epochs": epochs,
        "rungs": at_rungs,
        "trials": trials,
        "winner": next((trial for trial in trials if trial.row["rank"] is not None), None),
        "failed": [trial for trial in trials if trial.record.failed],
        "states": Counter(trial.record.state for trial in trials),
        "gallery": _by_latent_dim(trials),
        "picture_kinds": PICTURES,
        "charts": _charts(trials, space, metrics, tooltip_columns=[*columns, *space.domains], rungs=at_rungs),
        "bundle": Markup(_drawing_code()),
        "versions": versions(),
    }
    return _environment().get_template(TEMPLATE).render(values)


def _shown_trials(
    directory: SweepDirectory, base: Experiment, records: Sequence[TrialRecord], table: Sequence[dict[str, Any]]
) -> list[ShownTrial]:
    """All trials in the order of the leaderboard."""
    by_name = {record.name: record for record in records}
    trials = []
    for row in table:
        record = by_name[row["trial"]]
        experiment = record.best.experiment() if record.best else base.with_overrides(record.proposed)
        lineage = _lineage(record)
        trials.append(ShownTrial(record, row, experiment, _pictures(directory, record, lineage), lineage))
    return trials


def _pictures(directory: SweepDirectory, record: TrialRecord, lineage: Sequence[dict[str, Any]]) -> dict[str, Picture]:
    """The pictures of the best epoch, byte for byte; of the last epoch where that one has none."""
    if record.best is None:
        return {}
    run, found = record.run, {}
    for step in lineage:
        if step["epoch"] == record.best.epoch:  # taken over: its own pictures show the weights that it gave up
            run = directory.trial(step["weights_of"])
    for kind in PICTURES:
        files = {file.stem: file for file in sorted((run.images / kind).glob("epoch=*.png"))}
        if files:
            content = files.get(checkpoint_name(record.best.epoch), list(files.values())[-1]).read_bytes()
            width, height = struct.unpack(">II", content[16:24])  # of the header, which comes first
            data_uri = "data:image/png;base64," + base64.b64encode(content).decode("ascii")
            found[kind] = Picture(data_uri, width, height)
    return found


def _lineage(record: TrialRecord) -> list[dict[str, Any]]:
    return json_lines(record.run.path / LINEAGE_FILE)


def _metric_columns(table: Sequence[dict[str, Any]], metrics: Sequence[str]) -> list[str]:
    """The leaderboard's metrics for people: those by which trials are compared, their parts, and the test's."""
    split = metrics[0].partition("/")[0]
    wanted = [*metrics, *(f"{split}/{term}" for term in ("nelbo", "distortion", "rate")), "test/nelbo"]
    return [column for column in dict.fromkeys(wanted) if table and column in table[0]]


def _by_latent_dim(trials: Sequence[ShownTrial]) -> dict[int, list[ShownTrial]]:
    """The gallery's groups in order of latent_dim, each in order of beta."""
    groups: dict[int, list[ShownTrial]] = {}
    for trial in sorted(trials, key=lambda trial: (trial.latent_dim, trial.beta, trial.name)):
        groups.setdefault(trial.latent_dim, []).append(trial)
    return groups


def _charts(
    trials: Sequence[ShownTrial],
    space: SearchSpace,
    metrics: Sequence[str],
    *,
    tooltip_columns: Sequence[str],
    rungs: Sequence[int],
) -> dict[str, Spec]:
    """Vega-Lite specifications by the id of their place on the page; without those that would be empty."""
    records, table = [trial.record for trial in trials], [trial.row for trial in trials]
    experiments = {trial.name: trial.experiment for trial in trials}
    found = {
        f"curves-{number}": charts.learning_curves(records, table, metric, tooltip_columns=tooltip_columns, rungs=rungs)
        for number, metric in enumerate(metrics)
    }
    found["parallel"] = charts.parallel_coordinates(table, space, metrics, tooltip_columns=tooltip_columns)
    found["plane"] = charts.rate_distortion(table, experiments, metrics, tooltip_columns=tooltip_columns)
    return {name: spec for name, spec in found.items() if spec is not None}


def reproduction(experiment: Experiment) -> str:
    """The command that trains `experiment`: the nearest preset, and a flag for every field in which it differs."""
    commands = {name: _flags(experiment, Experiment.preset(name)) for name in preset_names()}
    nearest = min(commands, key=lambda name: len(commands[name]))
    return shlex.join(["vae-ray", "train", nearest, *commands[nearest]])


def _flags(experiment: Experiment, preset: Experiment) -> list[str]:
    given = preset.flat()
    differing = {key: value for key, value in experiment.flat().items() if value != given.get(key)}
    return [
        word
        for key, value in differing.items()
        if key not in PLACE_KEYS
        for word in (flag_of(key.removesuffix(".name")), _flag_value(value))
    ]


def _flag_value(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


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
    environment.filters |= {
        "shown": shown,
        "nats": _nats,
        "said": lambda overrides: ", ".join(f"{key} = {shown(value)}" for key, value in overrides.items()),
        "quoted": shlex.quote,
        "python": repr,
        "short": lambda key: key.rpartition(".")[2],
        "script_hash": _script_hash,
    }
    return environment


def _nats(value: object) -> str:
    return f"{value:.2f}" if is_finite(value) else "–"


def _script_hash(script: str) -> Markup:
    """A script as the Content-Security-Policy names it."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return Markup(f"'sha256-{digest}'")
