"""Likelihoods log p(x|z) by name: one file each.

The decoder gives parameters `(N, num_params, H, W)`; a likelihood says how many it needs and what they mean. Values
are in nats, summed over channels and pixels: `(N,)`. A likelihood is a module: it may have parameters of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vae_ray.config import user_code
from vae_ray.config.fields import UserEntry
from vae_ray.models.likelihoods.base import Likelihood as Likelihood
from vae_ray.models.likelihoods.bernoulli import Bernoulli as Bernoulli
from vae_ray.models.likelihoods.bernoulli import sum_softplus as sum_softplus
from vae_ray.models.likelihoods.categorical import Categorical as Categorical
from vae_ray.models.likelihoods.continuous_bernoulli import ContinuousBernoulli as ContinuousBernoulli
from vae_ray.models.likelihoods.discretized_logistic import DiscretizedLogistic as DiscretizedLogistic
from vae_ray.models.likelihoods.gaussian import Gaussian as Gaussian
from vae_ray.models.likelihoods.laplace import Laplace as Laplace

LIKELIHOODS: dict[str, Callable[..., Likelihood]] = {
    # each takes the entry's settings by keyword
    "bernoulli": Bernoulli,
    "continuous_bernoulli": ContinuousBernoulli,
    "gaussian": Gaussian,
    "laplace": Laplace,
    "discretized_logistic": DiscretizedLogistic,
    "categorical": Categorical,
}


def build_likelihood(config: Any) -> Likelihood:
    """The likelihood of an experiment's section `likelihood`."""
    if isinstance(config, UserEntry):
        likelihood = user_code.call(config.name, config.settings, key="likelihood")
        return user_code.expect(likelihood, Likelihood, key="likelihood", path=config.name)
    return LIKELIHOODS[config.name](**config.model_dump(exclude={"name"}))
