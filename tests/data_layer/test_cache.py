"""Truth and system: the node's cache decodes a data set once, keeps it whole, and never gives out a damaged one."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import filelock
import numpy as np
import pytest

from tests.data_layer.stored import labels_of, open_split, pixels_of
from vae_ray import UserError
from vae_ray.config.sections.data import DigitsData, ImagesData, PreparedData
from vae_ray.data.cache import VERIFIED, cached_datasets, clean, name_of, open_dataset
from vae_ray.data.dataset import Split
from vae_ray.data.shards import DATASET_FILE, File
from vae_ray.data.sources.decoded import Decoded
from vae_ray.data.sources.digits import Digits
from vae_ray.storage.records import verify, with_checksum

FILES = [DATASET_FILE, "sums.npz", "test-00000.arrow", "test.rows", "train-00000.arrow", "train.rows"]


@pytest.fixture
def config(tmp_path: Path) -> DigitsData:
    return DigitsData(cache_dir=tmp_path / "cache")


def directory_of(config: DigitsData) -> Path:
    assert config.cache_dir is not None
    (directory,) = config.cache_dir.glob("digits-*[0-9a-f]")
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def equal(a: Split, b: Split) -> bool:
    return np.array_equal(pixels_of(a), pixels_of(b)) and np.array_equal(labels_of(a), labels_of(b))


def make_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the digits fail as soon as anybody decodes them."""

    def load(self: Digits, split: str) -> Decoded:
        raise AssertionError(f"decoded {split} again")

    monkeypatch.setattr(Digits, "load", load)


# --- decoded once -----------------------------------------------------------------------------------------


def test_what_is_opened_equals_what_was_decoded(config: DigitsData) -> None:
    for _ in range(2):  # decoded now, then from the files
        for name in ("train", "test"):
            pixels, columns = Digits().load(name)
            opened = open_split(config, name)
            assert np.array_equal(pixels_of(opened), pixels)
            assert np.array_equal(labels_of(opened), columns["label"])
    assert sorted(contents(directory_of(config))) == FILES


def test_second_open_maps_the_files_and_decodes_nothing(config: DigitsData, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_split(config, "test")
    make_unreadable(monkeypatch)
    second = open_split(config, "test")
    assert equal(first, second)
    if sys.platform == "linux":
        mapped = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if ".arrow" in line]
        ranges = [[int(end, 16) for end in line.split("-")] for line in mapped]
        assert any(low <= second.shards[0].pixels.data_ptr() < high for low, high in ranges)
    with pytest.raises(AssertionError, match="decoded train again"):
        open_split(DigitsData(cache_dir=directory_of(config) / "elsewhere"), "test")


