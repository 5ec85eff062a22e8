"""Images per second of the notebook's own loop and of ours, side by side. `make bench`

Every configuration computes with one torch thread per process and may use the same cores. Each round runs each
configuration once, each in a process (or Ray worker group) of its own, from fresh weights: one epoch to warm up
and one that counts. Reported are medians over rounds, and ratios.

The share of peak is the arithmetic of the matrix products that a step needs, at the measured speed, over the
fastest float32 product (accurate to 1e-5) that one thread of this machine does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import notebook_loop
from vae_ray.config.experiment import Experiment
from vae_ray.runs.train import train
from vae_ray.training.cpu_settings import FLOAT32_TOLERANCE, fastest_exact_precision, matmul_error

IMAGES = 60_000
# A dense layer of n x m weights costs 2nm flops forward, 2nm for its weights' gradient and 2nm for its
# input's, which the first layer does not need.
LAYERS = ((784, 400), (400, 100), (100, 40), (20, 100), (100, 400), (400, 784))
FLOPS_PER_IMAGE = sum(6 * n * m for n, m in LAYERS) - 2 * 784 * 400

CONFIGURATIONS = ("notebook loop", "0 workers", "1 worker", "2 workers")


def measure(configuration: str, *, root: Path, batch_size: int) -> float:
    """Images per second of the second epoch from fresh weights."""
    torch.set_num_threads(1)
    if configuration == "notebook loop":
        runs = notebook_loop.epochs(root, batch_size=batch_size, seed=0)
        next(runs)
        return IMAGES / next(runs)[2]
    with tempfile.TemporaryDirectory() as storage:
        experiment = Experiment.preset("notebook").with_overrides(
            {
                "data.root": root,
                "training.epochs": 2,
                "training.global_batch_size": batch_size,
                "training.test_every_epochs": 0,
                "workers.num": int(configuration.split()[0]),
                "workers.cpus": 1,
                "workers.device": "cpu",
                "run.storage": storage,
            }
        )
        return float(train(experiment).history[-1]["images_per_second"])


def peak_gflops() -> float:
    """The fastest accurate float32 product of one thread, over the sizes of a step at batch 512."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(fastest_exact_precision())
    assert matmul_error() <= FLOAT32_TOLERANCE
    best = 0.0
    for n, m in ((784, 400), (400, 784)):
        a, b = torch.randn(512, n), torch.randn(n, m)
        for _ in range(50):
            started = time.perf_counter()
            a @ b
            best = max(best, 2 * 512 * n * m / (time.perf_counter() - started))
    return best / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--root", type=Path, default=Path("../shared/data"), help="MNIST in torchvision's layout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--only", choices=CONFIGURATIONS, help="measure one configuration here; used for each child")
    options = parser.parse_args()
    if options.only:
        print(measure(options.only, root=options.root.absolute(), batch_size=options.batches[0]))
        return

    peak = peak_gflops()
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, float32 product peak {peak:.0f} GFLOP/s a thread")
    print(f"relative error of a product against float64: {matmul_error():.1e} (allowed {FLOAT32_TOLERANCE:.0e})")
    for batch_size in options.batches:
        speeds: dict[str, list[float]] = {name: [] for name in CONFIGURATIONS}
        loads = []
        for _ in range(options.rounds):
            for name in CONFIGURATIONS:
                loads.append(os.getloadavg()[0])
                speeds[name].append(_in_a_child(name, options.root, batch_size))
        _report(batch_size, speeds, loads, peak)


def _in_a_child(name: str, root: Path, batch_size: int) -> float:
    command = [sys.executable, "-m", "benchmarks.throughput", "--only", name, "--batches", str(batch_size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(
        [*command, "--root", str(root)], env=environment, check=True, capture_output=True, text=True
    )
    return float(output.stdout.split()[-1])


def _report(batch_size: int, speeds: dict[str, list[float]], loads: list[float], peak: float) -> None:
    median = {name: statistics.median(values) for name, values in speeds.items()}
    print(
        f"\nbatch {batch_size}, {len(speeds['notebook loop'])} rounds, load average {min(loads):.1f}-{max(loads):.1f}"
    )
    print(f"  {'':14} {'images/s':>9} {'(min - max)':>17} {'x notebook':>11} {'of peak':>8}")
    for name, values in speeds.items():
        cores = 2 if name == "2 workers" else 1
        share = median[name] * FLOPS_PER_IMAGE / (peak * 1e9 * cores)
        print(
            f"  {name:14} {median[name]:>9,.0f} {f'({min(values):,.0f} - {max(values):,.0f})':>17} "
            f"{median[name] / median['notebook loop']:>11.2f} {share:>8.0%}"
        )
    print(
        f"  Ray's cost in steady state (1 worker over 0 workers): {1 - median['1 worker'] / median['0 workers']:+.1%}; "
        f"2 workers over 1: {median['2 workers'] / median['1 worker']:.2f}x",
        flush=True,
    )


if __name__ == "__main__":
    main()
