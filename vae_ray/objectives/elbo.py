"""distortion + beta * rate: the negative ELBO (Kingma & Welling 2014) and beta-VAE (Higgins et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vae_ray.config.sections.schedules import LinearSchedule
from vae_ray.models.likelihoods import Likelihood
from vae_ray.models.vae import Output
from vae_ray.objectives.base import MODEL, Losses, Objective, elbo_terms, mean_over_samples
from vae_ray.parallel.global_batch import GlobalBatch


class Elbo(Objective):
    """beta may rise from 0 over the first epochs (KL annealing)."""

    def __init__(self, *, beta: float = 1.0, beta_schedule: Any = None) -> None:
        super().__init__()
        self.beta, self.beta_schedule = beta, beta_schedule

    def settings(self, epochs: float, steps: int) -> dict[str, float]:
        if isinstance(self.beta_schedule, LinearSchedule):
            return {"beta": self.beta * min(1.0, epochs / self.beta_schedule.epochs)}
        return {"beta": self.beta}

    def losses(
        self, output: Output, x: Tensor, likelihood: Likelihood, settings: Mapping[str, float], batch: GlobalBatch
    ) -> Losses:
        distortion, rate = map(mean_over_samples, elbo_terms(output, x, likelihood))
        loss = distortion + settings["beta"] * rate
        return Losses({MODEL: loss.sum()}, {"loss": loss, "distortion": distortion, "rate": rate})
