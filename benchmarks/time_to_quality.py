"""Seconds until our `mnist` preset is as good as the notebook's loop after its 10 epochs, on one core and one thread.

`python -m benchmarks.time_to_quality`: both in one run, one after the other, pinned to one core. The quality is the
test negative ELBO (sampled z, grey-level Bernoulli, nats per image). Times are those of training alone, for both
sides without evaluation and start-up; ours counts whole epochs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from pathlib import Path

import torch

from benchmarks import notebook_loop
from vae_ray.config.experiment import Experiment
from vae_ray.runs.train import train

NOTEBOOK_EPOCHS = 10


def notebook(root: Path) -> tuple[float, float]:
    """(seconds, test nelbo) of the notebook's own loop."""
    seconds = 0.0
    runs = itertools.islice(notebook_loop.epochs(root, batch_size=64, seed=0), NOTEBOOK_EPOCHS)
    for epoch, (model, train_nelbo, epoch_seconds) in enumerate(runs, start=1):  # noqa: B007, the last is used below
        seconds += epoch_seconds
        print(f"  notebook epoch {epoch:2}  train {train_nelbo:.2f}  {epoch_seconds:.1f} s", flush=True)
    return seconds, notebook_loop.test_nelbo(model, root)


def ours(root: Path) -> list[tuple[float, float]]:
    """(seconds so far, test nelbo) of the `mnist` preset after each epoch, without Ray."""
    with tempfile.TemporaryDirectory() as storage:
        overrides = {"data.root": root, "workers.num": 0, "workers.device": "cpu", "run.storage": storage}
        history = train(Experiment.preset("mnist").with_overrides(overrides)).history
    times = itertools.accumulate(line["seconds"] for line in history)
    return [(seconds, line["test/nelbo"]) for seconds, line in zip(times, history, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--root", type=Path, default=Path("../shared/data"), help="MNIST in torchvision's layout")
    root = parser.parse_args().root.absolute()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)

    print(f"load average {os.getloadavg()[0]:.1f}")
    seconds, target = notebook(root)
    print(f"notebook loop, {NOTEBOOK_EPOCHS} epochs: {seconds:.1f} s, test nelbo {target:.2f}")
    curve = ours(root)
    for epoch, (so_far, nelbo) in enumerate(curve, start=1):
        print(f"  mnist preset epoch {epoch}  test {nelbo:.2f}  after {so_far:.1f} s")
    reached = next((so_far for so_far, nelbo in curve if nelbo <= target), None)
    if reached is None:
        print(f"the mnist preset did not reach {target:.2f}")
    else:
        print(f"{target:.2f} reached in {reached:.1f} s: 1/{seconds / reached:.1f} of the notebook loop's time")
    print(f"the whole preset: test nelbo {curve[-1][1]:.2f} in {curve[-1][0]:.1f} s, 1/{seconds / curve[-1][0]:.1f}")


if __name__ == "__main__":
    main()
