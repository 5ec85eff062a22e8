"""Objectives by name: one file each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vae_ray.config import user_code
from vae_ray.config.fields import UserEntry
from vae_ray.objectives.base import Objective as Objective
from vae_ray.objectives.elbo import Elbo
from vae_ray.objectives.mmd import Mmd

OBJECTIVES: dict[str, Callable[[Any], Objective]] = {
    # each is given the entry's settings
    "elbo": lambda config: Elbo(beta=config.beta, beta_schedule=config.beta_schedule),
    "mmd": lambda config: Mmd(beta=config.beta, weight=config.weight),
}


def build_objective(config: Any, *, seed: int = 0) -> Objective:
    """The objective of an experiment's section `objective`; its own parameters are a function of `seed` alone."""
    if isinstance(config, UserEntry):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            objective = user_code.call(config.name, config.settings, key="objective")
        return user_code.expect(objective, Objective, key="objective", path=config.name)
    return OBJECTIVES[config.name](config)
