"""Objectives by name: one file each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vae_ray.config import user_code
from vae_ray.config.fields import Section, UserEntry
from vae_ray.objectives.base import Objective as Objective
from vae_ray.objectives.beta_tc import BetaTc
from vae_ray.objectives.dip import Dip
from vae_ray.objectives.dreg import Dreg
from vae_ray.objectives.elbo import Elbo
from vae_ray.objectives.geco import Geco
from vae_ray.objectives.iwae import Iwae
from vae_ray.objectives.mmd import Mmd

OBJECTIVES: dict[str, Callable[[Any], Objective]] = {
    # each is given the entry's settings
    "elbo": lambda config: Elbo(**_settings(config)),
    "iwae": lambda config: Iwae(**_settings(config)),
    "dreg": lambda config: Dreg(**_settings(config)),
    "beta_tc": lambda config: BetaTc(**_settings(config)),
    "dip": lambda config: Dip(**_settings(config)),
    "mmd": lambda config: Mmd(**_settings(config)),
    "geco": lambda config: Geco(**_settings(config)),
}


def _settings(config: Section) -> dict[str, Any]:
    """The fields of an entry, which are the keywords of its class."""
    return {name: getattr(config, name) for name in type(config).model_fields if name != "name"}


def build_objective(config: Any, *, seed: int = 0) -> Objective:
    """The objective of an experiment's section `objective`; its own parameters are a function of `seed` alone."""
    if isinstance(config, UserEntry):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            objective = user_code.call(config.name, config.settings, key="objective")
        return user_code.expect(objective, Objective, key="objective", path=config.name)
    return OBJECTIVES[config.name](config)
