"""A directory and its counterpart: what is copied, in which order, and what a failure leaves behind."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vae_ray.errors import TrainingFailed
from vae_ray.storage import background, retry
from vae_ray.storage.background import BackgroundSync
from vae_ray.storage.mirror import Mirror
from vae_ray.storage.remote import RemoteDirectory
from vae_ray.storage.synced import SyncedDirectory, copy_path


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def everything(name: str) -> bool:
    return True


def write(directory: Path, **contents: str) -> None:
    for name, text in contents.items():
        file = directory / name.replace("__", "/").replace("_json", ".json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.fixture
def pair(tmp_path: Path) -> Mirror:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    return Mirror(tmp_path / "here", RemoteDirectory((tmp_path / "there").as_uri()))


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "there"


def test_both_sides_are_equal_after_a_push_but_for_hidden_files(pair: Mirror, there: Path) -> None:
    write(pair.directory, checkpoints__one__manifest_json="{}", metrics="1\n", hidden="x")
    (pair.directory / "hidden").rename(pair.directory / ".hidden")
    write(pair.directory / ".partial-two", weights="w")
    pair.push()
    assert files(there) == {"checkpoints/one/manifest.json": b"{}", "metrics": b"1\n"}


def test_a_changed_file_is_copied_again_and_an_unchanged_one_is_not(pair: Mirror, there: Path) -> None:
    write(pair.directory, grows="1\n", stays="s")
    pair.push()
    (there / "stays").write_text("untouched")
    with (pair.directory / "grows").open("a") as stream:
        stream.write("2\n")
    pair.push()
    assert files(there) == {"grows": b"1\n2\n", "stays": b"untouched"}


def test_what_was_deleted_here_is_deleted_there_but_not_what_others_wrote(pair: Mirror, there: Path) -> None:
    write(pair.directory, checkpoints__old__manifest_json="{}", checkpoints__old__weights="w")
    write(there, summary="of the driver")
    pair.push()
    for file in ("manifest.json", "weights"):
        (pair.directory / "checkpoints" / "old" / file).unlink()
    pair.push()
    assert files(there) == {"summary": b"of the driver"}


@pytest.mark.parametrize("fails_at", range(4))
def test_a_push_that_breaks_off_leaves_no_manifest_without_its_files_and_is_made_good(
    pair: Mirror, there: Path, fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"checkpoints__e__{name}" for name in ("a", "b", "c")]
    write(pair.directory, checkpoints__e__manifest_json="{}", **dict.fromkeys(names, "content"))
    real, done = RemoteDirectory.write, []

    def breaks_off(self: RemoteDirectory, name: str, content: Any) -> None:
        if len(done) >= fails_at:
            raise OSError("the network is down")
        done.append(name)
        real(self, name, content)

    monkeypatch.setattr(RemoteDirectory, "write", breaks_off)
    with pytest.raises(OSError, match="network is down"):
        pair.push()
    assert "checkpoints/e/manifest.json" not in files(there)
    monkeypatch.undo()
    pair.push()
    assert files(there) == files(pair.directory)


def test_a_fetch_brings_what_is_wanted_and_later_only_what_has_changed(pair: Mirror, there: Path) -> None:
    write(there, light="1", weights_safetensors="w")
    pair.pull(lambda name: name == "light")
    assert files(pair.directory) == {"light": b"1"}
    here = pair.directory / "light"
    inode = here.stat().st_ino
    Mirror(pair.directory, pair.remote).pull(everything)
    assert here.stat().st_ino == inode, "unchanged, so not copied, by another process either"
    (there / "light").write_text("22")
    pair.pull(everything)
    assert here.read_text() == "22"


def test_what_was_fetched_is_not_pushed_back(pair: Mirror, there: Path) -> None:
    write(there, metrics="theirs")
    pair.pull(everything)
    (there / "metrics").write_text("newer, by another writer")
    pair.push()
    assert files(there)["metrics"] == b"newer, by another writer"


def test_what_is_gone_there_goes_here_too(pair: Mirror, there: Path) -> None:
    write(there, checkpoints__old__manifest_json="{}", stays="s")
    pair.pull(everything)
    (there / "checkpoints" / "old" / "manifest.json").unlink()
    pair.pull(everything)
    assert files(pair.directory) == {"stays": b"s"}


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_storage_that_comes_back_has_everything(
    pair: Mirror, there: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "RETRY_SECONDS", 0.1)
    write(pair.directory, one="1")
    gone = there.with_name("gone")
    there.rename(gone)
    there.write_text("no directory")  # every write fails
    sync = BackgroundSync(pair, watched=".stop")
    sync.push_soon()
    wait_until(lambda: "cannot be written now" in caplog.text)
    write(pair.directory, two="2")
    there.unlink()
    gone.rename(there)
    sync.close()
    assert files(there) == {"one": b"1", "two": b"2"}


def test_a_storage_that_stays_away_keeps_the_files_and_says_where(
    pair: Mirror, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "PAUSES_SECONDS", (0.1,))
    write(pair.directory, one="1")
    there.rmdir()
    there.write_text("no directory")
    with pytest.raises(TrainingFailed, match=r"could not be written.*the run's files are complete in .*unsent-here"):
        BackgroundSync(pair, watched=".stop").close()
    assert files(pair.directory.with_name("unsent-here")) == {"one": b"1"}


def test_a_copy_is_one_process_s_own_and_goes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAE_RAY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "there").mkdir()
    uri = (tmp_path / "there").as_uri()
    assert len({copy_path(uri, "writer") for _ in range(3)}) == 3
    write(tmp_path / "there", metrics="m", weights="w", checkpoints__one__weights="w")
    (tmp_path / "there" / "weights").rename(tmp_path / "there" / "weights.safetensors")
    path = copy_path(uri, "writer")
    copy = SyncedDirectory(path, Mirror(path, RemoteDirectory(uri)))
    with copy.working_copy():
        assert set(files(path)) == {"metrics", "checkpoints/one/weights"}
    assert not path.exists()


def test_a_watched_file_is_seen_without_waiting(pair: Mirror) -> None:
    sync = BackgroundSync(pair, watched=".stop")
    assert not sync.sees_watched()
    pair.remote.write(".stop", b"stop")
    wait_until(sync.sees_watched)
    sync.close()


def test_copies_of_dead_processes_are_cleared_away_but_not_what_they_could_not_send(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAE_RAY_CACHE", str(tmp_path))
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    mine = copy_path("s3://bucket/run", "writer")
    name = mine.name.replace(f"-{os.getpid()}-", f"-{dead}-")
    others = [mine.with_name(name), mine.with_name(f"unsent-{name}"), mine.with_name("writer-another.host-1-abcd")]
    for path in [mine, *others]:
        path.mkdir(parents=True)
    copy_path("s3://bucket/run", "driver")
    assert [path.exists() for path in [mine, *others]] == [True, False, True, True]


def test_a_deleted_checkpoint_goes_with_the_files_that_were_never_fetched(pair: Mirror, there: Path) -> None:
    write(there, checkpoints__old__manifest_json="{}", checkpoints__old__weights="heavy", checkpoints__new__weights="w")
    pair.pull(lambda name: name.endswith("manifest.json"))
    (pair.directory / "checkpoints" / "old" / "manifest.json").unlink()
    pair.push()
    assert files(there) == {"checkpoints/new/weights": b"w"}


def test_what_a_killed_writer_began_to_send_is_deleted_and_nothing_else(pair: Mirror, there: Path) -> None:
    write(
        there, checkpoints__begun__weights="w", checkpoints__whole__weights="w", checkpoints__whole__manifest_json="{}"
    )
    write(there, images__samples="s")
    pair.delete_incomplete("checkpoints")
    assert set(files(there)) == {"checkpoints/whole/weights", "checkpoints/whole/manifest.json", "images/samples"}
