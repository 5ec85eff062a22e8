"""A sweep the usual way against ours: the same 8 trials on the same 2 cores, one after the other in one run.

The usual way is that of Ray's documentation: a Tune driver function that starts a TorchTrainer of one worker for every
trial, with the notebook's loop (torchvision transforms, DataLoader, Adam, sigmoid + BCE) inside, and set up as well as
we know how: trials that hold no CPU of their own, so that two run at once, and a short poll interval. Ours is
`vae_ray.sweep`, which also evaluates, keeps checkpoints and pictures and writes the report. No trial stops early.
Both run on one local Ray that is up before; each sweep is timed from its call to its return.

    python -m benchmarks.sweep_trials [--data digits|mnist] [--epochs N]
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import vae_ray.distributed  # noqa: F401 - sets Ray's environment, before Ray is imported

# isort: split

import ray
import ray.train
import torch
from ray import tune
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets

from benchmarks.notebook_loop import TO_SIGNED, NotebookVAE, negative_elbo
from vae_ray import Experiment, sweep
from vae_ray.tuning.directory import SweepDirectory

NUM_SLOTS = 2
LATENT_DIMS, RATES, BETAS = (5, 20), (1e-3, 3e-3), (0.5, 1.0)
TRIALS = [
    {"latent_dim": latent_dim, "lr": lr, "beta": beta}
    for latent_dim, lr, beta in itertools.product(LATENT_DIMS, RATES, BETAS)
]


class Digits(Dataset[tuple[Tensor, int]]):
    """scikit-learn's digits, an image at a time through the notebook's transforms."""

    def __init__(self) -> None:
        self.images = (load_digits().images / 16 * 255).astype("uint8")[:1437]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return TO_SIGNED(self.images[index]), 0


def train_notebook(config: dict[str, Any]) -> None:
    """What the worker of a usual trial runs."""
    torch.set_num_threads(1)
    data = Digits() if config["data"] == "digits" else datasets.MNIST(config["root"], transform=TO_SIGNED)
    num_pixels = 64 if config["data"] == "digits" else 784
    model = NotebookVAE(num_pixels=num_pixels, latent_dim=config["latent_dim"])
    model = ray.train.torch.prepare_model(model)
    batches = DataLoader(data, batch_size=64, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"])
    seconds = 0.0
    for epoch in range(1, config["epochs"] + 1):
        started, total = time.perf_counter(), 0.0
        for images, _ in batches:
            x = images.view(-1, num_pixels)
            loss = negative_elbo(x, *model(x), beta=config["beta"])
            optimizer.zero_grad()
            (loss / len(x)).backward()
            optimizer.step()
            total += loss.item()
        seconds += time.perf_counter() - started
        ray.train.report({"epoch": epoch, "loss": total / len(data), "train_seconds": seconds})


def start_trainer(config: dict[str, Any]) -> None:
    """The Tune driver function of a usual trial."""
    TorchTrainer(
        train_notebook,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(num_workers=1),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=str(Path(config["storage"]) / tune.get_context().get_trial_id()),
            callbacks=[TuneReportCallback()],
        ),
    ).fit()


def usual_way(fixed: dict[str, Any], storage: str) -> tuple[float, float]:
    """(seconds, of which training summed over trials) of the usual sweep."""
    started = time.perf_counter()
    tuner = tune.Tuner(
        tune.with_resources(start_trainer, {"node:__internal_head__": 0.001}),
        param_space={
            "latent_dim": tune.grid_search(list(LATENT_DIMS)),
            "lr": tune.grid_search(list(RATES)),
            "beta": tune.grid_search(list(BETAS)),
            "storage": storage,
            **fixed,
        },
        tune_config=tune.TuneConfig(max_concurrent_trials=NUM_SLOTS),
        run_config=tune.RunConfig(name="usual", storage_path=storage, verbose=0),
    )
    results = tuner.fit()
    seconds = time.perf_counter() - started
    assert len(results) == len(TRIALS), len(results)
    assert not results.errors, results.errors
    return seconds, sum(result.metrics["train_seconds"] for result in results)


def our_way(fixed: dict[str, Any], storage: str) -> tuple[float, float]:
    """(seconds, of which training summed over trials) of `vae_ray.sweep` with the notebook's settings."""
    started = time.perf_counter()
    overrides = {
        "data.source": fixed["data"],
        "data.root": fixed["root"],
        "data.num_validation": 144 if fixed["data"] == "digits" else 5000,
        "training.epochs": fixed["epochs"],
        "workers.device": "cpu",
        "run.storage": storage,
        "run.name": "ours",
    }
    result = sweep(
        Experiment.preset("notebook").with_overrides(overrides),
        search={
            "model.latent_dim": {"grid": list(LATENT_DIMS)},
            "optim.lr": {"grid": list(RATES)},
            "objective.beta": {"grid": list(BETAS)},
        },
        searcher="grid",
        scheduler="none",
    )
    seconds = time.perf_counter() - started
    assert result.states == {"finished": len(TRIALS)}, result.states
    directory = SweepDirectory.at(result.sweep_dir, role="reader")
    names = [f"{number:04d}" for number in range(len(TRIALS))]
    return seconds, sum(line["seconds"] for name in names for line in directory.trial(name).records.history())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--root", type=Path, default=Path("../shared/data"), help="MNIST in torchvision's layout")
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    fixed = {"data": options.data, "root": str(options.root.absolute()), "epochs": options.epochs}

    print(f"{len(TRIALS)} trials of {options.epochs} epochs of {options.data}, load average {os.getloadavg()[0]:.1f}")
    # With its dashboard, as `usual_way` needs it: without, Ray's nested trials leak.
    ray.init(address="local", num_cpus=NUM_SLOTS, include_dashboard=True, log_to_driver=False, logging_level="ERROR")
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    per_hour = {}
    with tempfile.TemporaryDirectory() as storage:
        for name, way in (("usual", usual_way), ("ours", our_way)):
            seconds, training = way(fixed, storage)
            per_hour[name] = len(TRIALS) / seconds * 3600
            idle = 1 - training / (NUM_SLOTS * seconds)
            print(
                f"  {name:5}  {seconds:6.1f} s  {per_hour[name]:6.0f} trials an hour  {idle:.0%} of it not training",
                flush=True,
            )
    print(f"ours / usual: {per_hour['ours'] / per_hour['usual']:.1f}")
    ray.shutdown()


if __name__ == "__main__":
    main()
