"""Truth: the gradients of any number of workers, for settings of the objectives that are not their defaults."""

from __future__ import annotations

from typing import Any

import pytest

from tests.training.small import check_gradients_on_workers

VARIANTS: dict[str, dict[str, Any]] = {
    # near the mean rates of the mlp (0.013 to 0.02 nats) and the ladder (0.5 to 0.8), so that parts of a batch differ
    "small capacity": {"name": "elbo", "beta": 30.0, "capacity": 0.013},
    "capacity": {"name": "elbo", "beta": 30.0, "capacity": 0.55},
    "few free bits": {"name": "elbo", "free_bits": 0.013},
    "free bits": {"name": "elbo", "free_bits": 0.3},
    "few free bits of dimensions": {"name": "elbo", "free_bits": 0.007, "free_bits_per": "dimension"},
    "free bits of dimensions": {"name": "elbo", "free_bits": 0.2, "free_bits_per": "dimension"},
    "one sample": {"name": "iwae", "num_samples": 1},
    "weighted": {"name": "beta_tc", "alpha": 0.5, "gamma": 2.0, "estimator": "weighted"},
    "weights of all parts": {"name": "beta_tc", "alpha": 0.0, "beta": 3.0, "gamma": 0.5},
    "covariance of means": {"name": "dip", "variant": "I", "beta": 0.5, "diagonal": 100.0},
    "wae": {"name": "mmd", "beta": 0.0, "weight": 10.0},
}


SIZES = (2, 3, 5)
NETWORKS = ("mlp", "ladder")
CASES = [(v, NETWORKS[(i + j) % 2], size) for i, v in enumerate(VARIANTS) for j, size in enumerate(SIZES)]
"""Every variant with every number of workers, on the two networks in turn."""


@pytest.mark.parametrize(("variant", "network", "size"), CASES)
def test_any_number_of_workers_has_the_gradients_of_one_process(variant: str, network: str, size: int) -> None:
    check_gradients_on_workers(VARIANTS[variant], network, size)
