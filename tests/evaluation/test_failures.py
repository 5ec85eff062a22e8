"""A model that is useless although its training ended well is recognised, and a healthy one is not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from vae_ray import Experiment, train
from vae_ray.cli.main import main
from vae_ray.evaluation.diagnosis.failures import find_failures, mean_image_nats
from vae_ray.models.latents import DiagonalGaussian, Group, StandardNormal
from vae_ray.models.likelihoods import LIKELIHOODS
from vae_ray.models.vae import Output, build_vae
from vae_ray.runs.results import TrainResult


def test_the_nats_of_the_mean_image_are_its_cross_entropy() -> None:
    model = build_vae(Experiment(), (1, 8, 8), seed=0)
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mean = torch.full((1, 8, 8), 0.25, dtype=torch.float64)
    expected = -(x * math.log(0.25) + (1 - x) * math.log(0.75)).sum() / 5
    assert mean_image_nats(model, x, mean) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", sorted(LIKELIHOODS))
def test_the_nats_of_the_mean_image_are_finite_for_every_likelihood(name: str) -> None:
    model = build_vae(Experiment().with_overrides({"likelihood": name}), (1, 8, 8), seed=0)
    nats = mean_image_nats(model, torch.zeros(3, 1, 8, 8), torch.zeros(1, 8, 8))
    assert nats is not None
    assert math.isfinite(nats)


def test_a_spatial_latent_is_judged_by_its_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 16 pixels of a channel carries 0.005 nats, too little for a dimension, and the channel 0.08."""
    experiment = Experiment.from_dict({"model": {"network": {"name": "resnet", "latent": "spatial"}, "latent_dim": 2}})
    model, x = build_vae(experiment, (1, 32, 32), seed=0), torch.rand(7, 1, 32, 32)
    for nats, is_collapsed in ((0.005, False), (0.0005, True)):
        mean = torch.full((7, 2, 4, 4), math.sqrt(2 * nats))  # KL = mean^2 / 2
        group = Group(mean, DiagonalGaussian(mean, torch.zeros_like(mean)), StandardNormal(torch.zeros_like(mean)))
        output = Output(torch.zeros(7, 1, 32, 32), (group,), 1)
        monkeypatch.setattr(model, "forward", lambda *_, output=output, **__: output)
        lines = find_failures(model, x, torch.full((1, 32, 32), 0.9), experiment)
        assert any("posterior collapse" in line for line in lines) == is_collapsed


def test_a_healthy_run_has_no_warning(trained_run: TrainResult) -> None:
    assert trained_run.warnings == []


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        ({"objective.beta": 500.0}, "--objective.beta than 500"),
        ({"likelihood": "gaussian", "likelihood.scale": 3.0, "objective.beta": 1.0}, "--likelihood.scale than 3"),
    ],
)
def test_a_model_whose_code_carries_nothing_is_named(
    quick: Experiment, overrides: dict[str, Any], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(quick.with_overrides({"training.epochs": 2, **overrides}))
    (warning,) = result.warnings
    assert warning.startswith("no latent dimension carries information (posterior collapse)")
    assert warning.endswith(f"try a smaller {hint}")
    assert main(["resume", str(result.run_dir)]) == 0
    assert f"warning          {warning}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "hint"),
    [
        ({"optim.lr": 2.0, "optim.schedule": "constant", "optim.grad_clip": 1.0}, "a smaller --optim.lr than 2"),
        ({"optim.lr": 1e-12}, "a larger --optim.lr than 1e-12"),
        ({"optim.warmup_steps": 10_000_000}, "fewer --optim.warmup-steps than 10000000, or more --training.epochs"),
        ({"optim.grad_clip": 1e-30}, "a larger --optim.grad-clip than 1e-30"),
    ],
)
def test_a_model_that_is_not_better_than_the_mean_image_is_named(
    quick: Experiment, overrides: dict[str, Any], hint: str
) -> None:
    (warning,) = train(quick.with_overrides({"training.epochs": 2, **overrides})).warnings
    assert warning.startswith("the model is not better than the mean training image in place of every image: distort")
    assert warning.endswith(f"; try {hint}")


