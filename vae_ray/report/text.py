"""Values, keys and commands as people read them on a page."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable

from vae_ray.config.experiment import Experiment, preset_names
from vae_ray.config.keys import flag_of


def as_text(value: object) -> str:
    """A value for people: numbers to six digits, None as a dash."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """Keys without the sections in front of them, as far as they stay distinct: `beta` for `objective.beta`.

    Of an axis such as `model.network.name` what is chosen, `network`.
    """
    parts = {key: key.removesuffix(".name").split(".") for key in keys}

    def ending(key: str, num: int) -> str:
        return ".".join(parts[key][-num:])

    return {
        key: next(
            ending(key, num)
            for num in range(1, len(parts[key]) + 1)
            if num == len(parts[key]) or [ending(other, num) for other in parts].count(ending(key, num)) == 1
        )
        for key in parts
    }


def reproduction(experiment: Experiment) -> str:
    """The command that trains `experiment`: the nearest preset, and a flag for every field in which it differs."""
    flags = {name: _flags(experiment, Experiment.preset(name)) for name in preset_names()}
    nearest = min(flags, key=lambda name: len(flags[name]))
    return shlex.join(["vae-ray", "train", nearest, *flags[nearest]])


def _flags(experiment: Experiment, preset: Experiment) -> list[str]:
    defaults = preset.flat()
    return [
        word
        for key, value in experiment.flat().items()
        if key not in ("run.name", "run.storage") and value != defaults.get(key)
        for word in (flag_of(key.removesuffix(".name")), value if isinstance(value, str) else json.dumps(value))
    ]