def test_a_change_of_the_raw_data_makes_another_data_set_beside_the_first(
    config: DigitsData, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_dataset(config)
    monkeypatch.setattr(Digits, "fingerprint", lambda self: "another version")
    second = open_dataset(config)
    assert first.description.key != second.description.key
    assert first.description.fingerprints == second.description.fingerprints
    assert len(cached_datasets(Path(str(config.cache_dir)))) == 2


def test_a_directory_with_the_data_set_of_another_key_is_prepared_again(
    config: DigitsData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names have 64 bits of the key: a collision must not give out other images."""
    first = open_split(config, "test")
    directory = directory_of(config)
    monkeypatch.setattr(Digits, "fingerprint", lambda self: "another version")
    second = open_dataset(config)
    names = {path.name for path in directory.parent.glob("digits-*[0-9a-f]")}
    (other,) = names - {directory.name}
    for file in directory.iterdir():
        (directory.parent / other / file.name).write_bytes(file.read_bytes())
    again = open_dataset(config)
    assert again.description.key == second.description.key
    assert equal(again.splits["test"], first)


EIGHT_PROCESSES = """
import os, sys, time
from vae_ray.config.sections.data import DigitsData
from vae_ray.data.cache import open_dataset
from vae_ray.data.sources.digits import Digits

cache, log = sys.argv[1:]
load = Digits.load
pixels = {split: load(Digits(), split)[0] for split in ("train", "test")}
start = time.time() + 0.3

def counted(self, split):
    with open(log, "a") as stream:
        stream.write(f"{split} {os.getpid()}\\n")
    time.sleep(0.2)  # time for the others to come
    return load(self, split)

Digits.load = counted
children = []
for _ in range(8):
    child = os.fork()
    if child == 0:
        time.sleep(max(0.0, start - time.time()))
        splits = open_dataset(DigitsData(cache_dir=cache)).splits
        same = [(splits[name].first(2000).numpy() == pixels[name]).all() for name in pixels]
        os._exit(0 if all(same) else 1)
    children.append(child)
sys.exit(sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_eight_processes_on_a_cold_cache_decode_once_and_all_see_the_images(tmp_path: Path) -> None:
    command = [sys.executable, "-c", EIGHT_PROCESSES, str(tmp_path / "cache"), str(tmp_path / "log")]
    assert subprocess.run(command, timeout=60).returncode == 0
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(split for split, _ in lines) == ["test", "train"]
    assert len({process for _, process in lines}) == 1
    assert not list((tmp_path / "cache").rglob("*partial*"))


def test_whoever_waits_for_another_process_says_so_once(config: DigitsData) -> None:
    open_dataset(config)
    with filelock.FileLock(directory_of(config).with_suffix(".lock")):
        # a child, as one process may take its own lock again
        code = (
            "import logging, sys; from vae_ray.data import cache; from vae_ray.config.sections.data import DigitsData\n"
            "logging.basicConfig(); cache.PATIENCE_SECONDS = 0.05\n"
            "cache.open_dataset(DigitsData(cache_dir=sys.argv[1]))"
        )
        child = subprocess.Popen([sys.executable, "-c", code, str(config.cache_dir)], stderr=subprocess.PIPE, text=True)
        assert child.stderr is not None
        first = child.stderr.readline()
        time.sleep(0.3)
    assert "another process prepares these images; waiting for it" in first
    assert child.communicate(timeout=60)[1] == ""
    assert child.returncode == 0


# --- damage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0.0, 0.1, 0.5, 0.9, 0.999999])
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_named_in_a_warning_and_the_images_prepared_again(
    config: DigitsData, name: str, position: float, caplog: pytest.LogCaptureFixture
) -> None:
    open_dataset(config)
    directory = directory_of(config)
    whole = contents(directory)
    flipped = bytearray(whole[name])
    flipped[int(position * len(flipped))] ^= 0x10
    (directory / name).unlink()  # a new inode: earlier mappings of this process stay as they are
    (directory / name).write_bytes(flipped)
    with caplog.at_level(logging.WARNING):
        again = open_dataset(config)
    assert f"{directory / name}: damaged" in caplog.text
    assert "preparing the images again" in caplog.text
    assert contents(directory) == whole
    for split in ("train", "test"):
        assert np.array_equal(pixels_of(again.splits[split]), Digits().load(split)[0])
    caplog.clear()
    open_dataset(config)
    assert caplog.text == ""


@pytest.mark.parametrize("name", FILES[1:])
@pytest.mark.parametrize("is_cut", [True, False], ids=["cut", "missing"])
def test_a_cut_or_missing_file_is_named_and_the_images_prepared_again(
    config: DigitsData, name: str, is_cut: bool, caplog: pytest.LogCaptureFixture
) -> None:
    open_dataset(config)
    directory = directory_of(config)
    whole = contents(directory)
    (directory / name).unlink()
    if is_cut:
        (directory / name).write_bytes(whole[name][:-1])
    open_dataset(config)
    assert str(directory / name) in caplog.text
    assert contents(directory) == whole


def test_a_data_set_of_another_version_is_prepared_again(config: DigitsData, caplog: pytest.LogCaptureFixture) -> None:
    open_dataset(config)
    file = directory_of(config) / DATASET_FILE
    whole = file.read_bytes()
    file.write_text(json.dumps(with_checksum({**verify(json.loads(whole)), "version": 2})))
    open_dataset(config)
    assert "version 2, this vae_ray reads 3" in caplog.text
    assert file.read_bytes() == whole


@pytest.mark.parametrize("left", ["everything but the description", "parts of something else", "a part cut short"])
def test_what_a_killed_preparation_left_is_completed_and_cleared_away(config: DigitsData, left: str) -> None:
    open_dataset(config)
    directory = directory_of(config)
    whole = contents(directory)
    if left == "parts of something else":
        for name in ("part-01234567-000000.json", "train-01234567-000000.arrow", "train-01234567-000000.arrow.npz"):
            (directory / name).write_bytes(b"other")
    if left == "a part cut short":
        (directory / f".partial-train-{directory.name[-16:-8]}-000000.arrow").write_bytes(b"ARROW1")
    (directory / f".partial-{DATASET_FILE}").write_bytes(whole[DATASET_FILE][:100])
    (directory / DATASET_FILE).unlink()
    open_dataset(config)
    assert contents(directory) == whole


# --- notes of what was verified ---------------------------------------------------------------------------


@pytest.fixture
def num_verified(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose checksums were computed."""
    names: list[str] = []
    original = File.is_intact

    def is_intact(self: File, content: object) -> bool:
        names.append(self.name)
        return original(self, content)

    monkeypatch.setattr(File, "is_intact", is_intact)
    return names


def test_a_node_verifies_the_files_once(config: DigitsData, num_verified: list[str]) -> None:
    open_dataset(config)
    num_verified.clear()
    open_dataset(config)
    assert num_verified == []
    os.utime(directory_of(config) / "test-00000.arrow", (5, 5))  # a file that may have changed
    open_dataset(config)
    assert sorted(num_verified) == FILES[1:]
    num_verified.clear()
    open_dataset(config)
    assert num_verified == []


@pytest.mark.parametrize("damage", ["missing", "empty", "not json", "of other files", "a list"])
def test_without_a_good_note_the_files_are_verified_and_not_decoded(
    config: DigitsData, damage: str, monkeypatch: pytest.MonkeyPatch, num_verified: list[str]
) -> None:
    first = open_split(config, "test")
    (note,) = (directory_of(config).parent / VERIFIED).iterdir()
    good = note.read_text()
    other = json.dumps({name: [1, 2, 3] for name in FILES[1:]})
    written = {"empty": "", "not json": "{", "of other files": other, "a list": "[]"}
    note.unlink()
    if damage in written:
        note.write_text(written[damage])
    make_unreadable(monkeypatch)
    num_verified.clear()
    assert equal(open_split(config, "test"), first)
    assert sorted(num_verified) == FILES[1:]
    assert note.read_text() == good


# --- places and sizes -------------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written_is_refused_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(UserError, match=r"data\.cache_dir .*file.*try --data.cache-dir DIR"):
        open_split(DigitsData(cache_dir=tmp_path / "file"), "test")


def test_a_prepared_data_set_is_read_where_it_lies(config: DigitsData, tmp_path: Path) -> None:
    prepared = open_dataset(config)
    cache = tmp_path / "other"
    for section in (PreparedData, ImagesData):
        found = open_dataset(section(root=str(directory_of(config)), cache_dir=cache))
        assert found.description == prepared.description
        assert equal(found.splits["train"], prepared.splits["train"])
    assert [path.name for path in cache.iterdir()] == [VERIFIED]


def test_a_directory_without_a_prepared_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root: got '.*', which is no prepared data set.* data prepare"):
        open_dataset(PreparedData(root=str(tmp_path), cache_dir=tmp_path / "cache"))
    with pytest.raises(UserError, match=r"data\.root: is missing; .*data prepare"):
        open_dataset(PreparedData(cache_dir=tmp_path / "cache"))


def test_the_progress_of_a_preparation_ends_at_the_number_of_images(config: DigitsData) -> None:
    done: list[tuple[int, int | None]] = []
    open_dataset(config, progress=lambda *numbers: done.append(numbers))
    assert done[-1] == (1797, None)
    assert done == sorted(done)
    open_dataset(config, progress=lambda *numbers: done.clear())
    assert done


def test_clean_deletes_what_is_unused_or_interrupted_and_nothing_that_is_held(
    config: DigitsData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    open_dataset(config)
    used = directory_of(config)
    for name in ("old-0123456789abcdef", "held-0123456789abcdef", "cut-0123456789abcdef", "mine", "datasets"):
        (cache / name).mkdir()
        (cache / name / "file.bin").write_bytes(b"12345")
    for name in ("old-0123456789abcdef", "held-0123456789abcdef"):
        (cache / name / DATASET_FILE).write_text("{}")
        os.utime(cache / name, (time.time() - 1000, time.time() - 1000))
    (cache / "digits-test-0123456789abcdef.arrow").write_bytes(b"of an earlier version")
    found = {each.path.name: each for each in cached_datasets(cache)}
    assert found.keys() == {used.name, "old-0123456789abcdef", "held-0123456789abcdef", "cut-0123456789abcdef"}
    assert found["old-0123456789abcdef"].num_bytes == 7
    assert found[used.name].num_bytes == sum(map(len, contents(used).values()))
    assert not found["cut-0123456789abcdef"].is_complete
    lock = cache / "held-0123456789abcdef.lock"
    code = "import filelock, sys\nwith filelock.FileLock(sys.argv[1]):\n print('held', flush=True)\n sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        deleted = clean(cache, unused_seconds=500)
        holder.communicate()
    assert {each.path.name for each in deleted} == {"old-0123456789abcdef", "cut-0123456789abcdef"}
    remaining = {path.name for path in cache.iterdir() if path.is_dir()}
    assert remaining == {used.name, "held-0123456789abcdef", "mine", "datasets", VERIFIED}
    assert not (cache / "digits-test-0123456789abcdef.arrow").exists()
    make_unreadable(monkeypatch)
    open_dataset(config)


def test_a_name_in_the_cache_is_that_of_the_source_or_of_the_users_folder() -> None:
    assert name_of(DigitsData()) == "digits"
    assert name_of(ImagesData(root="/some/My photos (2).zip")) == "My-photos--2"
    assert name_of(ImagesData(root="s3://bucket/crops/")) == "crops"
    assert name_of(ImagesData()) == "auto"
    assert len(name_of(ImagesData(root="x" * 99))) == 40
