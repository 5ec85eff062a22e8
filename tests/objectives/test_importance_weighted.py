"""Truth: the bounds of IWAE and DReG and their gradients, by quadrature over the noise instead of by sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from tests.objectives.linear import LinearVae, Moments
from tests.training.small import NETWORKS, SHAPE, experiment
from vae_ray import UserError
from vae_ray.models.latents import Group
from vae_ray.models.networks import Network
from vae_ray.models.noise import latent_noise
from vae_ray.models.vae import Output, build_vae
from vae_ray.objectives import Objective
from vae_ray.objectives.base import gaussian_posterior
from vae_ray.objectives.dreg import Dreg
from vae_ray.objectives.elbo import Elbo
from vae_ray.objectives.iwae import Iwae
from vae_ray.runs.preflight import checked_model

ENCODER, OTHERS = ("a", "b", "c"), ("w", "o", "m", "s")
MODELS = {
    "learned prior": {},
    "standard prior": {"is_prior_standard": True},
    "prior by encoder": {"amortized_prior": True},
}


def moments(objective: Objective, **model: Any) -> Moments:
    return LinearVae(**model).moments(objective)


def log_evidence() -> float:
    model = LinearVae()
    w, o = model.parameters["w"], model.parameters["o"]
    return float(MultivariateNormal(o, torch.outer(w, w) + torch.eye(2).double()).log_prob(model.x))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("objective", [Iwae, Dreg])
def test_one_sample_is_the_elbo_with_its_loss_and_gradients(objective: type[Iwae | Dreg], kind: str) -> None:
    one, elbo = moments(objective(num_samples=1), **MODELS[kind]), moments(Elbo(), **MODELS[kind])
    assert one.loss == pytest.approx(elbo.loss, rel=1e-10)
    for name, expected in elbo.mean.items():
        torch.testing.assert_close(one.mean[name], expected, rtol=1e-9, atol=1e-9)


def test_the_bound_tightens_with_every_sample_and_stays_below_the_evidence() -> None:
    bounds = [-moments(Iwae(num_samples=k), is_prior_standard=True).loss for k in (1, 2, 3)]
    gaps = [log_evidence() - bound for bound in bounds]
    assert gaps[0] > 1.1 * gaps[1] > 1.1 * 1.05 * gaps[2] > 0.1


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_of_dreg_are_those_of_iwae_on_average(kind: str) -> None:
    iwae, dreg = (moments(each(num_samples=2), **MODELS[kind]) for each in (Iwae, Dreg))
    assert dreg.loss == pytest.approx(iwae.loss, rel=1e-12)
    for name, expected in iwae.mean.items():
        # both are expectations of smooth functions by the same nodes, of which the error is about 1e-9
        torch.testing.assert_close(dreg.mean[name], expected, rtol=1e-7, atol=1e-7)
    assert min(float(iwae.mean[name].abs().max()) for name in ENCODER) > 0.01


def test_gradients_of_decoder_and_prior_are_those_of_iwae_for_every_noise() -> None:
    noise = torch.tensor([[0.4, -1.3]], dtype=torch.float64)
    (_, iwae), (_, dreg) = (LinearVae().passes(each(num_samples=2), noise) for each in (Iwae, Dreg))
    assert {name for name in iwae if torch.allclose(iwae[name], dreg[name], rtol=1e-12)} == set(OTHERS)


@pytest.mark.parametrize("kind", ["learned prior", "standard prior"])
def test_gradients_of_the_encoder_are_the_squared_weights_formula_for_every_noise(kind: str) -> None:
    """sum_i (w_i / sum_j w_j)² d log w_i / dz_i dz_i / d phi (eq. 8), each factor by autograd of its definition."""
    model = LinearVae(**MODELS[kind])
    noise = torch.tensor([[0.4, -1.3, 0.9]], dtype=torch.float64)
    _, found = model.passes(Dreg(num_samples=3), noise)
    phi = {name: model.parameters[name].clone().requires_grad_() for name in ENCODER}
    w, o, m, s = (model.parameters[name] for name in OTHERS)
    prior = Normal(0.0, 1.0) if kind == "standard prior" else Normal(m, s.exp())
    mean, sigma = (model.x @ phi["a"] + phi["b"]), phi["c"].exp()
    z = mean + sigma * noise[0]
    at = z.detach().requires_grad_()
    log_likelihood = Normal(at[:, None] * w + o, 1.0).log_prob(model.x).sum(1)
    log_weights = log_likelihood + prior.log_prob(at) - Normal(mean.detach(), sigma.detach()).log_prob(at)
    (by_z,) = torch.autograd.grad(log_weights.sum(), at)
    factors = torch.softmax(log_weights.detach(), 0).square() * by_z
    expected = torch.autograd.grad(-z, list(phi.values()), factors)
    for name, gradient in zip(phi, expected, strict=True):
        torch.testing.assert_close(found[name][0], gradient, rtol=1e-12, atol=1e-14)


def test_gradients_of_the_encoder_do_not_vary_at_the_exact_posterior_under_dreg() -> None:
    """Every weight is then p(x), and every gradient 0; those of IWAE are 0 on average alone."""
    model = LinearVae(is_prior_standard=True)
    model.match_exact_posterior()
    by_iwae, by_dreg = (model.moments(each(num_samples=2)) for each in (Iwae, Dreg))
    for name in ENCODER:
        torch.testing.assert_close(by_iwae.mean[name], torch.zeros_like(by_iwae.mean[name]), rtol=0, atol=1e-9)
        assert float(by_dreg.variance[name].max()) < 1e-25
        assert float(by_iwae.variance[name].max()) > 0.01
    model.parameters["b"] += 0.3  # near it, still less
    by_iwae, by_dreg = (model.moments(each(num_samples=2)) for each in (Iwae, Dreg))
    assert all(float(by_dreg.variance[name].sum()) < 0.5 * float(by_iwae.variance[name].sum()) for name in ENCODER)


@pytest.mark.parametrize("objective", [Iwae, Dreg])
def test_the_loss_is_the_bound_written_out_and_terms_are_means_over_samples(objective: type[Iwae | Dreg]) -> None:
    noise = torch.tensor([[0.4, -1.3, 0.9], [2.0, 0.1, -0.2]], dtype=torch.float64)
    three, _ = LinearVae().passes(objective(num_samples=3), noise)
    singly = [LinearVae().passes(objective(num_samples=1), each[:, None])[0] for each in noise.T]
    weights = torch.stack([torch.exp(-terms["loss"]) for terms in singly])
    torch.testing.assert_close(three["loss"], -weights.mean(0).log(), rtol=1e-12, atol=0)
    for name in ("distortion", "rate"):
        torch.testing.assert_close(three[name], torch.stack([terms[name] for terms in singly]).mean(0))


def test_features_are_computed_once_for_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    config = experiment(objective={"name": "iwae", "num_samples": 6})
    calls: list[int] = []
    network = type(build_vae(config, SHAPE, seed=1).network)
    assert issubclass(network, Network)
    bottom_up = network.bottom_up

    def counted(self: Any, x: Any, condition: Any = None) -> Any:
        calls.append(len(x))
        return bottom_up(self, x, condition)

    model = build_vae(config, SHAPE, seed=1)
    monkeypatch.setattr(network, "bottom_up", counted)
    output = model(torch.rand(3, *SHAPE), (torch.randn(18, 2),), 6)
    assert calls == [3]
    assert isinstance(output, Output)
    assert len(output.params) == 18


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_the_first_of_five_samples_is_the_only_one_of_one(network: str) -> None:
    model = build_vae(experiment(model={"network": NETWORKS[network], "latent_dim": 2}), SHAPE, seed=1).double().eval()
    x = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = [latent_noise(model.latent_shapes, slice(0, 3), 1, "test", num_samples=k) for k in (1, 5)]
    one, five = (model(x, tuple(part.double() for part in eps), len(eps[0]) // 3) for eps in noise)
    torch.testing.assert_close(five.params[:3], one.params, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(five.params[3:6], one.params, rtol=1e-3)
    for first, only in zip(five.groups, one.groups, strict=True):
        torch.testing.assert_close(first.z[:3], only.z, rtol=1e-12, atol=1e-12)


def test_dreg_refuses_a_hierarchy_before_training() -> None:
    config = experiment(model={"network": NETWORKS["ladder"], "latent_dim": 2}, objective={"name": "dreg"})
    with pytest.raises(
        UserError, match=r"^objective: got dreg, which is for one latent group, .* has 2.*--objective iwae$"
    ):
        checked_model(config, SHAPE, num_training=9)


def test_a_posterior_of_another_kind_is_refused() -> None:
    class Other:
        pass

    group = Group(torch.zeros(1, 2), Other(), Other())  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^objective: got dreg, which needs posteriors .* not a Other; .*elbo$"):
        gaussian_posterior(group, "dreg")
