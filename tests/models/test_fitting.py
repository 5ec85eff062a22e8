"""Truth: a prior fitted to posteriors recovers their aggregate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from vae_ray import UserError
from vae_ray.models.priors import fitting
from vae_ray.models.priors.fitting import Posteriors, Standardization, empty_prior, fit_prior, log_density
from vae_ray.models.priors.mixture import MixturePrior

POSTERIOR_STD, NUM, WEIGHTS = 0.3, 3000, torch.tensor([0.2, 0.3, 0.5])
MEANS = torch.tensor([[2.0, -1.0], [-2.0, 0.5], [9.0, 3.0]])  # some lie outside of where a flow's splines act
STDS = torch.tensor([[0.5, 1.0], [1.5, 0.4], [0.8, 0.7]])


def aggregate(component: int | None = None) -> Independent | MixtureSameFamily:
    """q(z), or that of one class."""
    if component is not None:
        return Independent(Normal(MEANS[component], STDS[component]), 1)
    return MixtureSameFamily(Categorical(WEIGHTS), Independent(Normal(MEANS, STDS), 1))


@pytest.fixture(scope="module")
def posteriors() -> Posteriors:
    """Of images in three classes, whose q(z|x) add up to a mixture: means have its variances less the posteriors'."""
    noise = torch.Generator().manual_seed(3)
    classes = torch.multinomial(WEIGHTS, NUM, replacement=True, generator=noise)
    spread = (STDS.square() - POSTERIOR_STD**2).sqrt()[classes]
    mean = MEANS[classes] + spread * torch.randn(NUM, 2, generator=noise)
    return Posteriors(mean, torch.full_like(mean, 2 * math.log(POSTERIOR_STD)), classes)


def kl_to(fit: object, true: Independent | MixtureSameFamily, condition: Tensor | None = None) -> float:
    """KL(true || fit) by 4,000 samples."""
    with torch.random.fork_rng():
        torch.manual_seed(8)
        z = true.sample((4000,))
    given = None if condition is None else condition.expand(len(z), -1)
    return float((true.log_prob(z) - torch.from_numpy(log_density(fit, z, given))).mean())  # type: ignore[arg-type]


@pytest.mark.parametrize("components", [3, None])
def test_a_mixture_recovers_a_mixture(posteriors: Posteriors, components: int | None) -> None:
    fit, settings = fit_prior("mixture", posteriors._replace(classes=None), components=components, seed=1)
    assert settings["components"] >= 3
    # the KL of a fit is about its number of free parameters, 14 to 500, by twice that of 2,700 images
    assert kl_to(fit, aggregate()) < (0.02 if components else 0.1)


def test_a_mixture_of_a_conditional_model_has_weights_of_each_class(posteriors: Posteriors) -> None:
    fit, _ = fit_prior("mixture", posteriors, num_classes=4, components=3, seed=1)
    for number in range(3):
        assert kl_to(fit, aggregate(number), torch.eye(4)[number : number + 1]) < 0.05
    assert kl_to(fit, aggregate(), torch.eye(4)[3:]) < 0.05  # a class without images


@pytest.mark.parametrize("num_classes", [0, 3])
def test_a_flow_recovers_a_mixture(posteriors: Posteriors, num_classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "STEPS", 400)
    given = posteriors if num_classes else posteriors._replace(classes=None)
    fit, _ = fit_prior("flow", given, num_classes=num_classes, seed=1)
    if num_classes:
        for number in range(3):
            assert kl_to(fit, aggregate(number), torch.eye(3)[number : number + 1]) < 0.15
    else:
        # the best Gaussian is 0.7 away
        assert kl_to(fit, aggregate()) < 0.15


def test_the_first_layer_of_a_fitted_flow_is_inverted_and_has_its_log_determinant() -> None:
    layer, z = Standardization(3).double(), torch.randn(5, 3, dtype=torch.float64)
    layer.load_state_dict({"mean": torch.tensor([1.0, -2.0, 3.0]), "log_std": torch.tensor([0.5, -1.0, 2.0])})
    noise, log_det = layer(z, z[:, :0])
    torch.testing.assert_close(layer.inverse(noise, z[:, :0]), z)
    assert log_det.tolist() == [-1.5] * 5


def test_a_fit_is_a_function_of_its_seed(posteriors: Posteriors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "STEPS", 3)
    for kind in ("mixture", "flow"):
        one, again, other = (
            fit_prior(kind, posteriors, num_classes=3, seed=seed)[0].state_dict() for seed in (1, 1, 2)
        )
        assert all(torch.equal(one[name], again[name]) for name in one)
        assert any(not torch.equal(one[name], other[name]) for name in one)


def test_settings_build_a_prior_of_the_same_tensors(posteriors: Posteriors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "STEPS", 1)
    spatial = Posteriors(posteriors.mean.repeat(1, 6).view(-1, 3, 2, 2), torch.zeros(NUM, 3, 2, 2), posteriors.classes)
    for kind in ("mixture", "flow"):
        fit, settings = fit_prior(kind, spatial, num_classes=3, seed=1)
        empty_prior(kind, settings, (3, 2, 2), 3).load_state_dict(fit.state_dict())
        assert log_density(fit, spatial.mean[:7], torch.eye(3)[[0] * 7]).shape == (7,)


def test_more_components_than_codes_are_refused(posteriors: Posteriors) -> None:
    few = Posteriors(*(each[:20] if each is not None else None for each in posteriors))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="components: got 19, should be at most the 18 codes"):
        fit_prior("mixture", few, num_classes=3, components=19)
    assert isinstance(fit_prior("mixture", few, num_classes=3)[0], MixturePrior)
