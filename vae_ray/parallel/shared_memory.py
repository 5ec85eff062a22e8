"""A sum over workers of one node through shared memory.

Gloo's all-reduce sends gradients through loopback TCP, which for 700,000 weights takes a third of a
worker's step of 256 images; through shared memory the same sum takes a fraction of that
(`python -m benchmarks.gradient_sum` prints both). Used only where all workers share a node and compute on CPUs, and
only on x86-64: its barrier is plain stores and loads, which other processors (ARM) may reorder.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

logger = logging.getLogger(__name__)

DIRECTORY = Path("/dev/shm")
TIMEOUT_SECONDS = 300.0
SPINS_BEFORE_YIELDING = 200
COUNTER_STRIDE = 16
"""int64 slots between two workers' counters: 128 bytes, so that no two share a cache line."""


def open_shared_memory_sum(rank: int, size: int, capacity: int) -> SharedMemorySum | None:
    """A sum over the `size` ranks of this node; None on all of them where it cannot be. Collective.

    Rank 0 reserves the memory: a store into memory that /dev/shm has no room for would end the process (SIGBUS), and a
    container has 64 MiB by default. torch.distributed must be initialised.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    num_bytes = 8 * size * COUNTER_STRIDE + 4 * (size + 1) * capacity
    names: list[str | None] = [None]
    if rank == 0:
        try:
            names[0] = _reserve(num_bytes)
        except OSError as error:
            logger.warning(
                "%s: cannot reserve %.1f MiB (%s): gradients are summed by Gloo, which is slower; for example "
                "docker --shm-size=2g",
                *(DIRECTORY, num_bytes / 2**20, error.strerror),
            )
    dist.broadcast_object_list(names, src=0)
    if names[0] is None:
        return None
    file, memory = Path(names[0]), None
    try:
        memory = np.memmap(file, dtype=np.uint8, mode="r+", shape=(num_bytes,))
    except OSError as error:
        logger.warning("%s: cannot be mapped (%s): gradients are summed by Gloo", file, error.strerror)
    are_mapped: list[bool | None] = [None] * size
    dist.all_gather_object(are_mapped, memory is not None)
    if rank == 0:
        file.unlink()  # the mappings keep it alive; nothing is left behind even by a kill
    return SharedMemorySum(rank, size, capacity, memory) if memory is not None and all(are_mapped) else None


def _reserve(num_bytes: int) -> str:
    """The name of a new file of zeros, with its memory; raises `OSError` if there is not enough."""
    descriptor, name = tempfile.mkstemp(prefix="vae_ray-sum-", dir=DIRECTORY)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError:
        os.unlink(name)
        raise
    finally:
        os.close(descriptor)
    return name


class SharedMemorySum:
    """In-place sums of float32 vectors of at most `capacity` elements, over two or more ranks, equal to the bit on all.

    All ranks must call it together. Each rank adds its chunk of all ranks' vectors in rank order, then everyone copies
    the chunks.
    """

    def __init__(self, rank: int, size: int, capacity: int, memory: np.ndarray) -> None:
        self.rank, self.size = rank, size
        counter_bytes = size * COUNTER_STRIDE * 8
        self._counters = memory[:counter_bytes].view(np.int64)[::COUNTER_STRIDE]
        floats = torch.from_numpy(memory[counter_bytes:].view(np.float32))
        self._vectors = floats[: size * capacity].view(size, capacity)
        self._total = floats[size * capacity :]
        self._barriers_passed = 0

    def __call__(self, vector: Tensor) -> None:
        """Replace `vector` (contiguous float32, at most `capacity` elements) by the sum over ranks."""
        length = vector.numel()
        base = -(-length // self.size)
        start, stop = min(self.rank * base, length), min((self.rank + 1) * base, length)
        # The others read all of this rank's vector but its own chunk.
        self._vectors[self.rank, :start].copy_(vector[:start])
        self._vectors[self.rank, stop:length].copy_(vector[stop:])
        self._barrier()
        parts = [self._vectors[rank, start:stop] for rank in range(self.size)]
        parts[self.rank] = vector[start:stop]
        total = torch.add(parts[0], parts[1], out=self._total[start:stop])
        for part in parts[2:]:
            total.add_(part)
        self._barrier()
        vector.copy_(self._total[:length])
        # No third barrier: a rank overwrites its vector only after the second, when all have read it, and
        # a total is overwritten only after the next call's first, when all have copied it.

    def _barrier(self) -> None:
        """Wait until all ranks are here. Plain stores and loads: the counters only grow, each by its own rank.

        x86-64 keeps the order of stores, and that of loads: who sees a counter sees what was stored before it.
        """
        self._barriers_passed += 1
        self._counters[self.rank] = self._barriers_passed
        spins, deadline = 0, time.monotonic() + TIMEOUT_SECONDS
        while self._counters.min() < self._barriers_passed:
            spins += 1
            if spins > SPINS_BEFORE_YIELDING:
                os.sched_yield()
                if time.monotonic() > deadline:
                    late = [rank for rank in range(self.size) if self._counters[rank] < self._barriers_passed]
                    raise TimeoutError(f"workers {late} did not reach a gradient sum in {TIMEOUT_SECONDS:.0f} s")
