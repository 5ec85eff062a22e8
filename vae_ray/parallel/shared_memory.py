"""A sum over workers of one node through shared memory.

Gloo's all-reduce sends gradients through loopback TCP, which for 700,000 weights takes a third of a
worker's step of 256 images; through shared memory the same sum takes a fraction of that
(`python -m benchmarks.gradient_sum` prints both). Used only where all workers share a node and compute on CPUs.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT_SECONDS = 300.0
SPINS_BEFORE_YIELDING = 200
COUNTER_STRIDE = 16
"""int64 slots between two workers' counters: 128 bytes, so that no two share a cache line."""


class SharedMemorySum:
    """In-place sums of float32 vectors of at most `capacity` elements, over two or more ranks, equal to the bit on all.

    All ranks must construct it, and call it, together; torch.distributed must be initialised. Each rank adds its
    chunk of all ranks' vectors in rank order, then everyone copies the chunks.
    """

    def __init__(self, rank: int, size: int, capacity: int) -> None:
        self.rank, self.size, self.capacity = rank, size, capacity
        directory = "/dev/shm" if os.path.isdir("/dev/shm") else None
        names: list[str | None] = [None]
        if rank == 0:
            descriptor, name = tempfile.mkstemp(prefix="vae_ray-sum-", dir=directory)
            os.ftruncate(descriptor, self._num_bytes())
            os.close(descriptor)
            names[0] = name
        dist.broadcast_object_list(names, src=0)
        file = Path(str(names[0]))
        memory = np.memmap(file, dtype=np.uint8, mode="r+", shape=(self._num_bytes(),))
        dist.barrier()
        if rank == 0:
            file.unlink()  # the mappings keep it alive; nothing is left behind even by a kill
        counter_bytes = size * COUNTER_STRIDE * 8
        self._counters = memory[:counter_bytes].view(np.int64)[::COUNTER_STRIDE]
        floats = torch.from_numpy(memory[counter_bytes:].view(np.float32))
        self._vectors = floats[: size * capacity].view(size, capacity)
        self._total = floats[size * capacity :]
        self._barriers_passed = 0

    def _num_bytes(self) -> int:
        return 8 * self.size * COUNTER_STRIDE + 4 * (self.size + 1) * self.capacity

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
        """Wait until all ranks are here. Plain stores and loads: the counters only grow, each by its own rank."""
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
