"""`report.html` of a run: how it learned, read from its files, and what its best model does with test images."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vae_ray.checkpoints.listing import best_checkpoint, complete_checkpoints
from vae_ray.checkpoints.loading import Checkpoint
from vae_ray.data.cache import name_of
from vae_ray.errors import UserError
from vae_ray.evaluation.evaluation import Evaluation
from vae_ray.evaluation.store import kept_evaluations
from vae_ray.evaluation.table import with_unit
from vae_ray.inference import TrainedVAE
from vae_ray.report.examination import Examination, examine
from vae_ray.report.latent_map import latent_maps
from vae_ray.report.page import render
from vae_ray.report.pictures import PICTURE_KINDS, data_uri, limit_of
from vae_ray.report.run_charts import (
    MAP,
    label_colors,
    latent_map,
    learning_curves,
    map_points,
    rates_by_dimension,
    setting_curves,
)
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.runs.results import versions
from vae_ray.storage.atomic import atomic_write
from vae_ray.storage.locations import absolute, split_location

REPORT = "report.html"
MOST_FRAMES = 24
"""Epochs whose samples are shown."""
NOT_SETTINGS = ("epoch", "num_images", "num_skipped", "images_per_second", "seconds", "started_at")
"""Numbers of an epoch that are no setting of the training."""


@dataclass(frozen=True)
class RunReport:
    """What `vae-ray report RUN` answers."""

    report: Path | str
    best_checkpoint: Path | str | None
    metrics: dict[str, float]
    """Of the best checkpoint, in nats per image."""
    warnings: list[str]
    """What makes the best model useless, and why a part of the page is missing."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


class Frame(NamedTuple):
    """A picture of an epoch, as a data URI."""

    epoch: int
    picture: str


def write_run_report(path: str | Path, *, trust_code: bool = False, data: Mapping[str, Any] | None = None) -> RunReport:
    """Write `RUN/report.html`; the run may be at a URI, and need not have finished.

    Where its model cannot be examined, because it has no checkpoint yet, its images are not here or its code is not
    trusted, the page says so in place of that part. Raises `UserError` if this is no run.
    """
    run = RunDirectory.at(absolute(path, key="run"), role="report")
    with run.working_copy():
        if not run.experiment_file.exists():
            raise UserError(f"run {run.location}: no such run or sweep, it has no {run.experiment_file.name}")
        checkpoints = complete_checkpoints(run.checkpoints)
        best = best_checkpoint(checkpoints) if checkpoints else None
        examination, missing = None, "the run has no complete checkpoint yet"
        if best is not None:
            examination, missing = _examination(run, trust_code=trust_code, data=data)
        page = run.path / REPORT
        atomic_write(page, render("report/run.html.j2", _values(run, best, examination, missing)))
        run.push(page)
        return RunReport(
            report=run.public_path(page),
            best_checkpoint=None if best is None else run.public_path(best.path),
            metrics={} if best is None else {key: value for key, value in best.metrics.items() if "/" in key},
            warnings=[missing] if examination is None else examination.failures,
        )


def _examination(
    run: RunDirectory, *, trust_code: bool, data: Mapping[str, Any] | None
) -> tuple[Examination | None, str]:
    """What the best model does, or why that is not known."""
    try:
        return examine(TrainedVAE.load(run.location, trust_code=trust_code, data=data)), ""
    except UserError as error:
        return None, str(error)


