"""Truth: every image once an epoch, in a seeded order, whoever computes it; the noise is in models/test_noise.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vae_ray import UserError
from vae_ray.data import batches as batches_module
from vae_ray.data.batches import Batch, Loader, Shards
from vae_ray.data.dataset import Shard, Split
from vae_ray.data.shards import digests_of, fingerprint_of
from vae_ray.data.splits import validation_indices

CPU = torch.device("cpu")
NUM_IMAGES, BATCH = 23, 5


def pixels() -> Tensor:
    """Images that tell their number: all their pixels are it."""
    return torch.arange(NUM_IMAGES, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 4).contiguous()


LABELS = {"label": torch.arange(NUM_IMAGES) % 7, "weight": torch.arange(NUM_IMAGES, dtype=torch.float64) / 8}


def loader(*, seed: int = 1, rank: int = 0, size: int = 1, only: Tensor | None = None, **changes: Any) -> Loader:
    indices = torch.arange(NUM_IMAGES) if only is None else only
    split = Split.in_memory(pixels(), LABELS)
    return Loader(split, indices, seed=seed, shards=Shards(rank, size, CPU), **changes)


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
    (batch,) = Loader(Split.in_memory(white), torch.arange(3), seed=0, shards=Shards(0, 1, CPU)).evaluation(
        batch_size=9
    )
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


# --- labels, augmentation, binarization -----------------------------------------------------------------


@pytest.mark.parametrize("batches", [training, evaluation])
def test_labels_are_those_of_the_images_beside_them(batches: Callable[..., list[Batch]]) -> None:
    for rank in range(3):
        for batch in batches(rank=rank, size=3):
            numbers = torch.tensor(seen([batch]), dtype=torch.int64)
            assert torch.equal(batch.labels["label"], numbers % 7)
            assert torch.equal(batch.labels["weight"], numbers.double() / 8)


def test_images_without_labels_have_none() -> None:
    (batch,) = Loader(Split.in_memory(pixels()), torch.arange(4), seed=0, shards=Shards(0, 1, CPU)).evaluation(
        batch_size=9
    )
    assert batch.labels == {}


def test_images_are_drawn_in_the_order_of_the_first_epoch_and_again_where_they_are_few() -> None:
    order = seen(training())
    drawn = loader().drawn(NUM_IMAGES + 3)
    assert torch.equal(drawn, loader().images(torch.tensor([*order, *order[:3]])))
    assert torch.equal(loader().drawn(4), drawn[:4])
    assert torch.equal(loader(rank=1, size=3).drawn(4), drawn[:4])
    assert not torch.equal(loader(seed=2).drawn(4), drawn[:4])


def test_images_are_drawn_of_given_classes_each_once_before_one_is_again() -> None:
    """The label of image i is i modulo 7; there is no class 9."""
    classes = torch.tensor([3, 3, 0, 3, 6, 0, 9])
    drawn = loader().drawn(7, "label", classes)
    every = loader().images(torch.arange(NUM_IMAGES))
    numbers = [int((every == image).flatten(1).all(1).nonzero()) for image in drawn]
    assert [number % 7 for number in numbers[:-1]] == classes[:-1].tolist()
    assert len(set(numbers[:-1])) == 6


CHANGES: list[dict[str, Any]] = [
    {"augment": ("flip", "shift:2")},
    {"binarize": "dynamic"},
    {"binarize": "fixed"},
    {"augment": ("flip",), "binarize": "dynamic"},
]


def of_noise(*, rank: int = 0, size: int = 1, **changes: Any) -> Loader:
    """Of images of which no two pixels are equal, so that every change of one shows."""
    order = torch.randperm(NUM_IMAGES * 10, generator=torch.Generator().manual_seed(3))
    images = (order + 10).to(torch.uint8).reshape(NUM_IMAGES, 1, 2, 5)
    return Loader(Split.in_memory(images), torch.arange(NUM_IMAGES), seed=4, shards=Shards(rank, size, CPU), **changes)


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_randomly_changed_images_are_the_same_for_any_number_of_workers(changes: dict[str, Any], size: int) -> None:
    alone = list(of_noise(**changes).training(2, global_batch_size=BATCH))
    workers = [of_noise(rank=rank, size=size, **changes) for rank in range(size)]
    together = [list(worker.training(2, global_batch_size=BATCH)) for worker in workers]
    for step, batch in enumerate(alone):
        assert torch.equal(torch.cat([worker[step].x for worker in together]), batch.x)
    evaluated = torch.cat([batch.x for batch in of_noise(**changes).evaluation(batch_size=4)])
    by_workers = [list(worker.evaluation(batch_size=9)) for worker in workers]
    assert torch.equal(torch.cat([worker[step].x for step in range(3) for worker in by_workers]), evaluated)


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_randomly_changed_images_are_the_same_when_an_epoch_is_continued(changes: dict[str, Any]) -> None:
    whole = list(of_noise(**changes).training(2, global_batch_size=BATCH))
    rest = list(of_noise(**changes).training(2, global_batch_size=BATCH, first_step=3))
    assert len(rest) == 2
    for batch, expected in zip(rest, whole[3:], strict=True):
        assert torch.equal(batch.x, expected.x)


def of_image(batches: list[Batch], order: list[Tensor]) -> Tensor:
    """The images of an epoch in the order of their numbers."""
    numbers = torch.cat(order)
    return torch.cat([batch.x for batch in batches])[numbers.argsort()]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_training_changes_images_anew_in_every_epoch_unless_fixed_and_evaluation_never(changes: dict[str, Any]) -> None:
    stored = of_noise().images(torch.arange(NUM_IMAGES))
    first, second = (
        of_image(
            list(of_noise(**changes).training(epoch, global_batch_size=BATCH)),
            list(of_noise(**changes).steps(epoch, global_batch_size=BATCH)),
        )
        for epoch in (1, 2)
    )
    assert torch.equal(first, second) == (changes == {"binarize": "fixed"})
    assert not torch.equal(first, stored)
    evaluated, again = (
        torch.cat([batch.x for batch in of_noise(**changes).evaluation(batch_size=BATCH)]) for _ in range(2)
    )
    assert torch.equal(evaluated, again)
    if "binarize" in changes:
        assert set(evaluated.unique().tolist()) == set(first.unique().tolist()) == {0.0, 1.0}
        fixed = torch.cat([batch.x for batch in of_noise(binarize="fixed").evaluation(batch_size=BATCH)])
        assert torch.equal(evaluated, fixed)
    else:
        assert torch.equal(evaluated, stored)


# --- windows of shards ----------------------------------------------------------------------------------

SIZES = (5, 3, 8, 4, 6, 1, 7, 9, 2, 4, 3, 6)
"""Images of each shard; together 58."""
IMAGE_BYTES, NUM_SHARDED = 6, sum(SIZES)
WINDOW_BYTES = 12 * IMAGE_BYTES
"""58 images are more than four windows of 12; the largest shard has 9."""


class Traced(Shard):
    """A shard that records when its images are read and when they are released."""

    def __init__(self, number: int, pixels: Tensor, events: list[tuple[str, int]]) -> None:
        in_memory = Shard.in_memory(pixels)
        super().__init__(in_memory.file, in_memory._files, tuple(pixels.shape[1:]))
        self.number, self.events, self.kept = number, events, pixels

    @property
    def pixels(self) -> Tensor:
        self.events.append(("read", self.number))
        return self.kept

    def read_ahead(self) -> None:
        self.events.append(("ahead", self.number))

    def release(self) -> None:
        self.events.append(("released", self.number))


def sharded(events: list[tuple[str, int]] | None = None) -> Split:
    """58 images in 12 shards; their pixels are their number."""
    images = torch.arange(NUM_SHARDED, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 3).contiguous()
    traced = [Traced(number, part, [] if events is None else events) for number, part in enumerate(images.split(SIZES))]
    digests = digests_of(images.numpy())
    split = Split(traced, name="train", image_shape=(1, 2, 3), fingerprint=fingerprint_of((1, 2, 3), digests))
    split.__dict__["_rows"] = (torch.from_numpy(digests), {"label": torch.arange(NUM_SHARDED)})
    return split


def windowed(
    *,
    seed: int = 1,
    rank: int = 0,
    size: int = 1,
    only: Tensor | None = None,
    events: list[tuple[str, int]] | None = None,
    window_bytes: int | None = WINDOW_BYTES,
) -> Loader:
    indices = torch.arange(NUM_SHARDED) if only is None else only
    return Loader(sharded(events), indices, seed=seed, shards=Shards(rank, size, CPU), window_bytes=window_bytes)


def order_of(loader: Loader, epoch: int = 1, *, batch: int = BATCH, first_step: int = 0) -> list[list[int]]:
    return [step.tolist() for step in loader.steps(epoch, global_batch_size=batch, first_step=first_step)]


SHARD_OF = np.repeat(np.arange(len(SIZES)), SIZES)


def windows_of(loader: Loader, epoch: int) -> list[list[int]]:
    """The shards of each window, and none of them the whole set."""
    windows = loader._windows(epoch)
    assert None not in windows
    return [window for window in windows if window is not None]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_windows_show_each_image_once_an_epoch_and_the_same_to_any_number_of_workers(size: int) -> None:
    alone = list(windowed().training(3, global_batch_size=BATCH))
    together = [list(windowed(rank=rank, size=size).training(3, global_batch_size=BATCH)) for rank in range(size)]
    assert sorted(image for worker in together for image in seen(worker)) == list(range(NUM_SHARDED))
    assert [batch.global_size for batch in alone] == [5] * 11 + [3]
    for step, batch in enumerate(alone):
        assert torch.equal(torch.cat([worker[step].x for worker in together]), batch.x)
        labels = torch.cat([worker[step].labels["label"] for worker in together])
        assert labels.tolist() == seen([batch])


@pytest.mark.parametrize("batch", [1, 5, 12, 31, 100])
@pytest.mark.parametrize("only", [None, torch.tensor([0, 1, 4, 5, 6, 9, 10, 17, 26, *range(30, 56)])])
def test_windows_of_any_batch_size_show_the_images_of_the_split_once(batch: int, only: Tensor | None) -> None:
    loader = windowed(only=only, window_bytes=6 * IMAGE_BYTES)
    assert len(windows_of(loader, 1)) > 4
    steps = order_of(loader, batch=batch)
    expected = list(range(NUM_SHARDED)) if only is None else only.tolist()
    assert sorted(image for step in steps for image in step) == expected
    assert {len(step) for step in steps[:-1]} <= {batch}


@pytest.mark.parametrize("batch", [5, 12, 31])
def test_an_epoch_in_windows_continues_exactly_from_any_step(batch: int) -> None:
    whole = order_of(windowed(), 2, batch=batch)
    for first_step in range(len(whole) + 2):
        assert order_of(windowed(), 2, batch=batch, first_step=first_step) == whole[first_step:]


def test_a_continued_epoch_reads_nothing_of_the_windows_before() -> None:
    windows = windows_of(windowed(), 2)
    sizes = [sum(SIZES[shard] for shard in window) for window in windows]
    for number in range(1, len(windows)):
        events: list[tuple[str, int]] = []
        first_step = -(-sum(sizes[:number]) // BATCH)  # the first step that begins in this window or later
        for _ in windowed(events=events).training(2, global_batch_size=BATCH, first_step=first_step):
            pass
        before = {shard for window in windows[:number] for shard in window}
        assert not {shard for _, shard in events} & before
        assert {shard for what, shard in events if what == "read"}


def test_the_order_in_windows_is_a_function_of_seed_and_epoch_alone() -> None:
    first = order_of(windowed(seed=1), 1)
    assert first == order_of(windowed(seed=1, rank=2, size=3), 1)
    assert [image for step in first for image in step] == [
        image for step in order_of(windowed(seed=1), 1, batch=11) for image in step
    ]
    others = [order_of(windowed(seed=seed), epoch) for seed, epoch in [(1, 2), (2, 1), (2, 2)]]
    assert all(other != first for other in others)
    assert others[0] != others[2]
    windows = [windows_of(windowed(seed=seed), epoch) for seed, epoch in [(1, 1), (1, 2), (2, 1)]]
    assert windows[0] not in windows[1:]


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_window_shows_all_images_of_its_shards_in_a_shuffled_order_and_no_others(epoch: int) -> None:
    loader = windowed()
    windows = windows_of(loader, epoch)
    assert sorted(shard for window in windows for shard in window) == list(range(len(SIZES)))
    images = [image for step in order_of(loader, epoch) for image in step]
    for window in windows:
        num = sum(SIZES[shard] for shard in window)
        assert num <= 12
        here, images = images[:num], images[num:]
        expected = [image for image in range(NUM_SHARDED) if SHARD_OF[image] in window]
        assert sorted(here) == expected
        assert num < 4 or here != [image for shard in window for image in np.flatnonzero(shard == SHARD_OF)]
    assert images == []


def test_a_shard_larger_than_a_window_is_one_by_itself() -> None:
    assert [len(window) for window in windows_of(windowed(window_bytes=1), 1)] == [1] * len(SIZES)


@pytest.mark.parametrize(("window_bytes", "is_whole"), [(87, True), (86, False)])  # of 4 * 87 bytes
def test_images_of_at_most_four_windows_are_shuffled_as_a_whole(window_bytes: int, is_whole: bool) -> None:
    whole = order_of(windowed(window_bytes=None))
    assert whole == order_of(Loader(sharded(), torch.arange(NUM_SHARDED), seed=1, shards=Shards(0, 1, CPU)))
    found = order_of(windowed(window_bytes=window_bytes))
    assert (found == whole) == is_whole


@pytest.mark.parametrize("batch", [1, 5, 12, 31, 100])
def test_shards_are_read_while_their_window_lasts_and_then_released(batch: int) -> None:
    """With batches smaller than a window at most two are held: this one, and the last until its rest is used."""
    events: list[tuple[str, int]] = []
    loader = windowed(events=events)
    windows = windows_of(loader, 1)
    for _ in loader.training(1, global_batch_size=batch):
        pass
    last_read = {shard: at for at, (what, shard) in enumerate(events) if what == "read"}
    released = {shard: at for at, (what, shard) in enumerate(events) if what == "released"}
    assert sorted(last_read) == sorted(released) == list(range(len(SIZES)))
    assert all(released[shard] > last_read[shard] for shard in released)
    held: set[int] = set()
    for what, shard in events:
        held = held - {shard} if what == "released" else held | {shard} if what == "read" else held
        assert sum(bool(held & set(window)) for window in windows) <= 2 or batch > 5


def test_shards_are_read_ahead_by_one_window(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []

    def read_ahead(shards: Sequence[Traced]) -> None:
        asked.append([shard.number for shard in shards])

    monkeypatch.setattr(batches_module, "read_ahead", read_ahead)
    loader = windowed()
    windows = windows_of(loader, 1)
    order_of(loader)
    assert asked == [[*window, *following] for window, following in zip(windows, [*windows[1:], []], strict=True)]


def test_evaluation_in_windows_is_in_order_and_releases_what_it_has_passed() -> None:
    events: list[tuple[str, int]] = []
    assert seen(list(windowed(events=events).evaluation(batch_size=BATCH))) == list(range(NUM_SHARDED))
    reads = [shard for what, shard in events if what == "read"]
    assert reads == sorted(reads)
    last_read = {shard: at for at, (what, shard) in enumerate(events) if what == "read"}
    released = {shard: at for at, (what, shard) in enumerate(events) if what == "released"}
    assert released.keys() >= set(range(len(SIZES) - 3))
    assert all(released[shard] > last_read[shard] for shard in released)


@given(st.lists(st.integers(0, NUM_SHARDED - 1), max_size=80))
def test_gathering_from_many_shards_is_indexing_all_images(numbers: list[int]) -> None:
    split, indices = sharded(), torch.tensor(numbers, dtype=torch.int64)
    assert split.gather(indices)[:, 0, 0, 0].tolist() == numbers
    assert split.gather(indices).shape == (len(numbers), 1, 2, 3)


# --- the validation split -------------------------------------------------------------------------------


def random_split(num: int, *, seed: int = 0) -> Split:
    """Different images, as 14 random bytes are."""
    generator = torch.Generator().manual_seed(seed)
    return Split.in_memory(torch.randint(0, 256, (num, 1, 2, 7), dtype=torch.uint8, generator=generator))


@given(st.integers(1, 60), st.integers(0, 59), st.integers(0, 2**40))
def test_validation_and_training_are_disjoint_and_complete(num_images: int, num_validation: int, seed: int) -> None:
    split = random_split(num_images)
    if num_validation >= num_images:
        with pytest.raises(UserError, match=f"got {num_validation}, should be less than the {num_images}"):
            validation_indices(split, num_validation=num_validation, seed=seed)
        return
    train, validation = validation_indices(split, num_validation=num_validation, seed=seed)
    assert len(validation) == num_validation
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(num_images))
    assert train.tolist() == sorted(train.tolist())
    assert validation.tolist() == sorted(validation.tolist())


def test_validation_split_is_random_and_a_function_of_the_seed() -> None:
    split = random_split(100)
    splits = [validation_indices(split, num_validation=30, seed=seed)[1].tolist() for seed in (5, 5, 6)]
    assert splits[0] == splits[1]
    assert splits[0] != splits[2]
    assert splits[0] not in (list(range(30)), list(range(70, 100)))


def images_at(split: Split, indices: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.gather(indices)}


def test_the_validation_split_does_not_depend_on_the_order_of_the_images() -> None:
    split = random_split(100)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(8))
    reordered = Split.in_memory(split.gather(order))
    expected, found = (
        images_at(each, validation_indices(each, num_validation=30, seed=5)[1]) for each in (split, reordered)
    )
    assert found == expected
    assert len(found) == 30


@pytest.mark.parametrize("seed", range(5))
def test_an_image_keeps_its_split_when_others_are_added_up_to_the_count(seed: int) -> None:
    """An added image takes the place of the last in the order of the hash, or none: the others stay."""
    split = random_split(140)
    before, after = Split.in_memory(split.first(100)), split
    old = images_at(before, validation_indices(before, num_validation=30, seed=seed)[1])
    new = images_at(after, validation_indices(after, num_validation=30, seed=seed)[1])
    added = images_at(after, torch.arange(100, 140))
    assert len(new - old) == len(old - new) == len(new & added)
    assert new - old <= added  # no old training image becomes a validation image
    assert 0 < len(new - old) < 20  # about 30 * 40 / 140 = 8.6
    more = images_at(before, validation_indices(before, num_validation=31, seed=seed)[1])
    assert old < more
