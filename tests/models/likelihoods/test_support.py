"""Truth: what is said of likelihoods on images that they are not for, and bits per dimension."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vae_ray import Experiment, TrainedVAE, train
from vae_ray.evaluation.metrics import bits_per_dim
from vae_ray.models.likelihoods import LIKELIHOODS
from vae_ray.run_files.progress import describe_epoch, format_metric
from vae_ray.runs.preflight import preflight
from vae_ray.tuning.space import SearchSpace


@pytest.fixture
def binary_images(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(1).integers(0, 2, (300, 6, 8), dtype=np.uint8) * 255
    np.save(tmp_path / "binary.npy", pixels)
    return tmp_path / "binary.npy"


@pytest.mark.parametrize("likelihood", sorted(LIKELIHOODS))
@pytest.mark.parametrize("images", ["grey", "binary", "dynamic", "fixed"])
def test_a_mismatch_of_likelihood_and_images_is_one_line(
    quick: Experiment, binary_images: Path, likelihood: str, images: str
) -> None:
    data = {"dynamic": {"data.binarize": "dynamic"}, "fixed": {"data.binarize": "fixed"}}.get(images, {})
    if images == "binary":
        data = {"data": {"source": "arrays", "root": str(binary_images)}}
    lines = preflight(quick.with_overrides({"likelihood": likelihood, **data})).warnings
    if likelihood == "bernoulli":
        expected = ["on grey levels its nats compare only with bernoulli's"] if images == "grey" else []
    elif likelihood in ("discretized_logistic", "categorical"):  # probabilities, of binary images too
        expected = []
    else:
        expected = ["--likelihood bernoulli"] if images != "grey" else []
    assert len(lines) == len(expected)
    for line, part in zip(lines, expected, strict=True):
        assert line.startswith(f"likelihood: {likelihood} is ")
        assert part in line
        assert "\n" not in line


def test_a_mismatch_is_said_once_at_the_start_of_a_run(quick: Experiment, caplog: pytest.LogCaptureFixture) -> None:
    train(quick.with_overrides({"training.epochs": 1}))
    (line,) = [record.getMessage() for record in caplog.records if "likelihood" in record.getMessage()]
    assert line.endswith("others: --data.binarize dynamic, --likelihood continuous_bernoulli")


@pytest.mark.parametrize(("likelihood", "has_bits"), [("discretized_logistic", True), ("gaussian", False)])
def test_only_a_likelihood_over_256_levels_has_bits_per_dim(quick: Experiment, likelihood: str, has_bits: bool) -> None:
    result = train(quick.with_overrides({"likelihood": likelihood, "training.epochs": 1}))
    metrics = TrainedVAE.load(result.best_checkpoint).evaluate("test")
    assert metrics.labels["support"] == ("256 levels" if has_bits else "real")
    assert ("test/bits_per_dim" in metrics) == has_bits
    assert ("val/bits_per_dim" in result.history[0]) == has_bits
    assert "train/bits_per_dim" not in result.history[0]
    assert ("bits/dim" in describe_epoch(result.history[0], 1)) == has_bits
    if has_bits:
        assert metrics["test/bits_per_dim"] == pytest.approx(metrics["test/nelbo"] / (64 * math.log(2)), rel=1e-12)
        assert result.metrics["test/bits_per_dim"] == pytest.approx(metrics["test/bits_per_dim"], rel=1e-6)


def test_bits_per_dim_of_equally_likely_levels_is_eight() -> None:
    assert bits_per_dim(3 * 5 * 7 * math.log(256), (3, 5, 7)) == pytest.approx(8, rel=1e-15)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("test/bits_per_dim", 3.5919, "3.592 bits/dim"),
        ("test/nelbo", 105.318, "105.32 nats"),
        ("test/nelbo", 7650.2, "7650.2 nats"),
    ],
)
def test_metrics_are_shown_with_their_unit(key: str, value: float, text: str) -> None:
    assert format_metric(key, value) == text


@pytest.mark.parametrize(
    ("entry", "search"),
    [
        ("gaussian", {"likelihood.sigma": {"grid": ["fixed", "learned", "optimal"]}}),
        ("laplace", {"likelihood.scale": {"loguniform": [0.05, 0.5]}}),
        ("discretized_logistic", {"likelihood.components": {"choice": [1, 5, 10]}}),
    ],
)
def test_settings_of_a_likelihood_can_be_searched(entry: str, search: dict[str, Any]) -> None:
    space = SearchSpace.from_dict(search).checked(Experiment().with_overrides({"likelihood": entry}))
    assert list(space.domains) == list(search)


def test_experiments_of_before_keep_their_fixed_scale() -> None:
    old = Experiment.from_dict({"likelihood": {"name": "gaussian", "scale": 0.3}}).likelihood
    assert old.model_dump() == {"name": "gaussian", "scale": 0.3, "sigma": "fixed", "mean": "sigmoid"}
