"""Truth and system: what becomes of the rows of a source, in any number of processes, here and at a URI."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.data_layer.numbered import Images, Numbered, starts_read
from tests.data_layer.stored import pixels_of
from tests.storage.servers import ObjectStore, filesystem
from vae_ray import UserError
from vae_ray.data import preparation, processes
from vae_ray.data.dataset import Dataset, open_local, open_remote
from vae_ray.data.decoding import ImageRules
from vae_ray.data.preparation import Plan, prepare
from vae_ray.data.processes import run_tasks
from vae_ray.data.shards import Description, digests_of, fingerprint_of
from vae_ray.errors import CorruptFile
from vae_ray.storage.remote import RemoteDirectory

run_alone = functools.partial(run_tasks, num_processes=1)
IMAGE_BYTES = 2 * 3 * 5


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 8 images."""
    monkeypatch.setattr(preparation, "MIN_PART_ROWS", 8)


def noise(num: int, *, seed: int = 0, shape: tuple[int, int, int] = (2, 3, 5)) -> list[NDArray[np.uint8]]:
    return list(np.random.default_rng(seed).integers(0, 256, (num, *shape), dtype=np.uint8))


def plan_of(source: Any, **changes: Any) -> Plan:
    given = {"test_fraction": 0.25, "max_skipped_fraction": 0.1, "settings": {"image_size": None}, **changes}
    return Plan(source, ImageRules(), **given)


def prepared(source: Any, directory: Path | str, **changes: Any) -> Description:
    return prepare(plan_of(source, **changes), str(directory), run=run_alone)


def opened(directory: Path) -> Dataset:
    dataset = open_local(directory, verified=directory.with_name("verified"))
    assert dataset is not None
    return dataset


def dataset_of(images: Images, directory: Path, **options: Any) -> Dataset:
    prepared(Numbered(images, **options), directory)
    return opened(directory)


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def split_of_each(dataset: Dataset) -> dict[bytes, str]:
    return {image.tobytes(): name for name, split in dataset.splits.items() for image in pixels_of(split)}


# --- rows -------------------------------------------------------------------------------------------------


def test_rows_keep_their_order_their_columns_and_their_pixels(tmp_path: Path) -> None:
    images = noise(100)
    dataset = dataset_of(images, tmp_path / "out")
    numbers = {name: split.columns["number"].tolist() for name, split in dataset.splits.items()}
    assert sorted(numbers["train"] + numbers["test"]) == list(range(100))
    for name, split in dataset.splits.items():
        assert numbers[name] == sorted(numbers[name])
        assert np.array_equal(pixels_of(split), np.stack([images[number] for number in numbers[name]]))
        assert split.columns["half"].tolist() == [number / 2 for number in numbers[name]]
        assert split.names == {"number": ["zero", "one"]}
        total = torch.from_numpy(np.stack([images[number] for number in numbers[name]]).sum(0, dtype=np.int64))
        assert torch.equal(dataset.sum_of_images(name), total)
        assert split.fingerprint == fingerprint_of((2, 3, 5), split.digests.numpy())
    assert dataset.description.warnings == ["50 images: even"]
    assert (
        dataset.describe()
        == f"numbered images: 3x5 2 channels; {len(numbers['train'])} train, {len(numbers['test'])} test"
    )


def test_splits_of_the_sources_own_are_kept(tmp_path: Path) -> None:
    images = noise(40)
    splits = ["train"] * 21 + ["val"] * 9 + ["test"] * 10
    dataset = dataset_of(images, tmp_path / "out", splits=splits)
    assert [(name, len(split)) for name, split in dataset.splits.items()] == [("train", 21), ("val", 9), ("test", 10)]
    assert np.array_equal(np.concatenate([pixels_of(split) for split in dataset.splits.values()]), np.stack(images))


