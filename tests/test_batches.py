"""Truth: every image once an epoch, in a seeded order, whoever computes it; the noise is in models/test_noise.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vae_ray import UserError
from vae_ray.data.batches import Batch, Loader, Shards
from vae_ray.data.splits import validation_indices

CPU = torch.device("cpu")
NUM_IMAGES, BATCH = 23, 5


def pixels() -> Tensor:
    """Images that tell their number: all their pixels are it."""
    return torch.arange(NUM_IMAGES, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 4).contiguous()


def loader(*, seed: int = 1, rank: int = 0, size: int = 1, only: Tensor | None = None) -> Loader:
    indices = torch.arange(NUM_IMAGES) if only is None else only
    return Loader(pixels(), indices, seed=seed, shards=Shards(rank, size, CPU))


def training(*, epoch: int = 1, first_step: int = 0, **options: Any) -> list[Batch]:
    return list(loader(**options).training(epoch, global_batch_size=BATCH, first_step=first_step))


def evaluation(*, batch_size: int = BATCH, **options: Any) -> list[Batch]:
    return list(loader(**options).evaluation(batch_size=batch_size))


def seen(batches: list[Batch]) -> list[int]:
    return [round(float(image.flatten()[0]) * 255) for batch in batches for image in batch.x]


@given(st.integers(0, 1000), st.integers(0, 300), st.integers(1, 40))
def test_slices_of_all_workers_partition_a_batch_exactly_and_evenly(start: int, length: int, size: int) -> None:
    stop = start + length
    slices = [Shards(rank, size, CPU).slice_of(start, stop) for rank in range(size)]
    assert [i for part in slices for i in range(part.start, part.stop)] == list(range(start, stop))
    lengths = [part.stop - part.start for part in slices]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


def test_64_images_over_3_workers_are_22_and_21_and_21() -> None:
    parts = [Shards(rank, 3, CPU).slice_of(128, 192) for rank in range(3)]
    assert [(part.start, part.stop) for part in parts] == [(128, 150), (150, 171), (171, 192)]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_an_epoch_sees_each_image_once_over_all_workers(size: int) -> None:
    epoch = [training(rank=rank, size=size) for rank in range(size)]
    assert sorted(image for worker in epoch for image in seen(worker)) == list(range(NUM_IMAGES))
    for step, global_size in enumerate([5, 5, 5, 5, 3]):  # the last batch is the rest
        assert [worker[step].global_size for worker in epoch] == [global_size] * size
        assert sum(len(worker[step].x) for worker in epoch) == global_size


def test_an_epoch_sees_only_the_images_of_its_split() -> None:
    only = torch.tensor([3, 4, 8, 11, 17, 21])
    assert sorted(seen(training(only=only))) == only.tolist()


def test_images_are_the_stored_bytes_divided_by_255() -> None:
    (batch, *_) = evaluation()
    expected = pixels()[:BATCH].double() / 255
    # one float32 rounding of 1/255 and one of the product
    torch.testing.assert_close(batch.x.double(), expected, rtol=2e-7, atol=0)
    assert batch.x.dtype == torch.float32


def test_white_is_exactly_one() -> None:
    white = torch.full((3, 1, 2, 2), 255, dtype=torch.uint8)
    (batch,) = Loader(white, torch.arange(3), seed=0, shards=Shards(0, 1, CPU)).evaluation(batch_size=9)
    assert float(batch.x.max()) == float(batch.x.min()) == 1.0


def test_order_differs_between_epochs_and_between_seeds_and_repeats_for_equal_ones() -> None:
    first = seen(training(seed=1, epoch=1))
    assert first == seen(training(seed=1, epoch=1))
    others = [seen(training(seed=seed, epoch=epoch)) for seed, epoch in [(1, 2), (2, 1), (2, 2)]]
    assert all(other != first for other in others)
    assert others[0] != others[2]
    assert first != sorted(first)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("batches", [training, evaluation])
def test_workers_together_get_the_images_and_the_rows_of_one_worker(
    batches: Callable[..., list[Batch]], size: int
) -> None:
    alone = batches()
    together = [batches(rank=rank, size=size) for rank in range(size)]
    for step, batch in enumerate(alone):
        assert torch.equal(torch.cat([worker[step].x for worker in together]), batch.x)
        rows = [row for worker in together for row in range(worker[step].rows.start, worker[step].rows.stop)]
        assert rows == list(range(batch.rows.start, batch.rows.stop))
        assert all(len(w[step].x) == w[step].rows.stop - w[step].rows.start for w in together)


def test_rows_count_from_the_batch_in_training_and_from_the_split_in_evaluation() -> None:
    sizes = [5, 5, 5, 5, 3]
    assert [(b.rows.start, b.rows.stop) for b in training()] == [(0, size) for size in sizes]
    assert [(b.rows.start, b.rows.stop) for b in evaluation()] == [
        (5 * i, 5 * i + size) for i, size in enumerate(sizes)
    ]


def test_an_epoch_that_is_continued_skips_the_steps_before() -> None:
    whole, rest = training(epoch=2), training(epoch=2, first_step=3)
    assert [seen([batch]) for batch in rest] == [seen([batch]) for batch in whole[3:]]
    assert training(epoch=2, first_step=5) == []


def test_evaluation_is_in_order() -> None:
    assert seen(evaluation()) == list(range(NUM_IMAGES))


@given(st.integers(1, 60), st.integers(0, 59), st.integers(0, 2**40))
def test_validation_and_training_are_disjoint_and_complete(num_images: int, num_validation: int, seed: int) -> None:
    if num_validation >= num_images:
        with pytest.raises(UserError, match=f"got {num_validation}, should be less than the {num_images}"):
            validation_indices(num_images, num_validation=num_validation, seed=seed)
        return
    train, validation = validation_indices(num_images, num_validation=num_validation, seed=seed)
    assert len(validation) == num_validation
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(num_images))
    assert train.tolist() == sorted(train.tolist())
    assert validation.tolist() == sorted(validation.tolist())


def test_validation_split_is_random_and_a_function_of_the_seed() -> None:
    splits = [validation_indices(100, num_validation=30, seed=seed)[1].tolist() for seed in (5, 5, 6)]
    assert splits[0] == splits[1]
    assert splits[0] != splits[2]
    assert splits[0] not in (list(range(30)), list(range(70, 100)))
