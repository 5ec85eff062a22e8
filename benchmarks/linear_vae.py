"""A linear VAE trained on MNIST against probabilistic PCA, whose log p(x) has a closed form.

`python -m benchmarks.linear_vae`: vae_ray's own training of a linear encoder and decoder with one learned standard
deviation. At the optimum the ELBO is log p(x) (Lucas et al. 2019, arXiv:1911.02469): 182.155 nats of a training image
with 10 latent dimensions, sigma 0.18673. That needs a decoder whose columns are orthogonal; training turns them there
faster from a large sigma, where posteriors are wide.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from vae_ray import Experiment, TrainedVAE, train
from vae_ray.data.splits import Splits

TOLERANCE_NATS = 0.5


def experiment(root: Path, storage: str, *, latent_dim: int) -> Experiment:
    """Adam 1e-2 with cosine decay, batches of 500, 20 epochs."""
    return Experiment.from_dict(
        {
            "data": {"source": "mnist", "root": str(root)},
            "model": {"network": {"name": "mlp", "hidden": []}, "latent_dim": latent_dim, "initialization": "he"},
            "likelihood": {"name": "gaussian", "sigma": "learned", "mean": "identity", "scale": 1.0},
            "optim": {"lr": 1e-2, "schedule": "cosine"},
            "training": {"epochs": 20, "global_batch_size": 500},
            "workers": {"num": 0, "device": "cpu"},
            "run": {"storage": storage, "name": "linear-vae"},
        }
    )


def principal_components(x: Tensor, latent_dim: int) -> tuple[Tensor, Tensor, float]:
    """Covariance, mean and noise variance of the highest likelihood (Tipping & Bishop 1999, eq. 7 and 8)."""
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    variance = float(values[:-latent_dim].mean())
    signal = vectors[:, -latent_dim:] * (values[-latent_dim:] - variance)
    return signal @ vectors[:, -latent_dim:].T + variance * torch.eye(x.shape[1], dtype=x.dtype), x.mean(0), variance


def mean_log_density(x: Tensor, covariance: Tensor, mean: Tensor) -> float:
    """Mean over rows of log N(x; mean, covariance); blocks of rows need little memory."""
    factor = torch.linalg.cholesky(covariance)
    squares = sum(
        float(torch.linalg.solve_triangular(factor, (part - mean).T, upper=False).square().sum())
        for part in x.split(5000)
    )
    normaliser = float(factor.diagonal().log().sum()) + 0.5 * x.shape[1] * math.log(2 * math.pi)
    return -0.5 * squares / len(x) - normaliser


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--root", type=Path, default=Path("../shared/data"), help="MNIST in torchvision's layout")
    parser.add_argument("--latent-dim", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as storage:
        config = experiment(options.root.absolute(), storage, latent_dim=options.latent_dim)
        result = train(config)
        trained = TrainedVAE.load(result.last_checkpoint)
        bounds = {split: -trained.evaluate(split)[f"{split}/nelbo"] for split in ("train", "test")}
    splits = Splits.open(config)
    images = {"train": splits.train, "test": splits.test}
    pixels = {name: split.first(len(split)).flatten(1).double() / 255 for name, split in images.items()}
    covariance, mean, variance = principal_components(pixels["train"], options.latent_dim)
    sigma = float(trained.model.likelihood.scale(mean))  # type: ignore[operator]
    print(f"q = {options.latent_dim}: {result.seconds['training']:.1f} s of training")
    print(f"sigma: trained {sigma:.5f}, closed form {math.sqrt(variance):.5f}")
    gaps = []
    for split, x in pixels.items():
        exact = mean_log_density(x, covariance, mean)
        gaps.append(exact - bounds[split])
        print(f"{split}: ELBO {bounds[split]:.3f} nats, log p(x) in closed form {exact:.3f}, gap {gaps[-1]:.3f}")
    assert abs(gaps[0]) < TOLERANCE_NATS, f"the ELBO is not within {TOLERANCE_NATS} nats of the closed form"


if __name__ == "__main__":
    main()
