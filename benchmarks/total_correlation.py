"""Total correlation of the aggregate posterior by objective: the preset `sprites`, one network, the same seeds.

    python -m benchmarks.total_correlation

q(z) is taken as the Gaussian of its own covariance, whose total correlation is a closed form: independent of the
estimate that beta_tc trains with. It is computed over all training images: of z, and of the posteriors' means alone,
which Locatello et al. 2019 (arXiv:1811.12359, section 5.2) found not to fall with it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from typing import Any, NamedTuple

import torch

from vae_ray import Experiment, TrainedVAE, train
from vae_ray.data.splits import Splits
from vae_ray.evaluation.disentanglement import gaussian_total_correlation
from vae_ray.models.latents import DiagonalGaussian

OBJECTIVES: dict[str, dict[str, Any]] = {
    "elbo, beta 1": {"name": "elbo"},
    "elbo, beta 4": {"name": "elbo", "beta": 4},
    "beta_tc, beta 1": {"name": "beta_tc", "beta": 1},
    "beta_tc, beta 4": {"name": "beta_tc", "beta": 4},
    "beta_tc, beta 16": {"name": "beta_tc", "beta": 16},
    "dip I": {"name": "dip", "variant": "I", "diagonal": 100},
    "dip II": {"name": "dip", "variant": "II"},
    "mmd": {"name": "mmd"},
}


class Result(NamedTuple):
    """Of one run; all but the seconds in nats."""

    nelbo: float
    rate: float
    total_correlation: float
    """Of z."""
    of_means: float
    seconds: float


def measure(objective: dict[str, Any], *, epochs: int, seed: int) -> Result:
    """Train and evaluate on one core."""
    with tempfile.TemporaryDirectory() as storage:
        preset = Experiment.preset("sprites").to_dict()
        changes = {
            "objective": objective,
            "training": preset["training"] | {"epochs": epochs},
            "workers": {"num": 0, "cpus": 1, "device": "cpu"},
            "run": {"storage": storage, "seed": seed},
        }
        result = train(Experiment.from_dict(preset | changes))
        trained = TrainedVAE.load(result.last_checkpoint)
    metrics = trained.evaluate("test")
    split, indices = Splits.open(trained.experiment).select("train")
    posteriors = [trained.posterior(split.gather(part)) for part in indices.split(1000)]
    assert all(isinstance(each, DiagonalGaussian) for each in posteriors)
    mean = torch.cat([each.mean for each in posteriors])
    variance = torch.cat([each.sigma.square() for each in posteriors])  # type: ignore[attr-defined]
    return Result(
        metrics["test/nelbo"],
        metrics["test/rate"],
        gaussian_total_correlation(mean, variance),
        gaussian_total_correlation(mean),
        result.seconds["training"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each, with the seeds 0, 1, ...; means are shown")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"load average {os.getloadavg()[0]:.1f}; seeds 0 to {options.seeds - 1}; nats; nelbo, rate of test images")
    print(
        f"{'objective':18}{'nelbo':>8}{'rate':>8}{'TC of z':>10}{'of means':>10}{'epochs':>8}{'seconds':>9}", flush=True
    )
    correlations = {}
    for name, objective in OBJECTIVES.items():
        runs = [measure(objective, epochs=options.epochs, seed=seed) for seed in range(options.seeds)]
        nelbo, rate, of_z, of_means, seconds = (statistics.mean(column) for column in zip(*runs, strict=True))
        correlations[name] = of_z
        print(
            f"{name:18}{nelbo:8.2f}{rate:8.2f}{of_z:10.4f}{of_means:10.4f}{options.epochs:8}{seconds:9.0f}", flush=True
        )
    by_beta = [correlations[f"beta_tc, beta {beta}"] for beta in (1, 4, 16)]
    print(f"load average {os.getloadavg()[0]:.1f}")
    assert by_beta[0] > by_beta[1] > by_beta[2], "the total correlation does not fall with beta_tc's beta"


if __name__ == "__main__":
    main()
