"""Evaluations that are kept beside a run or a sweep (`vae_ray.evaluation.store`), read back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vae_ray.errors import one_line
from vae_ray.evaluation.evaluation import Evaluation
from vae_ray.evaluation.observations import Arrays
from vae_ray.evaluation.store import FOLDER
from vae_ray.storage.reading import parse_json, read_bytes
from vae_ray.storage.records import verify

logger = logging.getLogger(__name__)


def kept_evaluations(directory: Path) -> list[Evaluation]:
    """Those of the run or sweep in `directory`, by file name; damaged ones are left out with a warning."""
    found = [kept_evaluation(file) for file in sorted((directory / FOLDER).glob("*.json"))]
    return [evaluation for evaluation in found if evaluation is not None]


def kept_evaluation(file: Path) -> Evaluation | None:
    """That of a file; None, after a warning, if it is damaged."""
    try:
        return _from_dict(verify(parse_json(read_bytes(file))), _by_image(file.with_suffix(".parquet")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, pa.ArrowException) as error:
        logger.warning("%s: damaged and left out (%s)", file, one_line(error)[:200])
        return None


def _by_image(file: Path) -> Arrays:
    """The values of each image; empty where none are kept."""
    if not file.exists():
        return {}
    table = pq.read_table(file)
    return {name: table[name].to_numpy() for name in table.column_names}


def _from_dict(content: dict[str, Any], by_image: Arrays) -> Evaluation:
    return Evaluation(
        metrics=_numbers(content["metrics"]),
        standard_errors=_numbers(content["standard_errors"]),
        details={str(key): [float(value) for value in values] for key, values in content["details"].items()},
        labels={str(key): value for key, value in content["labels"].items()},
        warnings=[str(line) for line in content["warnings"]],
        arrays=by_image,
    )


def _numbers(content: dict[str, Any]) -> dict[str, float]:
    return {str(key): float(value) for key, value in content.items()}
