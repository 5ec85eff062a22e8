"""The sum through shared memory: exact, equal on all ranks, and with nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

pytestmark = pytest.mark.ray

CAPACITY = 1001
LENGTHS = (1, 2, 997, CAPACITY)
CALLS = 50


def vector(rank: int, call: int, length: int) -> torch.Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(1000 * call + rank))


def sum_many_times(rank: int, size: int, directory: str) -> None:
    from vae_ray.parallel.shared_memory import SharedMemorySum

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=size)
    add_up = SharedMemorySum(rank, size, CAPACITY)
    results = []
    for call in range(CALLS):
        for length in LENGTHS:
            mine = vector(rank, call, length)
            add_up(mine)
            results.append(mine)
    torch.save(results, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_gets_the_sum_in_rank_order_to_the_bit(tmp_path: Path, size: int) -> None:
    before = set(Path("/dev/shm").glob("vae_ray-sum-*"))
    spawn(sum_many_times, args=(size, str(tmp_path)), nprocs=size)
    by_rank = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    results = iter(zip(*by_rank, strict=True))
    for call in range(CALLS):
        for length in LENGTHS:
            expected = vector(0, call, length)
            for rank in range(1, size):
                expected = expected + vector(rank, call, length)
            for found in next(results):
                assert torch.equal(found, expected)
    assert set(Path("/dev/shm").glob("vae_ray-sum-*")) == before
