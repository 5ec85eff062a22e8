"""The VAE: joins network, prior and likelihood. The one place where passes through a model are written out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vae_ray.config.experiment import Experiment
from vae_ray.models.coordinates import at_coordinates
from vae_ray.models.latents import Distribution, Group, Latents, StandardNormal
from vae_ray.models.likelihoods import Likelihood, build_likelihood
from vae_ray.models.networks import Network, build_network
from vae_ray.models.networks.base import Choose, Features
from vae_ray.models.priors import Prior, build_prior


class Output(NamedTuple):
    """One pass of N images with k samples each; rows are sample by sample, `k * N` of them."""

    params: Tensor
    """Parameters of the likelihood, `(k * N, P, H, W)`."""
    groups: tuple[Group, ...]
    """z, posterior and prior of each group, `(k * N, *shape)`, the top group first."""
    num_samples: int
    """k."""

    def rate(self) -> Tensor:
        """KL(q(z|x) || p(z)) in nats, summed over all groups: `(k * N,)`."""
        first, *others = (group.rate() for group in self.groups)
        return sum(others, start=first)

    def log_ratio(self) -> Tensor:
        """log q(z|x) - log p(z) of each sample in nats, summed over all groups: `(k * N,)`."""
        first, *others = (group.log_ratio() for group in self.groups)
        return sum(others, start=first)


class VAE(nn.Module):
    """Images are `(N, C, H, W)` in [0, 1]. Outputs are float32 (float64 of a double model), also under autocast."""

    def __init__(
        self,
        network: Network,
        prior: Prior,
        likelihood: Likelihood,
        *,
        image_shape: tuple[int, int, int],
        signed_input: bool = False,
        condition_on: str | None = None,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.condition_on, self.num_classes = condition_on, num_classes
        self.image_shape, self.signed_input = image_shape, signed_input
        self.network, self.prior, self.likelihood = network, prior, likelihood
        prior.attach(self.top_posterior)

    def with_prior(self, prior: Prior) -> VAE:
        """The same network, whose weights both share, with another prior of the top group."""
        return VAE(
            self.network,
            prior,
            self.likelihood,
            image_shape=self.image_shape,
            signed_input=self.signed_input,
            condition_on=self.condition_on,
            num_classes=self.num_classes,
        )

    @property
    def latent_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each group, the top group first."""
        return self.network.latent_shapes

    def forward(self, x: Tensor, noise: Latents, num_samples: int = 1, condition: Tensor | None = None) -> Output:
        """The pass of training: z ~ q(z|x) from the noise, `(num_samples * N, *shape)` a group.

        `condition` `(N, num_classes)` is what `condition` gives for the images' labels.
        """
        return self.sampled(self.features(x, condition), noise, num_samples, condition)

    def sampled(
        self, features: Features, noise: Latents, num_samples: int = 1, condition: Tensor | None = None
    ) -> Output:
        """The second half of `forward`, from features `(N, ...)` of images on."""
        num = num_samples * len(features[0])
        features = tuple(repeated(part, num_samples) for part in features)
        condition = None if condition is None else repeated(condition, num_samples)

        def sample(group: int, posterior: Distribution | None, prior: Distribution) -> Tensor:
            assert posterior is not None
            return posterior.rsample(noise[group])

        params, groups = self.top_down(features, sample, num, condition)
        return Output(params, groups, num_samples)

    def condition(self, labels: Mapping[str, Tensor]) -> Tensor | None:
        """One-hot rows `(N, num_classes)` of the labels that the model is conditional on; None of any other model."""
        return None if self.condition_on is None else self.one_hot(labels[self.condition_on])

    def classes_in_turn(self, num: int) -> Tensor | None:
        """One-hot rows `(num, num_classes)` of the classes 0, 1, ... again and again; None of a model without them."""
        return None if self.condition_on is None else self.one_hot(torch.arange(num) % self.num_classes)

    def one_hot(self, classes: Tensor) -> Tensor:
        """`(N, num_classes)` of whole numbers `(N,)` from 0 to num_classes - 1."""
        return torch.nn.functional.one_hot(classes.long(), self.num_classes).to(next(self.network.parameters()))

    def features(self, x: Tensor, condition: Tensor | None = None) -> Features:
        """What the network computes of the images, in the range that its encoder is fed."""
        return self.network.bottom_up(torch.add(-1.0, x, alpha=2.0) if self.signed_input else x, condition)

    def top_down(
        self, features: Features | None, choose: Choose, num: int, condition: Tensor | None = None
    ) -> tuple[Tensor, tuple[Group, ...]]:
        """Parameters and groups of `num` rows, whose z `choose(group, posterior, prior)` picks."""
        reference = next(self.network.parameters()) if features is None else features[0]
        prior = self.prior(num, reference) if condition is None else self.prior(num, reference, condition)
        return self.network.top_down(features, choose, prior, condition)

    def top_posterior(self, x: Tensor, condition: Tensor | None = None) -> Distribution | None:
        """q(z|x) of the top group alone, without dropout; None of a network that picks another group first.

        The pass ends where the top group's z would be picked. A posterior that is computed from the prior gets N(0, I).
        """

        def leave(group: int, posterior: Distribution | None, prior: Distribution) -> Tensor:
            raise _TopReached(posterior if group == 0 else None)

        with in_evaluation(self.network):
            features = self.features(x, condition)
            standard = StandardNormal(features[0].new_zeros(len(x), *self.latent_shapes[0]))
            try:
                self.network.top_down(features, leave, standard, condition)
            except _TopReached as reached:
                return reached.posterior
        return None

    def posteriors(self, x: Tensor, condition: Tensor | None = None) -> tuple[Group, ...]:
        """The groups of the images with z at the posterior mean."""
        _, groups = self.top_down(self.features(x, condition), posterior_mean, len(x), condition)
        return groups

    def reconstruct(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Means of p(x|z) at the posterior means, `(N, C, H, W)`."""
        params, _ = self.top_down(self.features(x, condition), posterior_mean, len(x), condition)
        return self.likelihood.mean(params)

    def generate(self, noise: Latents, *, temperature: float = 1.0, condition: Tensor | None = None) -> Tensor:
        """Means of p(x|z) for z from the prior, made of `noise` `(N, *shape)` a group, `(N, C, H, W)`."""

        def sample(group: int, posterior: Distribution | None, prior: Distribution) -> Tensor:
            return prior.rsample(noise[group], temperature)

        params, _ = self.top_down(None, sample, len(noise[0]), condition)
        return self.likelihood.mean(params)

    def decode(self, latents: Sequence[Tensor | None], condition: Tensor | None = None) -> Tensor:
        """Means of p(x|z) for given z, `(N, *shape)` a group; where it is None, the mean of that group's prior."""

        def given(group: int, posterior: Distribution | None, prior: Distribution) -> Tensor:
            z = latents[group]
            return prior.mean if z is None else z

        num = next(len(z) for z in latents if z is not None)
        params, _ = self.top_down(None, given, num, condition)
        return self.likelihood.mean(params)

    def decode_coordinates(self, coordinates: Latents, condition: Tensor | None = None) -> Tensor:
        """Means of p(x|z) for codes in the coordinates of `vae_ray.models.coordinates`, `(N, *shape)` a group."""

        def located(group: int, posterior: Distribution | None, prior: Distribution) -> Tensor:
            return at_coordinates(coordinates[group], prior)

        params, _ = self.top_down(None, located, len(coordinates[0]), condition)
        return self.likelihood.mean(params)


class _TopReached(Exception):
    """Ends a pass at its first choice."""

    def __init__(self, posterior: Distribution | None) -> None:
        self.posterior = posterior


@contextlib.contextmanager
def in_evaluation(module: nn.Module) -> Iterator[None]:
    """In its body `module` is in evaluation mode."""
    in_training = [each for each in module.modules() if each.training]
    module.eval()
    try:
        yield
    finally:
        for each in in_training:
            each.training = True


def repeated(t: Tensor, num_samples: int) -> Tensor:
    """`(num_samples * N, ...)` of `(N, ...)`: all rows once for each sample, sample by sample."""
    return t if num_samples == 1 else t.repeat(num_samples, *[1] * (t.ndim - 1))


def posterior_mean(group: int, posterior: Distribution | None, prior: Distribution) -> Tensor:
    """The choice of z that reconstructs: deterministic."""
    assert posterior is not None
    return posterior.mean


def build_vae(experiment: Experiment, image_shape: tuple[int, int, int], *, seed: int) -> VAE:
    """A VAE with torch's default initialisation, a function of `seed` alone; leaves the global RNG as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return new_vae(experiment, image_shape)


def shape_vae(experiment: Experiment, image_shape: tuple[int, int, int]) -> VAE:
    """The VAE without memory for its weights: for names and shapes.

    A user's own network or prior may compute with values when it is built, so it gets memory.
    """
    model = experiment.model
    if ":" in model.network.name + model.prior.name + experiment.likelihood.name:
        return build_vae(experiment, image_shape, seed=0)
    with torch.device("meta"):
        return new_vae(experiment, image_shape)


def new_vae(experiment: Experiment, image_shape: tuple[int, int, int]) -> VAE:
    """The VAE that an experiment describes, on torch's current default device (which may be meta)."""
    model = experiment.model
    likelihood = build_likelihood(experiment.likelihood)
    num_params = likelihood.num_params(image_shape[0])
    num_classes = model.num_classes or 0
    network = build_network(
        model.network,
        image_shape=image_shape,
        latent_dim=model.latent_dim,
        num_params=num_params,
        num_classes=num_classes,
    )
    return VAE(
        network,
        build_prior(model.prior, network.latent_shapes[0], image_shape=image_shape, num_classes=num_classes),
        likelihood,
        image_shape=image_shape,
        signed_input=model.encoder_range == "signed",
        condition_on=model.condition,
        num_classes=num_classes,
    )
