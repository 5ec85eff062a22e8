"""Evaluations of a run, or of a sweep's best trial, are kept beside it: `evaluations/*.json`, and values by image."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vae_ray.checkpoints.finding import BEST
from vae_ray.checkpoints.loading import MANIFEST, Checkpoint
from vae_ray.errors import one_line
from vae_ray.evaluation.evaluation import Evaluation
from vae_ray.evaluation.observations import Arrays
from vae_ray.run_files.run_directory import CHECKPOINTS, SWEEP_FILE
from vae_ray.storage.directory import open_directory
from vae_ray.storage.locations import absolute, join_location, split_location
from vae_ray.storage.reading import parse_json, read_bytes
from vae_ray.storage.records import verify, with_checksum

logger = logging.getLogger(__name__)

FOLDER = "evaluations"


def owner_of(checkpoint: str) -> str | None:
    """The run or sweep that a checkpoint's path or URI, or its own, means; None of a checkpoint that lies elsewhere."""
    location = absolute(checkpoint, key="checkpoint")
    above, name = split_location(location)
    run, folder = split_location(above)
    if folder == CHECKPOINTS:
        return run
    if open_directory(location, key="checkpoint").read(MANIFEST) is None:
        return location
    is_best = name == BEST and open_directory(above, key="checkpoint").read(SWEEP_FILE) is not None
    return above if is_best else None


def keep(evaluation: Evaluation, checkpoint: Checkpoint, owner: str) -> str:
    """Write an evaluation into the run's or sweep's directory; its path or URI.

    An earlier one of the same metrics with the same labels is replaced. Raises `OSError`.
    """
    content = evaluation.to_dict()
    what = json.dumps([sorted(evaluation.metrics), evaluation.labels], sort_keys=True)
    stem = f"{checkpoint.path.name}-{evaluation.labels['split']}-{hashlib.sha256(what.encode()).hexdigest()[:8]}"
    location = join_location(owner, FOLDER)
    directory = open_directory(location, key="checkpoint")
    if table := _values_by_image(evaluation):
        sink = io.BytesIO()
        pq.write_table(table, sink)
        directory.write(f"{stem}.parquet", sink.getvalue())
    directory.write(f"{stem}.json", (json.dumps(with_checksum(content), indent=2) + "\n").encode())
    return join_location(location, f"{stem}.json")


def kept_evaluations(directory: Path) -> list[Evaluation]:
    """Those of the run or sweep in `directory`, by file name; damaged ones are left out with a warning."""
    found = [kept_evaluation(file) for file in sorted((directory / FOLDER).glob("*.json"))]
    return [evaluation for evaluation in found if evaluation is not None]


def kept_evaluation(file: Path) -> Evaluation | None:
    """That of a file, with the values of each image; None, after a warning, if it is damaged."""
    try:
        content = verify(parse_json(read_bytes(file)))
        return Evaluation(
            metrics=_numbers(content["metrics"]),
            standard_errors=_numbers(content["standard_errors"]),
            details={str(key): [float(value) for value in values] for key, values in content["details"].items()},
            labels={str(key): value for key, value in content["labels"].items()},
            warnings=[str(line) for line in content["warnings"]],
            arrays=_read_table(file.with_suffix(".parquet")),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _warn_of_damage(file, error)
        return None


def _read_table(file: Path) -> Arrays:
    """The values of each image; empty where none are kept, or, after a warning, if they are damaged."""
    try:
        table = pq.read_table(file) if file.exists() else pa.table({})
        return {name: table[name].to_numpy() for name in table.column_names}
    except (OSError, ValueError, pa.ArrowException) as error:
        _warn_of_damage(file, error)
        return {}


def _warn_of_damage(file: Path, error: Exception) -> None:
    logger.warning("%s: damaged and left out (%s); evaluate again to replace it", file, one_line(error)[:200])


def _numbers(content: dict[str, Any]) -> dict[str, float]:
    return {str(key): float(value) for key, value in content.items()}


def _values_by_image(evaluation: Evaluation) -> pa.Table | None:
    """What was observed of each image as single numbers, in the order of the split; None where that is nothing."""
    columns: dict[str, Any] = {name: each for name, each in evaluation.arrays.items() if each.ndim == 1}
    if "log_p" in evaluation.arrays:
        columns["nll"] = evaluation.by_image("nll")
    return pa.table({name: np.ascontiguousarray(each) for name, each in columns.items()}) if columns else None
