"""Settings of the priors."""

from __future__ import annotations

from typing import Annotated, Literal

from vae_ray.config.fields import Choice, Section, UserEntry


class StandardPrior(Section):
    """N(0, I)."""

    name: Literal["standard"] = "standard"


Prior = Annotated[StandardPrior | UserEntry, Choice("prior")]
