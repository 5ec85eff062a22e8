"""Truth: the mixture of discretized logistics against one written out in full, its chain of colours, its samples."""

import pytest
import torch
from torch import Tensor

from tests.models.likelihoods.small import all_levels, build, random_images, random_params
from vae_ray.models.latents import bounded
from vae_ray.models.likelihoods import DiscretizedLogistic
from vae_ray.models.likelihoods.discretized_logistic import log_mass

COMPONENTS = 7


def reference_log_prob(params: Tensor, x: Tensor) -> Tensor:
    """Salimans et al. 2017, eq. 2 and 3: differences of distribution functions, component by component, in float64."""
    num, channels = x.shape[:2]
    pixels = 2 * x - 1
    weights = torch.softmax(params[:, :COMPONENTS], dim=1)
    rest = params[:, COMPONENTS:]
    total = torch.zeros(num, *x.shape[2:], dtype=torch.float64)
    for k in range(COMPONENTS):
        means = rest[:, k * channels : (k + 1) * channels]
        start = COMPONENTS * channels
        scales = torch.exp(bounded(2 * rest[:, start + k * channels : start + (k + 1) * channels]) / 2)
        num_slopes = channels * (channels - 1) // 2
        start = 2 * COMPONENTS * channels + k * num_slopes
        slopes = torch.tanh(rest[:, start : start + num_slopes])
        probability, slope = weights[:, k], 0
        for channel in range(channels):
            mean = means[:, channel]
            for before in range(channel):
                mean = mean + slopes[:, slope] * pixels[:, before]
                slope += 1
            upper = torch.sigmoid((pixels[:, channel] + 1 / 255 - mean) / scales[:, channel])
            lower = torch.sigmoid((pixels[:, channel] - 1 / 255 - mean) / scales[:, channel])
            mass = torch.where(x[:, channel] == 0, upper, torch.where(x[:, channel] == 1, 1 - lower, upper - lower))
            probability = probability * mass
        total = total + probability
    return total.log().flatten(1).sum(1)


def test_three_channels_are_those_of_the_reference() -> None:
    likelihood = build("discretized_logistic")
    params, x = random_params(likelihood, channels=3, size=1.0), random_images(channels=3)
    torch.testing.assert_close(likelihood.log_prob(params, x), reference_log_prob(params, x), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("channels", "num"), [(1, 3), (2, 6), (3, 10), (4, 15)])
def test_number_of_parameters_is_that_of_the_paper(channels: int, num: int) -> None:
    assert DiscretizedLogistic(1).num_params(channels) == num
    assert DiscretizedLogistic(10).num_params(channels) == 10 * num


@pytest.mark.parametrize("size", [0.3, 1.0, 5.0])
def test_joint_probabilities_of_two_channels_sum_to_one(size: float) -> None:
    likelihood = build("discretized_logistic", components=3)
    params = random_params(likelihood, channels=2, size=size)[:1, :, :1, :1]
    pairs = torch.cartesian_prod(all_levels().flatten(), all_levels().flatten()).reshape(-1, 2, 1, 1)
    log_prob = likelihood.log_prob(params.expand(len(pairs), -1, -1, -1), pairs)
    assert float(log_prob.exp().sum()) == pytest.approx(1, abs=1e-10)


def test_a_chain_of_three_channels_sums_over_the_last_to_that_of_two() -> None:
    likelihood = build("discretized_logistic", components=1)
    params, x = (
        random_params(likelihood, channels=3, size=0.5)[:1, :, :1, :1],
        random_images(channels=3)[:1, :, 2:3, 2:3],
    )
    of_two = params[:, [0, 1, 2, 4, 5, 7]]  # weight, means, scales and the slope of the first two
    levels = torch.cat([x[:, :2].expand(256, -1, -1, -1), all_levels()], dim=1)
    total = likelihood.log_prob(params.expand(256, -1, -1, -1), levels).exp().sum()
    expected = likelihood.log_prob(of_two, x[:, :2]).exp().sum()
    assert float(total) == pytest.approx(float(expected), rel=1e-12)