def test_a_source_without_a_test_split_is_divided_by_content_and_keeps_its_validation_split(tmp_path: Path) -> None:
    images = noise(60)
    divided = dataset_of(images, tmp_path / "out", splits=["train"] * 50 + ["val"] * 10).splits
    plain = dataset_of(images[:50], tmp_path / "plain").splits
    assert divided["val"].fingerprint == fingerprint_of((2, 3, 5), digests_of(images[50:]))
    assert [divided[name].fingerprint for name in ("train", "test")] == [
        plain[n].fingerprint for n in ("train", "test")
    ]


def test_a_source_without_training_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root: .* has test images but no train images; should have both"):
        dataset_of(noise(20), tmp_path / "out", splits=["test"] * 20)


# --- parts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_images", "shape", "size", "expected"),
    [
        (64 * 100, (1, 8, 8), None, 100),  # 64 parts
        (64 * 100 + 1, (1, 8, 8), None, 101),
        (50, (1, 8, 8), None, 32),  # at least
        (None, (1, 8, 8), None, 1024),
        (10**7, (3, 64, 64), None, (16 << 20) // (3 * 64 * 64)),  # at most 16 MiB
        (10**7, (1, 200, 300), (64, 48), (16 << 20) // (64 * 48)),  # of the images that are stored
        (10**7, None, None, (16 << 20) // (3 * 64 * 64)),
        (10**7, (3, 5000, 5000), None, 1),
    ],
)
def test_the_rows_of_a_part_are_a_function_of_source_and_rules(
    monkeypatch: pytest.MonkeyPatch, num_images: int | None, shape: Any, size: Any, expected: int
) -> None:
    monkeypatch.setattr(preparation, "MIN_PART_ROWS", 32)
    source = Numbered(noise(1))
    source.num_images = num_images
    source.native_shape = lambda: shape  # type: ignore[method-assign]
    for fraction in (0.1, 0.5):
        plan = Plan(source, ImageRules(size), test_fraction=fraction, max_skipped_fraction=fraction, settings={})
        assert plan.num_rows == expected


def test_a_key_changes_with_all_that_decides_the_content_and_with_nothing_else() -> None:
    source = Numbered(noise(9))
    key = plan_of(source).key
    assert key == plan_of(Numbered(noise(9)), max_skipped_fraction=0.7).key
    others = [
        plan_of(Numbered(noise(9, seed=1))),
        plan_of(source, test_fraction=0.3),
        plan_of(source, settings={"image_size": 64}),
        Plan(source, ImageRules((4, 4)), 0.25, 0.1, {"image_size": None}),
    ]
    assert len({key, *(other.key for other in others)}) == 5


def test_an_interrupted_preparation_continues_with_the_parts_that_are_missing(tmp_path: Path) -> None:
    images, log = noise(60), tmp_path / "log"
    whole = prepared(Numbered(images), tmp_path / "whole")
    with pytest.raises(RuntimeError, match="the disk ends at image 24"):
        prepared(Numbered(images, log=log, fails_from=24), tmp_path / "out")
    assert starts_read(log) == [0, 8, 16]
    assert open_local(tmp_path / "out", verified=tmp_path) is None
    done: list[tuple[int, int | None]] = []
    log.unlink()
    plan = plan_of(Numbered(images, log=log))
    again = prepare(plan, str(tmp_path / "out"), run=run_alone, progress=lambda *numbers: done.append(numbers))
    assert starts_read(log) == [24, 32, 40, 48, 56]
    assert done == [(32, 60), (40, 60), (48, 60), (56, 60), (60, 60)]
    assert again == whole
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["record cut", "record gone", "shard cut", "shard gone", "rows gone"])
def test_a_part_that_is_not_whole_is_decoded_again(tmp_path: Path, damage: str) -> None:
    images, log, out = noise(60), tmp_path / "log", tmp_path / "out"
    whole = prepared(Numbered(images), tmp_path / "whole")
    with pytest.raises(RuntimeError):
        prepared(Numbered(images, fails_from=56), out)
    pattern = {"record": "part-*-000002.json", "shard": "train-*-000002.arrow", "rows": "train-*-000002.arrow.npz"}
    (file,) = out.glob(pattern[damage.split()[0]])
    if damage.endswith("cut"):
        file.write_bytes(file.read_bytes()[:-3])
    else:
        file.unlink()
    assert prepared(Numbered(images, log=log), out) == whole
    assert starts_read(log) == [16, 56]
    assert contents(out) == contents(tmp_path / "whole")


def test_parts_of_other_images_are_neither_used_nor_kept(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    with pytest.raises(RuntimeError):
        prepared(Numbered(noise(60, seed=1), fails_from=40), out)
    (out / "notes.txt").write_text("of the user")
    whole = prepared(Numbered(noise(60)), tmp_path / "whole")
    assert prepared(Numbered(noise(60), log=log), out) == whole
    assert len(starts_read(log)) == 8
    assert contents(out) == {**contents(tmp_path / "whole"), "notes.txt": b"of the user"}


# --- splits by content ------------------------------------------------------------------------------------


def test_the_split_of_an_image_depends_on_nothing_but_the_image(tmp_path: Path) -> None:
    images = noise(200)
    whole = split_of_each(dataset_of(images, tmp_path / "whole"))
    shuffled = split_of_each(dataset_of(images[::-1], tmp_path / "shuffled"))
    part = split_of_each(dataset_of(images[50:120], tmp_path / "part"))
    assert whole == shuffled
    assert part.items() <= whole.items()
    num_test = sum(name == "test" for name in whole.values())
    assert 25 <= num_test <= 75  # 50 of 200 at a fraction of 0.25: four standard deviations of 6.1


def test_a_larger_test_fraction_keeps_the_test_images_and_adds_others(tmp_path: Path) -> None:
    splits = []
    for fraction in (0.1, 0.3, 0.6):
        prepared(Numbered(noise(200)), tmp_path / str(fraction), test_fraction=fraction)
        split = split_of_each(opened(tmp_path / str(fraction)))
        splits.append({image for image, name in split.items() if name == "test"})
    assert splits[0] < splits[1] < splits[2]


def test_a_single_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.root: numbered images has one usable image; at least 2 are needed"):
        dataset_of(noise(1), tmp_path / "out")


@pytest.mark.parametrize("seed", range(12))
def test_two_images_are_one_for_training_and_one_for_the_test(tmp_path: Path, seed: int) -> None:
    images = noise(2, seed=seed)
    dataset = dataset_of(images, tmp_path / "out")
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 1, "test": 1}
    assert split_of_each(dataset) == split_of_each(dataset_of(images[::-1], tmp_path / "reversed"))
    found = np.concatenate([pixels_of(split) for split in dataset.splits.values()])
    assert sorted(image.tobytes() for image in found) == sorted(image.tobytes() for image in images)


@pytest.mark.parametrize(("fraction", "moved_to"), [(1e-9, "test"), (1 - 1e-9, "train")])
def test_a_split_that_would_be_empty_gets_one_image_and_the_others_keep_order_and_labels(
    tmp_path: Path, fraction: float, moved_to: str
) -> None:
    images = noise(30)
    prepared(Numbered(images), tmp_path / "out", test_fraction=fraction)
    dataset = opened(tmp_path / "out")
    other = {"test": "train", "train": "test"}[moved_to]
    assert (len(dataset.splits[moved_to]), len(dataset.splits[other])) == (1, 29)
    numbers = {name: split.columns["number"].tolist() for name, split in dataset.splits.items()}
    assert numbers[other] == sorted(set(range(30)) - set(numbers[moved_to]))
    for name, split in dataset.splits.items():
        assert np.array_equal(pixels_of(split), np.stack([images[number] for number in numbers[name]]))
        assert torch.equal(dataset.sum_of_images(name), split.first(30).sum(0, dtype=torch.int64))


def test_duplicates_in_train_and_test_are_counted_in_a_warning(
    tmp_path: Path,
) -> None:
    images = noise(30)
    different = dataset_of(images, tmp_path / "different", splits=["train"] * 20 + ["test"] * 10)
    assert not any("training images" in line for line in different.description.warnings)
    doubled = [*images[:20], *images[17:20], *images[23:]]
    line, *_ = dataset_of(doubled, tmp_path / "out", splits=["train"] * 20 + ["test"] * 10).description.warnings
    assert line.startswith("3 of the 10 test images are training images too, pixel by pixel")


# --- channels and sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", [[3], [50], [3, 50], [*range(8, 16)], [*range(1, 63, 5)]], ids=str)
def test_one_colour_image_makes_all_images_of_three_channels(tmp_path: Path, colour: list[int]) -> None:
    """Inside a part and across parts, with equal pixels and digests as if all had been stored so."""
    images = noise(64, shape=(1, 3, 5))
    in_colour = dict(zip(colour, noise(len(colour), seed=1, shape=(3, 3, 5)), strict=True))
    mixed = [in_colour.get(number, image) for number, image in enumerate(images)]
    alike = [image if len(image) == 3 else image.repeat(3, axis=0) for image in mixed]
    found, expected = dataset_of(mixed, tmp_path / "mixed"), dataset_of(alike, tmp_path / "alike")
    assert found.description.image_shape == (3, 3, 5)
    assert found.description.fingerprints == expected.description.fingerprints
    for name, split in found.splits.items():
        assert np.array_equal(pixels_of(split), pixels_of(expected.splits[name]))
        assert split.columns["number"].tolist() == expected.splits[name].columns["number"].tolist()
        assert torch.equal(found.sum_of_images(name), expected.sum_of_images(name))


@pytest.mark.parametrize("place", [3, 50])
def test_other_mixtures_of_channels_are_refused(tmp_path: Path, place: int) -> None:
    images = noise(64)
    images[place] = noise(1, shape=(3, 3, 5))[0]
    with pytest.raises(UserError, match="numbered images has images of 2 and 3 channels; should be of one number"):
        dataset_of(images, tmp_path / "out")


def test_sizes_that_differ_are_refused_with_their_counts(tmp_path: Path) -> None:
    images = [*noise(20), *noise(2, shape=(2, 4, 5)), *noise(3, shape=(2, 3, 6))]
    with pytest.raises(UserError, match=r"3x5 \(20\), 3x6 \(3\), 4x5 \(2\); give one, .* --data.image-size 64"):
        dataset_of(images, tmp_path / "out")
    more = [*images, *(noise(1, shape=(2, 9, width))[0] for width in range(10, 14))]
    with pytest.raises(UserError, match=r"3x5 \(20\), 3x6 \(3\), 4x5 \(2\), .* and 2 other sizes; give one"):
        dataset_of(more, tmp_path / "more")
    with pytest.raises(UserError, match=r"^data\.source: numbered images has images of several sizes"):
        prepared(Numbered(images), tmp_path / "not files", settings={})


# --- images that cannot be used ---------------------------------------------------------------------------


def test_unusable_images_are_skipped_up_to_the_fraction_and_listed(tmp_path: Path) -> None:
    unusable = [0, 9, 33, 34, 35]
    images = noise(50)
    dataset = dataset_of(images, tmp_path / "out", unusable=unusable)  # a tenth
    assert dataset.description.num_skipped == 5
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert lines == [{"name": f"{number}.png", "reason": f"is bad by {number}"} for number in unusable]
    numbers = [number for split in dataset.splits.values() for number in split.columns["number"].tolist()]
    assert sorted(numbers) == [number for number in range(50) if number not in unusable]
    usable = dataset_of([image for number, image in enumerate(images) if number not in unusable], tmp_path / "usable")
    assert usable.description.fingerprints == dataset.description.fingerprints
    assert not (tmp_path / "usable" / "skipped.jsonl").exists()


def test_more_unusable_images_are_refused_and_what_was_decoded_is_kept(tmp_path: Path) -> None:
    images, log, out = noise(50), tmp_path / "log", tmp_path / "out"
    source = Numbered(images, log=log, unusable=[0, 9, 33, 34, 35, 41])
    with pytest.raises(UserError, match=r"^data\.root: at least 6 of 50 images cannot be used: ") as refusal:
        prepared(source, out)
    message = str(refusal.value)
    assert "'0.png' is bad" in message
    assert "\n" not in message
    assert "and 1 others; mend or remove them, or allow more with --data.max-skipped-fraction (now 0.1)" in message
    assert starts_read(log) == [0, 8, 16, 24, 32, 40]  # no further
    assert prepared(source, out, max_skipped_fraction=0.12).num_skipped == 6
    assert starts_read(log) == [0, 8, 16, 24, 32, 40, 48]


def test_a_source_of_which_no_image_can_be_used_is_refused_whatever_may_be_skipped(tmp_path: Path) -> None:
    source = Numbered(noise(3), unusable=[0, 1, 2])
    with pytest.raises(UserError, match=r"none of the 3 images can be used; the first, '0\.png', is bad"):
        prepared(source, tmp_path / "out", max_skipped_fraction=1.0)


# --- shards -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("num_most", [8, 11, 20])
def test_shards_are_bounded_and_joined_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_most: int, is_large: bool
) -> None:
    monkeypatch.setattr(preparation, "LARGE_SET_BYTES", 149 * IMAGE_BYTES if is_large else 150 * IMAGE_BYTES)
    monkeypatch.setattr(preparation, "LARGE_SET_SHARD_BYTES", (num_most if is_large else 8) * IMAGE_BYTES)
    monkeypatch.setattr(preparation, "MAX_SHARD_BYTES", (100 if is_large else num_most) * IMAGE_BYTES)
    images = noise(150)
    dataset = dataset_of(images, tmp_path / "out")
    for name, split in dataset.splits.items():
        files = dataset.description.shards[name]
        assert [shard.num_images for shard in split.shards] == [file.num_rows for file in files]
        assert sum(file.num_rows for file in files) == len(split)
        assert max(file.num_rows for file in files) <= num_most
        assert min(file.num_rows for file in files[:-1]) > num_most / 2 - 8  # two that follow fit in none
        numbers = split.columns["number"].tolist()
        assert numbers == sorted(numbers)
        assert np.array_equal(pixels_of(split), np.stack([images[number] for number in numbers]))
    names = {file.name for file in dataset.description.files}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {*names, "dataset.json"}


