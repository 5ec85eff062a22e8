"""The smallest rate at which the distortion is at most a target (Rezende & Viola 2018, arXiv:1810.00597, GECO).

The loss is the Lagrangian rate + multiplier * (distortion - target). While the moving average of the distortion is
above the target the multiplier grows, and below it falls (algorithm 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from vae_ray.errors import UserError
from vae_ray.models.likelihoods import Likelihood
from vae_ray.models.vae import Output
from vae_ray.objectives.base import MODEL, Losses, Objective, elbo_terms, mean_over_samples
from vae_ray.parallel.global_batch import GlobalBatch

MOST_CHANGE = 0.01
"""Of the multiplier's logarithm in a step: the first distortions are far off."""
MOST_LOG = math.log(1e6)


class Geco(Objective):
    """`target` is in nats per image. The multiplier starts at 1, where gradients are elbo's; it is in checkpoints."""

    terms = ("multiplier",)
    log_multiplier: Tensor
    excess: Tensor
    """Moving average of distortion - target from 0 on, and of 1 in the same way, by which it is divided."""

    def __init__(self, *, target: float | None, decay: float = 0.99, step_size: float = 1e-4) -> None:
        super().__init__()
        if target is None:
            raise UserError(
                "objective.target: got null, should be the distortion to reach, in nats per image; for example "
                "--objective.target 100, or what a run with --objective elbo logs as distortion"
            )
        self.target, self.decay, self.step_size = target, decay, step_size
        self.register_buffer("log_multiplier", torch.zeros(()))
        self.register_buffer("excess", torch.zeros(2))

    def losses(
        self, output: Output, x: Tensor, likelihood: Likelihood, settings: Mapping[str, float], batch: GlobalBatch
    ) -> Losses:
        distortion, rate = map(mean_over_samples, elbo_terms(output, x, likelihood))
        multiplier = self.log_multiplier.exp()
        loss = rate + multiplier * (distortion - self.target)
        terms = {"loss": loss, "distortion": distortion, "rate": rate, "multiplier": multiplier.expand(len(x))}
        return Losses({MODEL: loss.sum()}, terms)

    @torch.no_grad()
    def update(self, losses: Losses, batch: GlobalBatch) -> None:
        excess = batch.sum(losses.terms["distortion"].sum()) / batch.size - self.target
        self.excess.lerp_(torch.stack([excess, torch.ones_like(excess)]).to(self.excess), 1 - self.decay)
        change = self.step_size * self.excess[0] / self.excess[1]
        self.log_multiplier.add_(change.clamp(-MOST_CHANGE, MOST_CHANGE)).clamp_(-MOST_LOG, MOST_LOG)