def _values(
    run: RunDirectory, best: Checkpoint | None, examination: Examination | None, missing: str
) -> dict[str, Any]:
    """What the page shows."""
    experiment, history, attempts = run.experiment(), run.records.history(), run.records.attempts()
    best_epoch = None if best is None else best.epoch
    charts = learning_curves(history, best_epoch)
    charts |= setting_curves(history, settings_of(history))
    rows, maps = [], []
    if examination is not None:
        details = examination.evaluation.details
        rates, variances = details["test/rate_by_dimension"], details["test/variance_of_mean"]
        charts["rates"] = rates_by_dimension(examination.latent_names, rates, variances)
        maps = latent_maps(examination.codes)
        rows = map_points(examination, maps)
        colors = label_colors(rows, [*examination.labels])
        for number, each in enumerate(maps):
            charts[f"{MAP}-{number}"] = latent_map(number, each.title, each.axes, colors)
    seconds = sum(record.get("seconds", 0.0) for record in history)
    num_images = sum(record.get("images_per_second", 0.0) * record.get("seconds", 0.0) for record in history)
    return {
        "name": split_location(run.location)[1],
        "location": run.location,
        "experiment": experiment,
        "source": name_of(experiment.data),
        "epochs_done": max((record["epoch"] for record in history), default=0),
        "is_finished": bool(run.records.summary()),
        "best": best,
        "best_location": None if best is None else run.public_path(best.path),
        "numbers": key_numbers(best, examination),
        "seconds": seconds,
        "images_per_second": num_images / seconds if seconds else None,
        "examination": examination,
        "missing": missing,
        "maps": maps,
        "evaluations": evaluations_of(run.path, examination),
        "with_unit": with_unit,
        "frames": frames(run, "samples", best_epoch, most=MOST_FRAMES),
        "pictures": {kind: frames(run, kind, best_epoch, most=1) for kind in PICTURE_KINDS[2:]},
        "last_attempt": attempts[-1] if attempts else {},
        "warnings": run.records.warnings(),
        "versions": versions(),
        "charts": charts,
        "datasets": {MAP: rows} if maps else {},
    }


def key_numbers(best: Checkpoint | None, examination: Examination | None) -> dict[str, str]:
    """The few that count, by name: of the evaluation of the best model, else what its checkpoint recorded."""
    names = ["nelbo", "distortion", "rate", "bits_per_dim"]
    if examination is not None:
        found, errors = examination.evaluation.metrics, examination.evaluation.standard_errors
    else:
        found, errors = {} if best is None else best.metrics, {}
    split = "test" if "test/nelbo" in found else "val" if "val/nelbo" in found else "train"
    keys = [f"{split}/{name}" for name in names if f"{split}/{name}" in found]
    numbers = {key.replace("/", " ").replace("_", " "): with_unit(key, found[key], errors.get(key)) for key in keys}
    if examination is not None:
        active = found[f"{split}/active_units"]
        numbers["active units"] = f"{active:.0f} of {examination.codes.shape[1]}"
    return numbers


def settings_of(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of settings that epochs recorded: `lr`, `beta`, ..."""
    names = dict.fromkeys(key for record in history for key in record if "/" not in key)
    return [name for name in names if name not in NOT_SETTINGS]


def evaluations_of(directory: Path, examination: Examination | None) -> list[Evaluation]:
    """The kept ones, and this page's own unless it is among them."""
    kept = kept_evaluations(directory)
    if examination is None:
        return kept
    own = examination.evaluation
    is_kept = any(own.labels == each.labels and own.metrics.keys() <= each.metrics.keys() for each in kept)
    return kept if is_kept else [own, *kept]


def frames(run: RunDirectory, kind: str, best_epoch: int | None, *, most: int) -> list[Frame]:
    """At most `most` epochs' pictures of a kind, evenly spread with the last and the best; one: the best epoch's."""
    files = {
        int(match[1]): file
        for file in (run.images / kind).glob("epoch=*.png")
        if (match := re.fullmatch(r"epoch=(\d{1,15})\.png", file.name))
    }
    epochs = sorted(files)
    if most == 1:
        epochs = [epoch for epoch in epochs if epoch == best_epoch]
    elif len(epochs) > most:
        # one place less, for the best
        spread = {epochs[round(n * (len(epochs) - 1) / (most - 2))] for n in range(most - 1)}
        epochs = [epoch for epoch in epochs if epoch in spread or epoch == best_epoch]
    limit = limit_of(MOST_FRAMES + len(PICTURE_KINDS))
    found = [Frame(epoch, data_uri(files[epoch].read_bytes(), limit=limit) or "") for epoch in epochs]
    return [frame for frame in found if frame.picture]
