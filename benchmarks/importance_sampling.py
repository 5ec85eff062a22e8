"""-log p(x) of MNIST's test images by importance sampling: seconds, and the share of the machine's matrix products.

    python -m benchmarks.importance_sampling RUN                    # of the preset iwae: 10,000 images by 5,000 samples

What must be computed is the decoder's products. Their share of the peak, the fastest float32 product of one thread
times the cores, is printed for the products alone (profiled on one core) and for the whole evaluation.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.throughput import peak_gflops
from vae_ray import TrainedVAE
from vae_ray.distributed.evaluation import on_ray

IMAGES, SAMPLES = 64, 500
"""That are profiled."""


def decoder_flops(vae: TrainedVAE) -> int:
    """Of one sample of one image: 2nm for each dense layer of n x m weights."""
    layers = [module for module in vae.model.network.decoder.modules() if isinstance(module, nn.Linear)]  # type: ignore[union-attr]
    return sum(2 * layer.in_features * layer.out_features for layer in layers)


def seconds_of_products(vae: TrainedVAE) -> tuple[float, float]:
    """Of the products, and of all, of a part on one core."""
    torch.set_num_threads(1)
    for _ in range(2):  # the first warms up
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            started = time.perf_counter()
            vae.evaluate("test", "nll", num_images=IMAGES, num_samples=SAMPLES)
            total = time.perf_counter() - started
    products = sum(event.self_cpu_time_total for event in profiler.key_averages() if event.key == "aten::addmm")
    return products / 1e6, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", help="of a dense network, for example of `vae-ray train iwae --training.epochs 1`")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=5000)
    options = parser.parse_args()
    vae, cores = TrainedVAE.load(options.run), os.cpu_count() or 1
    flops, peak = decoder_flops(vae), peak_gflops() * 1e9
    print(f"{cores} cores, load average {os.getloadavg()[0]:.1f}, product peak {peak / 1e9:.0f} GFLOP/s a thread")
    products, total = seconds_of_products(vae)
    share = IMAGES * SAMPLES * flops / peak / products
    print(f"the decoder's products: {share:.0%} of the peak, {products / total:.0%} of the time on one core")
    started = time.perf_counter()
    found = vae.evaluate(
        "test", "nll", num_samples=options.samples, num_images=options.images, run=on_ray(num_workers=cores)
    )
    seconds = time.perf_counter() - started
    share = options.images * options.samples * flops / seconds / peak / cores
    print(
        f"{options.images:,} images by {options.samples:,} samples on {cores} Ray workers: {seconds:.0f} s, "
        f"{share:.0%} of the peak; -log p(x) {found['test/nll']:.3f} ± {found.standard_errors['test/nll']:.3f} nats"
    )


if __name__ == "__main__":
    main()
