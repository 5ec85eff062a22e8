"""Milliseconds to sum the notebook's gradients over two workers: Gloo's all-reduce and our shared memory.

`python -m benchmarks.gradient_sum`
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from vae_ray.parallel.shared_memory import open_shared_memory_sum

NUM_GRADIENTS = 711_924
"""Parameters of 784-400-100-(20, 20)-100-400-784."""
WORKERS = 2


def _median_ms(add_up: Callable[[Tensor], object]) -> float:
    vector, times = torch.randn(NUM_GRADIENTS), []
    for _ in range(220):
        started = time.perf_counter()
        add_up(vector)
        times.append(time.perf_counter() - started)
        vector.mul_(0.5)
    return statistics.median(times[20:]) * 1e3


def worker(rank: int, meeting_point: str) -> None:
    """Measure both ways in turn; rank 0 prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=WORKERS)
    shared = open_shared_memory_sum(rank, WORKERS, NUM_GRADIENTS)
    assert shared is not None, "needs Linux on x86-64 and room in /dev/shm"
    for _ in range(5):
        gloo, ours = _median_ms(dist.all_reduce), _median_ms(shared)
        if rank == 0:
            print(f"gloo {gloo:.2f} ms   shared memory {ours:.2f} ms   ratio {gloo / ours:.1f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    print(f"load average {os.getloadavg()[0]:.1f}")
    with TemporaryDirectory() as directory:
        spawn(worker, args=(str(Path(directory) / "meet"),), nprocs=WORKERS)
