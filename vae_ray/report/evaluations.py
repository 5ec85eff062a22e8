"""Evaluations that are kept beside a run or a sweep (`vae_ray.evaluation.store`), read back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from vae_ray.errors import one_line
from vae_ray.evaluation.evaluation import Evaluation
from vae_ray.evaluation.store import FOLDER
from vae_ray.storage.reading import parse_json, read_bytes
from vae_ray.storage.records import verify

logger = logging.getLogger(__name__)


def kept_evaluations(directory: Path) -> list[Evaluation]:
    """Those of the run or sweep in `directory`, by file name; damaged ones are left out with a warning."""
    found = []
    for file in sorted((directory / FOLDER).glob("*.json")):
        try:
            found.append(_from_dict(verify(parse_json(read_bytes(file)))))
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning("%s: damaged and left out (%s)", file, one_line(error)[:200])
    return found


def _from_dict(content: dict[str, Any]) -> Evaluation:
    return Evaluation(
        metrics=_numbers(content["metrics"]),
        standard_errors=_numbers(content["standard_errors"]),
        details={str(key): [float(value) for value in values] for key, values in content["details"].items()},
        labels={str(key): value for key, value in content["labels"].items()},
        warnings=[str(line) for line in content["warnings"]],
    )


def _numbers(content: dict[str, Any]) -> dict[str, float]:
    return {str(key): float(value) for key, value in content.items()}