def test_a_part_that_is_large_enough_becomes_a_shard_without_being_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "MAX_SHARD_BYTES", 8 * IMAGE_BYTES)
    splits = ["train"] * 16 + ["test"] * 3
    dataset = dataset_of(noise(19), tmp_path / "out", splits=splits)
    key = dataset.description.key[:8]
    names = [file.name for file in dataset.description.shards["train"]]
    assert names == [f"train-{key}-000000.arrow", f"train-{key}-000001.arrow"]
    assert [file.name for file in dataset.description.shards["test"]] == ["test-00000.arrow"]


# --- processes and places ---------------------------------------------------------------------------------


def test_two_processes_write_the_same_files_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, log = noise(150), tmp_path / "log"
    alone = prepared(Numbered(images, unusable=[70]), tmp_path / "alone")
    monkeypatch.setattr(processes, "ALONE_SECONDS", 0.0)
    run = functools.partial(run_tasks, num_processes=2)
    plan = plan_of(Numbered(images, unusable=[70], log=log))
    assert prepare(plan, str(tmp_path / "together"), run=run) == alone
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")
    assert starts_read(log) == list(range(0, 150, 8))


def test_an_error_in_another_process_is_raised_here_and_the_rest_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, log = noise(150), tmp_path / "log"
    monkeypatch.setattr(processes, "ALONE_SECONDS", 0.0)
    run = functools.partial(run_tasks, num_processes=2)
    with pytest.raises(RuntimeError, match="the disk ends at image 80"):
        prepare(plan_of(Numbered(images, log=log, fails_from=80)), str(tmp_path / "out"), run=run)
    assert set(starts_read(log)) <= set(range(0, 80, 8))
    prepare(plan_of(Numbered(images, log=log)), str(tmp_path / "out"), run=run)
    assert sorted(set(starts_read(log))) == list(range(0, 150, 8))
    prepared(Numbered(images), tmp_path / "alone")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


