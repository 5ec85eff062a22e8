"""Experiments of earlier versions: their keys and values as today's Experiment has them.

0.1 had flat sections: `model.likelihood`, `model.hidden`, `training.nonfinite_limit`, ...
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vae_ray.errors import UserError

RENAMED = {
    "model.hidden": "model.network.hidden",
    "model.likelihood": "likelihood.name",
    "model.gaussian_scale": "likelihood.scale",
    "training.nonfinite_limit": "training.nonfinite.limit",
    "training.rollback_lr_factor": "training.nonfinite.lr_factor",
    "model.network.top_dim": "model.network.upper_dims",
}
"""Keys of earlier versions and what they are called today."""


def renamed_key(key: str) -> str | None:
    """Today's name of a key of an earlier version; None if it never had another one."""
    return RENAMED.get(key)


def migrated(content: Mapping[str, Any]) -> dict[str, Any]:
    """Nested plain data of any version as today's; what is not of an earlier version is returned as it is.

    Raises `UserError` for a network that there is no more.
    """
    sections = {key: dict(value) if isinstance(value, Mapping) else value for key, value in content.items()}
    model, training, data = (_section(sections, name) for name in ("model", "training", "data"))
    likelihood = dict(_section(sections, "likelihood"))
    if "hidden" in model and not isinstance(model.get("network"), Mapping):
        model["network"] = {"name": model.get("network", "mlp"), "hidden": model.pop("hidden")}
    if "top_dim" in _section(model, "network") and model["network"].get("name") == "ladder":
        raise UserError(
            "model.network: a ladder with 'top_dim' was another network; train today's, with 'upper_dims' in its place"
        )
    if "likelihood" in model or "gaussian_scale" in model:
        name, scale = model.pop("likelihood", "bernoulli"), model.pop("gaussian_scale", None)
        likelihood = {"name": name, **({"scale": scale} if name == "gaussian" and scale is not None else {})}
        sections["likelihood"] = likelihood
    if "nonfinite_limit" in training or "rollback_lr_factor" in training:
        limit, factor = training.pop("nonfinite_limit", None), training.pop("rollback_lr_factor", None)
        policy = training.get("nonfinite", "stop")
        settings = {"limit": limit if policy in ("skip", "rollback") else None}
        settings["lr_factor"] = factor if policy == "rollback" else None
        training["nonfinite"] = {"name": policy, **{key: value for key, value in settings.items() if value is not None}}
    optim = _section(sections, "optim")
    if isinstance(optim.get("schedule"), str):
        optim["schedule"] = {"name": optim["schedule"]}
    if data.get("source", "digits") == "digits" and "download" in data:
        for key in ("root", "download"):
            data.pop(key, None)
    return sections


def _section(sections: dict[str, Any], name: str) -> dict[str, Any]:
    section = sections.get(name)
    return section if isinstance(section, dict) else {}
