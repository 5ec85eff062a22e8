"""Truth: sums of gradients, buffers and rows over workers that are threads, and over two processes with Gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from tests.thread_workers import ThreadWorkers, on_threads, results_on_threads
from vae_ray import UserError
from vae_ray.parallel.global_batch import GlobalBatch
from vae_ray.parallel.group import SingleProcess, add_up_gradients, broadcast_buffers, raise_on_all_ranks, shards_of

CPU = torch.device("cpu")
SHAPES = ((4, 5), (4,), (), (2, 1, 3))


def gradients_of_rank(rank: int) -> list[Tensor]:
    """One of another dtype between the others."""
    generator = torch.Generator().manual_seed(rank)
    dtypes = (torch.float32, torch.float64, torch.float32, torch.float32)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape, dtype in zip(SHAPES, dtypes, strict=True)]


@pytest.mark.parametrize("size", [2, 3])
def test_gradients_are_added_up_in_one_sum_for_each_dtype(size: int) -> None:
    def run(group: ThreadWorkers) -> tuple[list[Tensor], list[int]]:
        return add_up_gradients(group, gradients_of_rank(group.rank)), group.gradient_sums

    for gradients, sums in results_on_threads(size, run):
        assert sums == [20 + 1 + 6, 4]
        for index, gradient in enumerate(gradients):
            addends = [gradients_of_rank(rank)[index] for rank in range(size)]
            expected = sum(addends[1:], start=addends[0])
            assert gradient.dtype == expected.dtype
            assert torch.equal(gradient, expected)


def test_gradients_that_are_not_contiguous_are_added_up() -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    for (total,) in results_on_threads(2, lambda group: add_up_gradients(group, [matrix.T])):
        assert torch.equal(total, 2 * matrix.T)


def test_a_process_alone_has_its_own_gradients() -> None:
    own = gradients_of_rank(0)
    assert all(a is b for a, b in zip(add_up_gradients(SingleProcess(CPU), own), own, strict=True))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_a_function_of_gathered_rows_has_the_gradient_of_one_worker(size: int) -> None:
    """Eight workers for five rows: three of them have none."""
    values = torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def function(rows: Tensor) -> Tensor:
        return (rows @ rows.T).tanh().sum()

    def run(group: ThreadWorkers) -> tuple[Tensor, Tensor, slice]:
        part = shards_of(group).slice_of(0, 5)
        own = values[part].clone().requires_grad_()
        batch = GlobalBatch(5, part, 99, group)
        rows = batch.gather(own)
        assert torch.equal(rows, values)
        assert torch.equal(batch.sum(torch.tensor([float(batch.num_rows)])), torch.tensor([5.0]))
        (gradient,) = torch.autograd.grad(function(rows), [own], materialize_grads=True)
        return gradient, function(rows).detach(), part

    whole = values.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(whole), [whole])
    for gradient, value, part in results_on_threads(size, run):
        torch.testing.assert_close(gradient, expected[part], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(value, function(values), rtol=1e-13, atol=0)


def test_an_error_of_one_rank_is_raised_on_all() -> None:
    def fail_on_rank_1(group: ThreadWorkers) -> str:
        def action() -> str:
            if group.rank == 1:
                raise UserError("data.root: is absent here")
            return "read"

        return raise_on_all_ranks(group, action)

    errors = on_threads(3, fail_on_rank_1)
    assert [(type(error), str(error)) for error in errors] == [(UserError, "data.root: is absent here")] * 3
    assert on_threads(3, lambda group: raise_on_all_ranks(group, lambda: group.rank)) == [0, 1, 2]


# --- two processes --------------------------------------------------------------------------------------


def in_process(rank: int, size: int, directory: str) -> None:
    from vae_ray.distributed.group import RayWorkers

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=size)
    group: Any = object.__new__(RayWorkers)  # its constructor asks Ray for rank and size
    group.rank, group.size, group.device = rank, size, CPU
    group._one_node, group._shared_sums = True, {}
    module = nn.Module()
    for dtype in (torch.int64, torch.bool, torch.float32):
        module.register_buffer(str(dtype).replace(".", "_"), torch.tensor([rank == 0, True, rank == 1]).to(dtype))
    broadcast_buffers(group, module)
    result = {
        "gradients": add_up_gradients(group, gradients_of_rank(rank)),
        "sum": group.sum(torch.tensor([1.0, rank])),
        "buffers": list(module.buffers()),
        "gathered": group.all_gather(("rank", rank)),
        "broadcast": group.broadcast({"from": rank}),
    }
    torch.save(result, f"{directory}/{rank}.pt")
    group.close()
    dist.destroy_process_group()


@pytest.mark.ray
def test_ray_workers_collectives_on_two_processes(tmp_path: Path) -> None:
    spawn(in_process, args=(2, str(tmp_path)), nprocs=2)
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for index, gradient in enumerate(result["gradients"]):
            assert torch.equal(gradient, gradients_of_rank(0)[index] + gradients_of_rank(1)[index])
        assert result["sum"].tolist() == [2.0, 1.0]
        assert [buffer.tolist() for buffer in result["buffers"]] == [[1, 1, 0], [True, True, False], [1.0, 1.0, 0.0]]
        assert [buffer.dtype for buffer in result["buffers"]] == [torch.int64, torch.bool, torch.float32]
        assert result["gathered"] == [("rank", 0), ("rank", 1)]
        assert result["broadcast"] == {"from": 0}