@pytest.fixture
def uri(store: ObjectStore, request: pytest.FixtureRequest) -> str:
    """A place of its own in the object store."""
    return f"s3://models/prepared/{hashlib.sha256(request.node.name.encode()).hexdigest()[:16]}"


def objects(uri: str) -> dict[str, bytes]:
    directory = RemoteDirectory(uri)
    return {name: directory.read(name) or b"" for name in directory.list()}


def test_an_object_store_gets_the_same_data_set_as_a_directory(tmp_path: Path, uri: str) -> None:
    images, log = noise(60), tmp_path / "log"
    here = prepared(Numbered(images, unusable=[3]), tmp_path / "here")
    with pytest.raises(RuntimeError):
        prepared(Numbered(images, unusable=[3], fails_from=40), uri)
    assert prepared(Numbered(images, unusable=[3], log=log), uri) == here
    assert starts_read(log) == [40, 48, 56]
    assert objects(uri) == contents(tmp_path / "here")


@pytest.fixture
def several_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 8 images."""
    monkeypatch.setattr(preparation, "MAX_SHARD_BYTES", 8 * IMAGE_BYTES)


SPLITS = ["train"] * 40 + ["test"] * 8


def remote(uri: str, cache: Path, *, limit_bytes: float | None = None) -> Dataset:
    dataset = open_remote(uri, cache=cache, limit_bytes=limit_bytes)
    assert dataset is not None
    return dataset


def fetched(cache: Path) -> set[str]:
    (directory,) = cache.glob("fetched-*")
    return {file.name for file in directory.iterdir() if not file.name.startswith(".")}


@pytest.mark.usefixtures("several_shards")
def test_of_a_data_set_at_a_uri_only_what_is_asked_for_is_fetched(tmp_path: Path, uri: str) -> None:
    images = noise(48)
    description = prepared(Numbered(images, splits=SPLITS), uri)
    dataset = remote(uri, tmp_path)
    assert dataset.description == description
    small = {"dataset.json", "sums.npz", "train.rows", "test.rows"}
    assert fetched(tmp_path) == small
    assert dataset.splits["train"].columns["number"].tolist() == list(range(40))
    assert torch.equal(dataset.sum_of_images("test"), torch.from_numpy(np.stack(images[40:]).sum(0, dtype=np.int64)))
    assert fetched(tmp_path) == small
    rows = torch.tensor([17, 39, 16])
    assert np.array_equal(dataset.splits["train"].gather(rows).numpy(), np.stack([images[17], images[39], images[16]]))
    names = [file.name for file in description.shards["train"]]
    assert len(names) == 5
    assert fetched(tmp_path) == {*small, names[2], names[4]}
    again = remote(uri, tmp_path)
    filesystem().delete_dir(uri.removeprefix("s3://"))
    assert np.array_equal(again.splits["train"].gather(rows).numpy(), np.stack([images[n] for n in rows.tolist()]))
    with pytest.raises(UserError, match=rf"data\.root: {uri}/{names[0]} cannot be fetched"):
        again.splits["train"].gather(torch.tensor([0]))


def test_a_uri_without_a_data_set_has_none(uri: str, tmp_path: Path) -> None:
    assert open_remote(uri, cache=tmp_path, limit_bytes=None) is None


@pytest.mark.usefixtures("several_shards")
def test_another_data_set_at_the_same_uri_is_not_mixed_with_the_fetched_one(tmp_path: Path, uri: str) -> None:
    first, second = noise(48), noise(48, seed=1)
    prepared(Numbered(first, splits=SPLITS), uri)
    assert np.array_equal(pixels_of(remote(uri, tmp_path).splits["test"]), np.stack(first[40:]))
    prepared(Numbered(second, splits=SPLITS), uri)
    assert np.array_equal(pixels_of(remote(uri, tmp_path).splits["test"]), np.stack(second[40:]))


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are downloaded."""
    names: list[str] = []
    original = RemoteDirectory.download

    def download(self: RemoteDirectory, name: str, file: Path) -> None:
        names.append(name)
        original(self, name, file)

    monkeypatch.setattr(RemoteDirectory, "download", download)
    return names


