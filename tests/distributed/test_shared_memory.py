"""The sum through shared memory: exact, equal on all ranks, and with nothing left behind."""

from __future__ import annotations

import platform
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from vae_ray.parallel.shared_memory import open_shared_memory_sum

pytestmark = pytest.mark.ray

CAPACITY = 1001
LENGTHS = (1, 2, 997, CAPACITY)
CALLS = 50


def vector(rank: int, call: int, length: int) -> torch.Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(1000 * call + rank))


def sum_many_times(rank: int, size: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=size)
    add_up = open_shared_memory_sum(rank, size, CAPACITY)
    assert add_up is not None
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


def open_where_it_fails(rank: int, size: int, directory: str, failure: str) -> None:
    from vae_ray.parallel import shared_memory

    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=size)
    if failure == "rank 0 cannot reserve" and rank == 0:  # by a real limit: Python ignores its signal
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    elif failure == "no /dev/shm":
        shared_memory.DIRECTORY = Path(directory, "missing")
    elif failure == "rank 1 cannot map" and rank == 1:

        def fail(*args: object, **options: object) -> None:
            raise OSError(12, "Cannot allocate memory")

        np.memmap = fail  # type: ignore[assignment,misc]
    add_up = shared_memory.open_shared_memory_sum(rank, size, CAPACITY)
    Path(directory, f"{rank}.txt").write_text(str(add_up))
    dist.destroy_process_group()


@pytest.mark.parametrize("failure", ["rank 0 cannot reserve", "no /dev/shm", "rank 1 cannot map"])
def test_where_memory_cannot_be_shared_all_ranks_do_without_it(tmp_path: Path, failure: str) -> None:
    """A rank alone would wait for the others; a store without room would end it by SIGBUS."""
    before = set(Path("/dev/shm").glob("vae_ray-sum-*"))
    spawn(open_where_it_fails, args=(2, str(tmp_path), failure), nprocs=2)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["None", "None"]
    assert set(Path("/dev/shm").glob("vae_ray-sum-*")) == before


@pytest.mark.parametrize("machine", ["aarch64", "arm64", "ppc64le", "riscv64"])
def test_other_processors_than_x86_sum_by_gloo(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may show a counter before what was stored before it: a silently wrong gradient."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert open_shared_memory_sum(0, 2, CAPACITY) is None
