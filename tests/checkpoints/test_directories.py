"""Which checkpoints a directory has, which one is loaded, and what is deleted or renamed."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints.written import change_manifest, load, save, state_after
from vae_ray import TrainedVAE, UserError
from vae_ray.checkpoints.finding import find_checkpoint
from vae_ray.checkpoints.listing import all_checkpoints, best_checkpoint, complete_checkpoints
from vae_ray.checkpoints.loading import EXPERIMENT, FORMAT_VERSION, MANIFEST, TRAINING_STATE, WEIGHTS
from vae_ray.checkpoints.quarantine import load_newest
from vae_ray.checkpoints.saving import NotSaved, copy_checkpoint, prune_checkpoints
from vae_ray.errors import CorruptFile


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each regular file was opened, by the last two parts of its path."""
    counts: Counter[str] = Counter()
    os_open = os.open

    def counted(file: Any, *args: Any, **kwargs: Any) -> int:
        if Path(file).is_file():
            counts["/".join(Path(file).parts[-2:])] += 1
        return os_open(file, *args, **kwargs)

    monkeypatch.setattr(os, "open", counted)
    return counts


def storage_away(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    os_open = os.open

    def away(file: Any, *args: Any, **kwargs: Any) -> int:
        if str(file).endswith(name):
            raise OSError(5, "Input/output error")
        return os_open(file, *args, **kwargs)

    monkeypatch.setattr(os, "open", away)


# --- which ones there are -------------------------------------------------------------------------------


def test_directories_without_a_manifest_are_not_checkpoints(tmp_path: Path) -> None:
    whole = save(tmp_path, epoch=2).path
    (tmp_path / ".partial-epoch=0003").mkdir()
    (tmp_path / "epoch=0004").mkdir()
    (tmp_path / "epoch=0004" / WEIGHTS).write_bytes((whole / WEIGHTS).read_bytes())
    assert [found.epoch for found in complete_checkpoints(tmp_path)] == [2]
    assert complete_checkpoints(tmp_path / "missing") == []


def test_the_best_is_by_the_selection_metric_and_the_earlier_on_a_tie(tmp_path: Path) -> None:
    for epoch, score in [(1, 9.0), (2, 3.0), (3, 3.0), (4, 8.0)]:
        save(tmp_path, epoch=epoch, score=score, **{"val/loss": -epoch, "test/nelbo": -epoch})
    assert best_checkpoint(complete_checkpoints(tmp_path)).epoch == 2


def test_checkpoints_inside_epochs_are_in_the_order_of_training_and_never_the_best(tmp_path: Path) -> None:
    for epoch in (9, 10):
        save(tmp_path, epoch=epoch)
    for epoch, step in [(10, 3), (11, 2_000_000), (11, 7)]:
        save(tmp_path, epoch=epoch, step=step)
    order = [found.path.name.removeprefix("epoch=00") for found in all_checkpoints(tmp_path)]
    assert order == ["09", "10-step=000003", "10", "11-step=000007", "11-step=2000000"]
    assert [found.epoch for found in complete_checkpoints(tmp_path)] == [9, 10]


# --- what is loaded -------------------------------------------------------------------------------------


def test_load_newest_reads_every_file_of_one_checkpoint_once(tmp_path: Path, opened: Counter[str]) -> None:
    for epoch in (1, 2, 3):
        save(tmp_path, epoch=epoch)
    opened.clear()
    newest = load_newest(tmp_path)
    assert newest is not None
    newest.weights(state_after(0).model.state_dict())
    newest.training_state()
    newest.experiment()
    assert opened == {f"epoch=0003/{name}": 1 for name in (MANIFEST, EXPERIMENT, WEIGHTS, TRAINING_STATE)}


@pytest.mark.parametrize("name", [MANIFEST, EXPERIMENT, WEIGHTS, TRAINING_STATE])
def test_load_newest_renames_damaged_checkpoints_and_returns_the_one_before(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    for epoch in (1, 2, 3):
        save(tmp_path, epoch=epoch)
    (tmp_path / ".partial-epoch=0004").mkdir()
    for epoch in (2, 3):
        file = tmp_path / f"epoch=000{epoch}" / name
        file.write_bytes(file.read_bytes()[:-1])
    newest = load_newest(tmp_path)
    assert newest is not None
    assert newest.epoch == 1
    assert names(tmp_path) == [".damaged-epoch=0002", ".damaged-epoch=0003", "epoch=0001"]
    first, second = (record.getMessage() for record in caplog.records)
    assert str(tmp_path / "epoch=0003" / name) in first
    assert first.endswith("renamed to .damaged-epoch=0003")
    assert second.endswith("renamed to .damaged-epoch=0002")


def test_load_newest_keeps_an_earlier_damaged_checkpoint_of_that_name(tmp_path: Path) -> None:
    for _ in range(2):
        (save(tmp_path).path / WEIGHTS).write_bytes(b"")
        assert load_newest(tmp_path) is None
    assert names(tmp_path) == [".damaged-epoch=0001", ".damaged-epoch=0001-2"]


@pytest.mark.parametrize("name", [MANIFEST, EXPERIMENT, WEIGHTS, TRAINING_STATE])
def test_load_newest_raises_for_what_cannot_be_read_now_and_renames_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for epoch in (1, 2):
        save(tmp_path, epoch=epoch)
    storage_away(monkeypatch, name)
    with pytest.raises(UserError, match=rf"{name}: cannot be read now \(Input/output error\)"):
        load_newest(tmp_path)
    assert names(tmp_path) == ["epoch=0001", "epoch=0002"]


def test_load_newest_raises_for_a_newer_format_and_renames_nothing(tmp_path: Path) -> None:
    for epoch in (1, 2):
        path = save(tmp_path, epoch=epoch).path
    change_manifest(path, lambda manifest: manifest.update(format_version=FORMAT_VERSION + 1))
    with pytest.raises(UserError, match="is newer than this vae_ray reads"):
        load_newest(tmp_path)
    assert names(tmp_path) == ["epoch=0001", "epoch=0002"]


def test_load_newest_prefers_the_newest_position_and_calls_pull_before_it_reads(tmp_path: Path) -> None:
    save(tmp_path, epoch=1)
    save(tmp_path, epoch=2, step=7)
    pulled: list[str] = []
    newest = load_newest(tmp_path, pull=lambda path: pulled.append(path.name))
    assert newest is not None
    assert newest.position == (1, 7)
    assert pulled == ["epoch=0002-step=000007"]


def test_a_run_gives_its_best_intact_checkpoint_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "checkpoints").mkdir()
    for epoch, score in [(1, 4.0), (2, 3.0), (3, 5.0)]:
        save(tmp_path / "checkpoints", epoch=epoch, score=score)
    (tmp_path / "checkpoints/epoch=0002" / WEIGHTS).write_bytes(b"")
    assert find_checkpoint(tmp_path).epoch == 1
    assert TrainedVAE.load(tmp_path).checkpoint.epoch == 1
    assert "epoch=0002/weights.safetensors: truncated" in caplog.text
    assert names(tmp_path / "checkpoints") == ["epoch=0001", "epoch=0002", "epoch=0003"]


# --- what is written and deleted ------------------------------------------------------------------------


def test_saving_again_replaces_the_checkpoint_of_that_epoch(tmp_path: Path) -> None:
    save(tmp_path, score=5.0)
    save(tmp_path, score=4.0)
    (found,) = complete_checkpoints(tmp_path)
    assert found.score == 4.0
    load(found.path)
    assert names(found.path) == sorted([MANIFEST, EXPERIMENT, WEIGHTS, TRAINING_STATE])


def test_copying_replaces_the_copy_before_and_needs_an_intact_source(tmp_path: Path) -> None:
    old, new = (save(tmp_path, epoch=epoch) for epoch in (1, 2))
    copy = tmp_path / "best"
    for source in (old, new):
        copy_checkpoint(source, copy)
        assert find_checkpoint(copy).epoch == source.epoch
        load(copy)
    (old.path / WEIGHTS).write_bytes(b"")
    with pytest.raises(CorruptFile, match="epoch=0001/weights"):
        copy_checkpoint(old, copy)
    assert find_checkpoint(copy).epoch == 2
    assert names(tmp_path) == ["best", "epoch=0001", "epoch=0002"]


def test_a_checkpoint_that_cannot_be_written_leaves_what_there_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = save(tmp_path, score=5.0)
    copy_checkpoint(checkpoint, tmp_path / "best")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(NotSaved, match=r"epoch=0001: .*No space left on device: [\d,]+ bytes needed"):
            save(tmp_path, score=4.0)
        with pytest.raises(NotSaved, match=r"best: .*No space left on device"):
            copy_checkpoint(checkpoint, tmp_path / "best")
    assert names(tmp_path) == ["best", "epoch=0001"]
    for path in tmp_path.iterdir():
        assert find_checkpoint(path).score == 5.0
        load(path)


@pytest.mark.parametrize(
    ("num_best", "kept"), [(1, [3, 12]), (2, [2, 3, 12]), (3, [2, 3, 10, 12]), (99, [1, 2, 3, 10, 11, 12])]
)
def test_pruning_keeps_the_best_and_the_last(tmp_path: Path, num_best: int, kept: list[int]) -> None:
    for epoch, score in [(1, 9.0), (2, 4.0), (3, 3.0), (10, 5.0), (11, 7.0), (12, 8.0)]:
        save(tmp_path, epoch=epoch, score=score)
    (tmp_path / ".partial-epoch=0013").mkdir()
    prune_checkpoints(tmp_path, num_best=num_best)
    assert names(tmp_path) == [f"epoch={epoch:04d}" for epoch in kept]


def test_pruning_keeps_the_newest_inside_an_epoch_until_that_epoch_is_whole(tmp_path: Path) -> None:
    for epoch, score in [(1, 1.0), (2, 9.0), (3, 8.0)]:
        save(tmp_path, epoch=epoch, score=score)
    for step in (5, 10):
        save(tmp_path, epoch=4, step=step)
    prune_checkpoints(tmp_path, num_best=1)
    assert names(tmp_path) == ["epoch=0001", "epoch=0003", "epoch=0004-step=000010"]
    save(tmp_path, epoch=4, score=7.0)
    prune_checkpoints(tmp_path, num_best=1)
    assert names(tmp_path) == ["epoch=0001", "epoch=0004"]