@pytest.mark.usefixtures("several_shards")
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_copy_is_fetched_again(tmp_path: Path, uri: str, damage: str, downloads: list[str]) -> None:
    images = noise(48)
    prepared(Numbered(images, splits=SPLITS), uri)
    assert len(pixels_of(remote(uri, tmp_path).splits["train"])) == 40
    (directory,) = tmp_path.glob("fetched-*")
    for name in ("train.rows", remote(uri, tmp_path).description.shards["train"][1].name):
        content = (directory / name).read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
        (directory / name).unlink()
        (directory / name).write_bytes({"flipped": flipped, "cut": content[:-1], "empty": b""}[damage])
        downloads.clear()
        dataset = remote(uri, tmp_path)
        assert np.array_equal(pixels_of(dataset.splits["train"]), np.stack(images[:40]))
        assert dataset.splits["train"].columns["number"].tolist() == list(range(40))
        assert downloads == [name]
        assert (directory / name).read_bytes() == content


@pytest.mark.usefixtures("several_shards")
def test_a_shard_is_fetched_twice_if_it_arrives_damaged_and_then_refused(
    tmp_path: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = noise(48)
    prepared(Numbered(images, splits=SPLITS), uri)
    dataset, original, num_bad = remote(uri, tmp_path), RemoteDirectory.download, 1

    def download(self: RemoteDirectory, name: str, file: Path) -> None:
        nonlocal num_bad
        original(self, name, file)
        if num_bad:
            num_bad -= 1
            file.write_bytes(file.read_bytes()[:-1] + b"\0")

    monkeypatch.setattr(RemoteDirectory, "download", download)
    assert np.array_equal(dataset.splits["train"].gather(torch.tensor([0]))[0].numpy(), images[0])
    num_bad = 2
    with pytest.raises(CorruptFile, match=rf"^{uri}/train-.*\.arrow: damaged$"):
        dataset.splits["train"].gather(torch.tensor([39]))
    assert not [name for name in fetched(tmp_path) if name.startswith(".partial")]
    assert np.array_equal(dataset.splits["train"].gather(torch.tensor([39]))[0].numpy(), images[39])


@pytest.mark.usefixtures("several_shards")
def test_the_copies_stay_within_the_limit_and_the_longest_unused_make_room(
    tmp_path: Path, uri: str, downloads: list[str]
) -> None:
    images = noise(48)
    files = prepared(Numbered(images, splits=SPLITS), uri).shards["train"]
    names, limit = [file.name for file in files], 2 * files[0].num_bytes
    assert {file.num_bytes for file in files} == {files[0].num_bytes}
    split = remote(uri, tmp_path, limit_bytes=limit).splits["train"]
    for asked, kept in [(0, {0}), (1, {0, 1}), (2, {1, 2}), (4, {2, 4})]:
        assert np.array_equal(split.gather(torch.tensor([8 * asked]))[0].numpy(), images[8 * asked])
        assert {name for name in fetched(tmp_path) if name.endswith(".arrow")} == {names[shard] for shard in kept}
    # what is mapped stays readable without its file, and giving it back does not fetch it
    downloads.clear()
    assert np.array_equal(split.gather(torch.tensor([3]))[0].numpy(), images[3])
    split.shards[0].release()
    assert downloads == []
    assert np.array_equal(split.gather(torch.tensor([3]))[0].numpy(), images[3])
    assert downloads == [names[0]]
    assert {name for name in fetched(tmp_path) if name.endswith(".arrow")} == {names[4], names[0]}
