"""Networks by likelihood at about equal time on one core: the table of docs/models.md.

    python -m benchmarks.networks [--only mnist,ladder] [--storage DIR]

Dynamically binarized MNIST in nats, and 5,000 + 1,000 real colour JPEGs of 32 x 32 pixels in bits per dimension or,
with a Gaussian, in nats of a density. Epochs are chosen so that all networks of a block take about as long; the result
is of the test images after the last epoch. DIR keeps the runs, with their pictures. Wants an idle machine.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from vae_ray import Experiment, TrainedVAE, train

DATA: dict[str, dict[str, Any]] = {
    "mnist": {"source": "mnist", "root": "../shared/data", "binarize": "dynamic"},
    "cifar10-jpeg": {"source": "folder", "root": "../shared/data/cifar10-jpeg", "image_size": 32},
}
MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "mnist": {
        "mlp": {"network": {"name": "mlp", "hidden": [400, 200]}, "latent_dim": 32},
        "conv": {"network": {"name": "conv", "channels": [16, 32], "activation": "gelu"}, "latent_dim": 32},
        "resnet": {"network": {"name": "resnet", "channels": [16, 32], "blocks": 1}, "latent_dim": 32},
        "ladder": {
            "network": {"name": "ladder", "kind": "conv", "channels": [16, 32, 32], "latent_groups": [0, 1, 1]},
            "latent_dim": 4,
        },
    },
    "cifar10-jpeg": {
        "mlp": {"network": {"name": "mlp", "hidden": [400, 200]}, "latent_dim": 128},
        "conv": {"network": {"name": "conv", "activation": "gelu"}, "latent_dim": 128},
        "resnet": {
            "network": {"name": "resnet", "channels": [32, 64], "blocks": 1, "latent": "spatial"},
            "latent_dim": 8,
        },
        "ladder": {
            "network": {"name": "ladder", "kind": "conv", "channels": [32, 64], "latent_groups": [1, 1]},
            "latent_dim": 8,
        },
    },
}
LIKELIHOODS: dict[str, dict[str, Any]] = {
    "bernoulli": {"name": "bernoulli"},
    "discretized_logistic": {"name": "discretized_logistic"},
    "gaussian, sigma optimal": {"name": "gaussian", "sigma": "optimal"},
}

RISING_BETA = {"beta_schedule": {"name": "linear", "epochs": 1}}
"""Otherwise the lower groups of a ladder may stay unused."""


class Row(NamedTuple):
    data: str
    likelihood: str
    network: str
    epochs: int


ROWS = [
    Row("mnist", "bernoulli", "mlp", 64),
    Row("mnist", "bernoulli", "conv", 22),
    Row("mnist", "bernoulli", "resnet", 12),
    Row("mnist", "bernoulli", "ladder", 7),
    Row("cifar10-jpeg", "discretized_logistic", "mlp", 10),
    Row("cifar10-jpeg", "discretized_logistic", "conv", 18),
    Row("cifar10-jpeg", "discretized_logistic", "resnet", 13),
    Row("cifar10-jpeg", "discretized_logistic", "ladder", 10),
    Row("cifar10-jpeg", "gaussian, sigma optimal", "mlp", 80),
    Row("cifar10-jpeg", "gaussian, sigma optimal", "conv", 26),
    Row("cifar10-jpeg", "gaussian, sigma optimal", "resnet", 12),
    Row("cifar10-jpeg", "gaussian, sigma optimal", "ladder", 7),
]


def measure(row: Row, storage: Path) -> str:
    """Train on one core; a line of the table."""
    settings = {
        "data": DATA[row.data],
        "model": MODELS[row.data][row.network] | {"initialization": "he"},
        "likelihood": LIKELIHOODS[row.likelihood],
        "objective": {"name": "elbo"} | (RISING_BETA if row.network == "ladder" else {}),
        "optim": {"lr": 2e-3, "schedule": "cosine", "warmup_steps": 100, "grad_clip": 10_000},
        "training": {
            "epochs": row.epochs,
            "global_batch_size": 64 if row.data == "mnist" else 32,
            "test_every_epochs": row.epochs,
        },
        "workers": {"num": 0, "cpus": 1, "device": "cpu"},
        "run": {"storage": str(storage), "name": "-".join((row.data, row.likelihood.split(",")[0], row.network))},
    }
    result = train(Experiment.from_dict(settings))
    trained = TrainedVAE.load(result.last_checkpoint)
    num_parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    metrics = trained.evaluate("test")
    quality = f"{metrics['test/nelbo']:,.2f} nats"
    if "test/bits_per_dim" in metrics:
        quality = f"{metrics['test/bits_per_dim']:.3f} bits/dim"
    return (
        f"| {row.data} | {row.likelihood} | {row.network} | {num_parameters:,} | {row.epochs} "
        f"| {result.images_per_second:,.0f} | {result.seconds['training']:.0f} | {quality} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--only", default="", help="DATA,LIKELIHOOD,NETWORK or a part of these: rows with all the words"
    )
    parser.add_argument("--storage", type=Path, help="where the runs are kept")
    parser.add_argument("--row", type=int, help="measure one row here; used for each child")
    options = parser.parse_args()
    if options.row is not None:
        print(measure(ROWS[options.row], options.storage))
        return
    titles = ["images", "likelihood", "network", "parameters", "epochs", "images/s", "seconds", "test"]
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        storage = options.storage or Path(temporary)
        for number, row in enumerate(ROWS):
            if not all(word in " ".join(row[:3]) for word in options.only.split(",")):
                continue
            command = [sys.executable, "-m", "benchmarks.networks", "--row", str(number), "--storage", str(storage)]
            output = subprocess.run(
                command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.PIPE, text=True
            )
            print(output.stdout.splitlines()[-1], flush=True)
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