COLLAPSED: list[tuple[dict[str, Any], str]] = [
    ({"objective.beta": 0.5}, "a smaller --objective.beta than 0.5"),
    ({"objective.beta": 0.0}, "more --training.epochs"),
    ({"objective.beta": 100.0, "objective.capacity": 0.5}, "a larger --objective.capacity than 0.5"),
    ({"objective.beta": 0.01, "objective.capacity": 25.0}, "a larger --objective.beta than 0.01"),
    ({"objective.beta": 7.0, "objective.free_bits": 0.001}, "a larger --objective.free-bits than 0.001"),
    ({"objective.beta": 7.0, "objective.free_bits": 2.0}, "more --training.epochs"),
    ({"objective.beta": 7.0, "objective.free_bits": 2.0, "optim.lr": 0.5}, "a smaller --optim.lr than 0.5"),
    ({"objective": "geco", "objective.target": 40.0}, "a smaller --objective.target than 40"),
    ({"objective": "iwae"}, "more --training.epochs"),
    ({"objective": "dreg", "optim.lr": 0.5}, "a smaller --optim.lr than 0.5"),
    ({"objective": "beta_tc", "objective.beta": 6.0, "objective.gamma": 9.0}, "a smaller --objective.gamma than 9"),
    ({"objective": "dip", "objective.beta": 1.0}, "a smaller --objective.beta than 1"),
    ({"objective": "mmd"}, "more --training.epochs"),
]


@pytest.mark.parametrize(("overrides", "hint"), COLLAPSED, ids=lambda value: str(value)[:60])
def test_what_is_proposed_against_collapse_suits_the_objective(overrides: dict[str, Any], hint: str) -> None:
    experiment = Experiment().with_overrides(overrides)
    model = build_vae(experiment, (1, 8, 8), seed=0)
    for parameter in model.network.parameters():  # q(z|x) is N(0, I)
        torch.nn.init.zeros_(parameter)
    (line,) = find_failures(model, torch.rand(5, 1, 8, 8), torch.full((1, 8, 8), 0.9), experiment)
    assert line.startswith("no latent dimension carries information (posterior collapse)")
    assert line.endswith(f"; try {hint}")
    for key in [word.removeprefix("--").replace("-", "_") for word in hint.split() if word.startswith("--")]:
        assert key in experiment.flat()


COUNTED: list[tuple[dict[str, Any], float, str]] = [
    ({}, 1.0, "nelbo"),
    ({"objective.beta": 4.0}, 1.0, "nelbo"),
    ({"objective.beta": 0.25}, 0.25, "distortion + 0.25 rate"),
    ({"objective": "geco", "objective.target": 40.0}, 0.0, "distortion"),
    ({"objective": "beta_tc", "objective.alpha": 0.5}, 0.5, "distortion + 0.5 rate"),
    ({"objective.beta": 100.0, "objective.capacity": 3.0}, 1.0, "distortion + (rate - 3)"),
    ({"objective.free_bits": 0.25}, 1.0, "distortion + (rate - 0.25)"),
    ({"objective.free_bits": 0.25, "objective.free_bits_per": "dimension"}, 1.0, "distortion + (rate - 0.5)"),
]


@pytest.mark.parametrize(("overrides", "weight", "name"), COUNTED, ids=lambda value: str(value)[:60])
def test_the_rate_counts_as_in_the_loss(
    overrides: dict[str, Any], weight: float, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a posterior N(3, 1) in each of two dimensions the rate is 9 nats."""
    experiment = Experiment().with_overrides({"model.latent_dim": 2, **overrides})
    model, x = build_vae(experiment, (1, 8, 8), seed=0), torch.full((7, 1, 8, 8), 0.5)
    z = torch.full((7, 2), 3.0)
    group = Group(z, DiagonalGaussian(z, torch.zeros_like(z)), StandardNormal(torch.zeros_like(z)))
    monkeypatch.setattr(model, "forward", lambda *_, **__: Output(torch.full((7, 1, 8, 8), 0.1), (group,), 1))
    distortion = float(-model.likelihood.log_prob(torch.full((1, 1, 8, 8), 0.1), x[:1]))
    free = float(name.partition("- ")[2].removesuffix(")") or 0.0)
    (line,) = find_failures(model, x, torch.full((1, 8, 8), 0.5), experiment)
    assert f": {name} {distortion + weight * (9 - free):.5g} against " in line


def test_the_rate_of_an_autoencoder_is_not_held_against_it(quick: Experiment) -> None:
    assert train(quick.with_overrides({"objective.beta": 0.0})).warnings == []
