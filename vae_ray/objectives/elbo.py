"""distortion + beta * rate: the negative ELBO (Kingma & Welling 2014) and beta-VAE (Higgins et al. 2017).

With a capacity C the second term is beta * |rate - C| (Burgess et al. 2018, arXiv:1804.03599, eq. 8, where beta is
gamma); with free bits it is beta * sum_j max(lambda, rate_j) over groups or dimensions (Kingma et al. 2016,
arXiv:1606.04934, eq. 15). Both are of the global batch's mean rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from vae_ray.errors import UserError
from vae_ray.models.latents import Group
from vae_ray.models.likelihoods import Likelihood
from vae_ray.models.vae import Output
from vae_ray.objectives.base import MODEL, Losses, Objective, elbo_terms, mean_over_samples
from vae_ray.objectives.schedules import schedule_factor
from vae_ray.parallel.global_batch import GlobalBatch

Per = Literal["group", "dimension"]


class Elbo(Objective):
    """`capacity` and `free_bits` are in nats; the schedules are settings such as `LinearSchedule`, or None."""

    def __init__(
        self,
        *,
        beta: float = 1.0,
        beta_schedule: Any = None,
        capacity: float | None = None,
        capacity_schedule: Any = None,
        free_bits: float = 0.0,
        free_bits_per: Per = "group",
    ) -> None:
        super().__init__()
        self.beta, self.beta_schedule = beta, beta_schedule
        self.capacity, self.capacity_schedule = capacity, capacity_schedule
        self.free_bits, self.free_bits_per = free_bits, free_bits_per

    def settings(self, epochs: float, steps: int) -> dict[str, float]:
        values = {"beta": self.beta * schedule_factor(self.beta_schedule, epochs=epochs, steps=steps)}
        if self.capacity is not None:
            factor = schedule_factor(self.capacity_schedule, epochs=epochs, steps=steps)
            values["capacity"] = self.capacity * factor
        return values

    def losses(
        self, output: Output, x: Tensor, likelihood: Likelihood, settings: Mapping[str, float], batch: GlobalBatch
    ) -> Losses:
        distortion, rate = map(mean_over_samples, elbo_terms(output, x, likelihood))
        counted = rate
        if self.capacity is not None:
            counted = distance_from(settings["capacity"], rate, batch)
        elif self.free_bits:
            counted = with_free_bits(rates(output, self.free_bits_per), self.free_bits, batch)
        loss = distortion + settings["beta"] * counted
        return Losses({MODEL: loss.sum()}, {"loss": loss, "distortion": distortion, "rate": rate})


def distance_from(capacity: float, rate: Tensor, batch: GlobalBatch) -> Tensor:
    """Rows `(num_rows,)` whose mean over the global batch is |mean rate - capacity|, with its gradient. Collective."""
    mean = batch.sum(rate.sum()) / batch.size
    # the sign is of the whole batch, and given it the distance is a sum over rows
    return torch.sign(mean - capacity) * (rate - capacity)


def with_free_bits(rates: Tensor, free: float, batch: GlobalBatch) -> Tensor:
    """Rows `(num_rows,)` of `(num_rows, J)` whose global mean is sum_j max(free, mean of column j). Collective."""
    means = batch.sum(rates.sum(0)) / batch.size
    return torch.where(means > free, rates, free).sum(1)


def rates(output: Output, per: Per) -> Tensor:
    """The rate of each group or dimension in nats, mean over samples: `(N, J)`."""
    columns = [group.rate()[:, None] if per == "group" else _rate_of_dimensions(group) for group in output.groups]
    return mean_over_samples(torch.cat(columns, dim=1).unflatten(0, (output.num_samples, -1)))


def _rate_of_dimensions(group: Group) -> Tensor:
    """`(k * N, c)`; of spatial latents `(c, h, w)` a channel's, as in the paper."""
    assert group.posterior is not None
    elementwise = group.posterior.kl(group.prior)
    if elementwise is None:
        raise UserError(
            "objective.free_bits_per: got 'dimension', but the KL of this prior has no closed form by dimension; for "
            "example --objective.free-bits-per group, or --model.prior standard"
        )
    return elementwise.flatten(2).sum(2) if elementwise.ndim > 2 else elementwise
