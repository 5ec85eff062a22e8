"""Truth: metrics of observations are those of the whole split, whatever the pieces, and the ELBO's are training's."""

from __future__ import annotations

from unittest.mock import Mock

import numpy as np
import pytest
import torch

from tests.training.small import ALONE, NETWORKS, NUM_IMAGES, SEED, SHAPE, experiment, pixels
from vae_ray import UserError
from vae_ray.data.batches import Loader
from vae_ray.data.dataset import Split
from vae_ray.evaluation import observations
from vae_ray.evaluation.elbo import evaluate_split
from vae_ray.evaluation.evaluation import Evaluation, evaluation_of, observers_of, possible
from vae_ray.evaluation.observations import joined, observe, pieces, spread_pieces
from vae_ray.evaluation.table import ALL, METRICS, Setting, chosen, with_unit
from vae_ray.models.vae import VAE, build_vae
from vae_ray.parallel.group import shards_of

PRIORS = ["standard", "mixture", "vamp", "flow"]


def build(network: str = "mlp", prior: str = "standard", likelihood: str = "bernoulli") -> VAE:
    model = {"network": NETWORKS[network], "latent_dim": 2, "prior": prior}
    return build_vae(experiment(model=model, likelihood=likelihood), SHAPE, seed=5)


def loader() -> Loader:
    """92 images, which are more than a block of noise."""
    return Loader(Split.in_memory(pixels()), torch.arange(NUM_IMAGES).repeat(4), seed=SEED, shards=shards_of(ALONE))


def setting_of(model: VAE) -> Setting:
    return Setting(model, num_samples=60, seed=SEED, features=Mock(side_effect=UserError("features: none here")))


def evaluated(
    model: VAE, metrics: str = "elbo,nll,active-units,rates,aggregated-posterior", *, size: int = 9
) -> Evaluation:
    setting, given, names = setting_of(model), loader(), chosen(metrics)
    observers, rows = observers_of(names, setting), pieces(len(given.indices), size)
    arrays = joined([observe(model, given, piece, observers) for piece in rows])
    return evaluation_of(arrays, names, setting, split="test", labels={})


@pytest.mark.parametrize("likelihood", ["bernoulli", "discretized_logistic"])
@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_the_elbo_is_that_of_training(network: str, likelihood: str) -> None:
    model = build(network, likelihood=likelihood)
    expected = evaluate_split(model, loader(), "test", ALONE, batch_size=9)
    assert evaluated(model, "elbo").metrics == pytest.approx(expected, rel=1e-6)  # there batches are summed in float32


@pytest.mark.parametrize("prior", PRIORS)
def test_no_metric_depends_on_the_pieces(prior: str) -> None:
    model = build(prior=prior)
    whole = evaluated(model, size=NUM_IMAGES * 4)
    for size in (1, 50, 64):
        found = evaluated(model, size=size)
        assert found.metrics == pytest.approx(whole.metrics, rel=1e-5)  # float32 products of other sizes
        assert found.standard_errors == pytest.approx(whole.standard_errors, rel=1e-4)


def test_a_part_of_a_split_is_taken_from_all_over_it() -> None:
    assert spread_pieces(7, 7, size=3) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    rows = spread_pieces(60_000, 10_000)
    assert [(each.start, each.stop) for each in rows] == [(600 * n, 600 * n + 100) for n in range(100)]


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("network", ["mlp", "ladder", "conv ladder"])
def test_rates_by_dimension_add_up_to_the_rate(network: str, prior: str) -> None:
    found = evaluated(build(network, prior), "elbo,rates")
    by_dimension = found.details["test/rate_by_dimension"]
    assert len(by_dimension) == sum(shape[0] for shape in build(network).latent_shapes)
    assert sum(by_dimension) == pytest.approx(found["test/rate"], rel=1e-5)


@pytest.mark.parametrize("prior", PRIORS)
def test_mutual_information_and_marginal_kl_add_up_to_the_rate_of_the_samples(prior: str) -> None:
    model = build(prior=prior)
    found = evaluated(model, "aggregated-posterior")
    arrays = observe(model, loader(), slice(0, 92), [observations.top_group])
    mean, logvar, z = (torch.from_numpy(arrays[name]).double() for name in ("mean", "logvar", "z"))
    log_q = torch.distributions.Normal(mean, (0.5 * logvar).exp()).log_prob(z).sum(1)
    rate = float((log_q - torch.from_numpy(arrays["log_prior"]).double()).mean())
    assert found["test/mutual_information"] + found["test/marginal_kl"] == pytest.approx(
        rate, rel=1e-5
    )  # pieces of other sizes


def test_standard_errors_are_those_over_images() -> None:
    found = evaluated(build(), "elbo")
    nelbo = found.arrays["distortion"].astype(np.float64) + found.arrays["rate"]
    error = np.sqrt(((nelbo - nelbo.mean()) ** 2).sum() / 91 / 92)
    assert found.standard_errors["test/nelbo"] == pytest.approx(error, rel=1e-12)


def test_what_a_model_does_not_have_is_refused_by_name_and_left_out_of_all() -> None:
    setting = setting_of(build())

    def without_gaussian(observers: object) -> dict[str, object]:
        if observations.top_group in observers:  # type: ignore[operator]
            raise UserError("metrics: aggregated-posterior needs Gaussian posteriors, got Laplace; leave it out")
        return {}

    names, missing = possible(chosen(ALL), setting, without_gaussian, required=False)  # type: ignore[arg-type]
    left = [name for name in METRICS if name not in names]
    assert left == ["aggregated-posterior", "fid", "kid", "precision-recall", "disentanglement"]
    assert missing[0] == "metrics: aggregated-posterior needs Gaussian posteriors, got Laplace; leave it out"
    assert missing[1] == "features: none here"
    with pytest.raises(UserError, match="needs Gaussian posteriors"):
        possible(["aggregated-posterior"], setting, without_gaussian, required=True)  # type: ignore[arg-type]


def test_metrics_are_named_with_commas_or_in_a_list() -> None:
    assert chosen("nll, elbo") == chosen(["nll", "elbo"]) == ["elbo", "nll"]
    assert chosen("all") == [*METRICS]
    with pytest.raises(UserError, match=r"metrics: got 'nope', should be among elbo, nll, .*, or all"):
        chosen("elbo,nope")
    with pytest.raises(UserError, match="metrics: got 3, should be names with commas or a list of elbo"):
        chosen(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "value", "error", "text"),
    [
        ("test/nelbo", 104.2149, 0.351, "104.21 ± 0.35 nats"),
        ("test/rate_group_2", 3.0, None, "3.00 nats"),
        ("val/nll_bits_per_dim", 3.5924, 0.0123, "3.592 ± 0.012 bits/dim"),
        ("test/mse", 0.011342, 0.000211, "0.01134 ± 0.00021"),
        ("test/active_units", 21.0, None, "21"),
        ("test/prior_overlap", 0.25, None, "0.250"),
        ("test/mutual_information", -0.001, None, "0.00 nats"),
        ("test/neighbours[label]", 1.0, 0.0, "1.000 ± 0.000"),
    ],
)
def test_values_are_read_with_their_unit(key: str, value: float, error: float | None, text: str) -> None:
    assert with_unit(key, value, error) == text