def test_samples_of_two_channels_have_the_joint_distribution() -> None:
    """-E log p over samples is the entropy over all 65,536 pairs, and so is the covariance, which the chain makes."""
    likelihood, n = build("discretized_logistic", components=2), 40_000
    params = torch.tensor([0.3, -0.3, -0.6, 0.2, 0.5, -0.1, -1.5, -2.0, -1.0, -1.8, 2.0, -0.7], dtype=torch.float64)
    params = params[None, :, None, None]
    pairs = torch.cartesian_prod(all_levels().flatten(), all_levels().flatten()).reshape(-1, 2, 1, 1)
    log_p = likelihood.log_prob(params.expand(len(pairs), -1, -1, -1), pairs)
    samples = likelihood.sample(params.expand(n, -1, -1, -1), torch.Generator().manual_seed(1))
    log_prob = likelihood.log_prob(params.expand(n, -1, -1, -1), samples)
    assert abs(float(log_prob.mean() - (log_p.exp() * log_p).sum())) < 5 * float(log_prob.std()) / n**0.5
    products = samples[:, 0] * samples[:, 1]
    expected = float((log_p.exp() * pairs[:, 0, 0, 0] * pairs[:, 1, 0, 0]).sum())
    assert abs(float(products.mean()) - expected) < 5 * float(products.std()) / n**0.5


@pytest.mark.parametrize("log_scale", [-9.0, -5.0, -2.0, 0.0, 2.0])
def test_mean_is_that_of_the_levels_within_half_a_level(log_scale: float) -> None:
    """Also at black and white, where much of the mass is in the outermost bins."""
    likelihood = build("discretized_logistic", components=1)
    means = torch.linspace(-1.5, 1.5, 41, dtype=torch.float64)
    params = torch.stack([torch.zeros(41), means, torch.full((41,), log_scale)], dim=1)[:, :, None, None].double()
    log_prob = likelihood.log_prob(params.repeat_interleave(256, 0), all_levels().repeat(41, 1, 1, 1))
    exact = (log_prob.exp().reshape(41, 256) * all_levels().flatten()).sum(1)
    assert float((likelihood.mean(params).flatten() - exact).abs().max()) <= 0.5 / 255


@pytest.mark.parametrize("mean", [-3.0, -1.0, -0.9961, 0.0, 1.0, 40.0])
@pytest.mark.parametrize("log_scale", [-300.0, -10.0, -7.0, 0.0, 30.0])
def test_float32_is_float64_to_rounding_at_the_edges_and_for_tiny_scales(mean: float, log_scale: float) -> None:
    likelihood = build("discretized_logistic", components=1)
    params = torch.tensor([0.0, mean, log_scale])[None, :, None, None].expand(256, -1, -1, -1)
    result, expected = (likelihood.log_prob(params.to(t), all_levels().to(t)) for t in (torch.float32, torch.float64))
    # x - mean is exact to 6e-8; over the smallest scale, e^-10, that is 3e-3 of numbers of up to 9e4
    smallest_scale = max(2.718281828**log_scale, 2.718281828**-10)
    torch.testing.assert_close(
        result.double(), expected, rtol=2e-6, atol=2e-6 + 5e-7 * (1 + abs(mean)) / smallest_scale
    )


def test_derivatives_of_the_log_mass_are_those_of_its_expression() -> None:
    """In every bin, the outermost ones too, from a ninth of a level to e^5, near and far."""
    levels = torch.tensor([0, 1, 128, 254, 255])[:, None, None]
    log_scale = torch.tensor([-7.5, -4.0, -1.0, 0.5, 5.0], dtype=torch.float64)[:, None].expand(5, 5, 4)
    distance = torch.tensor([-1.9, -0.01, 0.003, 1.7], dtype=torch.float64).expand(5, 5, 4)
    given = [each.clone().requires_grad_() for each in (distance, log_scale)]

    def as_written(distance: Tensor, log_scale: Tensor) -> Tensor:
        inverse = torch.exp(-log_scale)
        above = torch.nn.functional.logsigmoid((distance + 1 / 255) * inverse) * (levels != 255)
        below = torch.nn.functional.logsigmoid((1 / 255 - distance) * inverse) * (levels != 0)
        width = torch.log(-torch.expm1(-2 / 255 * inverse)) * ((levels != 0) & (levels != 255))
        return above + below + width

    values = [function(*given) for function in (lambda d, s: log_mass(d, s, levels), as_written)]
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)
    weights = torch.rand(5, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for ours, theirs in zip(*(torch.autograd.grad((value * weights).sum(), given) for value in values), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
