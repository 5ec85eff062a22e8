"""kill -9 at every file operation: the run continues from its newest complete checkpoint and ends with equal bits."""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints.written import save
from tests.data_layer.stored import labels_of, pixels_of
from tests.faults.conftest import FORM, Count
from tests.faults.file_operations import Ended, run
from vae_ray import Experiment, train
from vae_ray.checkpoints.finding import find_checkpoint
from vae_ray.checkpoints.listing import NAME, all_checkpoints, complete_checkpoints
from vae_ray.checkpoints.loading import read_checkpoint
from vae_ray.checkpoints.saving import copy_checkpoint, prune_checkpoints
from vae_ray.config.sections.data import DigitsData
from vae_ray.data.cache import VERIFIED, open_dataset
from vae_ray.data.sources.digits import Digits
from vae_ray.run_files.recorder import Recorder
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.storage.records import append_records, read_records
from vae_ray.training import loop
from vae_ray.tuning.directory import SweepDirectory

pytestmark = pytest.mark.faults

TIMING = ("images_per_second", "seconds", "started_at")


def tiny(storage: Path) -> Experiment:
    """Three epochs of three steps, with a checkpoint after every two."""
    return Experiment.from_dict(
        {
            "data": {"source": "digits", "num_validation": 100},
            "model": {"network": {"name": "mlp", "hidden": [8]}, "latent_dim": 2},
            "training": {"epochs": 3, "global_batch_size": 512, "ema_decay": 0.9},
            "workers": {"num": 0, "device": "cpu", "cpus": 1},
            "run": {"storage": str(storage), "name": "killed", "seed": 5, "checkpoint_every_steps": 2},
        }
    )


def trained(sections: dict[str, Any], updates_file: str | None = None) -> None:
    """Train with resume, and write the number of updates; the same file operations every time."""
    Recorder.progress_is_due = lambda recorder: True  # type: ignore[method-assign]
    num_updates, apply_gradients = 0, loop.apply_gradients

    def counted(*args: Any, **kwargs: Any) -> bool:
        nonlocal num_updates
        num_updates += 1
        return apply_gradients(*args, **kwargs)

    loop.apply_gradients = counted
    train(Experiment.from_dict(sections), resume=True)
    if updates_file is not None:
        Path(updates_file).write_text(str(num_updates))


def outcome(directory: Path) -> dict[str, Any]:
    """What a finished run has computed: last weights and optimizer, metrics and pictures, without how long it took."""
    last = complete_checkpoints(directory / "checkpoints")[-1]
    lines = read_records(directory / "metrics.jsonl")
    return {
        "checkpoints": sorted(path.name for path in (directory / "checkpoints").iterdir()),
        "weights": last.read("weights.safetensors"),
        "state": last.read("training_state.safetensors"),
        "metrics": [{key: value for key, value in line.items() if key not in TIMING} for line in lines],
        "pictures": {
            str(file.relative_to(directory)): file.read_bytes() for file in sorted(directory.glob("images/*/*.png"))
        },
    }


def chosen(num_operations: int, *, short_every: int) -> list[tuple[int, bool]]:
    """Every operation, both undone and done (or done by half); in the short form a part of them."""
    every = [(number, torn) for number in range(num_operations) for torn in (False, True)]
    return every[::short_every] if FORM == "short" else every


def promised(ended: Ended) -> list[tuple[int, int]]:
    """Positions of the checkpoints that had their names before the process died."""
    named = [path for name, path in ended.operations[:-1] if name in ("replace", "exchange")]
    matches = [match for path in named if (match := NAME.fullmatch(Path(path).name))]
    return [(int(m[1]) - 1, int(m[2])) if m[2] else (int(m[1]), 0) for m in matches]


def killed(*args: Any, **kwargs: Any) -> Ended:
    """`run`, of which every kill must have killed."""
    ended = run(*args, **kwargs)
    assert ended.exit_code == -signal.SIGKILL, kwargs
    assert len(ended.operations) == kwargs["kill_at"] + 1
    return ended


@pytest.mark.timeout(3600)  # in the full form every operation, twice
def test_a_run_killed_at_any_file_operation_ends_with_the_bits_of_an_undisturbed_one(
    tmp_path: Path, fault_counts: Count
) -> None:
    trace = tmp_path / "trace"
    whole = tiny(tmp_path / "whole")
    reference = run(trained, whole.to_dict(), below=tmp_path / "whole", trace=trace)
    assert reference.exit_code == 0
    expected = outcome(tmp_path / "whole" / "killed")
    assert {name for name, _ in reference.operations} >= {"open", "write", "fsync", "replace", "mkdir", "unlink"}
    cases = chosen(len(reference.operations), short_every=59)
    for number, torn in cases:
        storage = tmp_path / f"run-{number}-{torn}"
        sections = tiny(storage).to_dict()
        ended = killed(trained, sections, below=storage, trace=trace, kill_at=number, torn=torn)
        if kept := promised(ended):
            newest = all_checkpoints(storage / "killed" / "checkpoints")[-1]
            newest.in_memory()
            assert newest.position >= kept[-1], ended.operations[-1]
        assert run(trained, sections, below=storage, trace=trace).exit_code == 0, ended.operations[-1]
        assert outcome(storage / "killed") == expected, ended.operations[-1]
        shutil.rmtree(storage)
    fault_counts("driver killed", tried=len(cases), survived=len(cases), note="all files of a run")


def test_no_update_is_computed_twice_but_those_since_the_last_checkpoint(tmp_path: Path, fault_counts: Count) -> None:
    """Killed as it writes the checkpoint after update 8 of 9, the run continues from the one after update 6."""
    trace, updates = tmp_path / "trace", tmp_path / "updates"
    whole = tiny(tmp_path / "whole")
    operations = run(trained, whole.to_dict(), str(updates), below=tmp_path / "whole", trace=trace).operations
    assert updates.read_text() == "9"
    written = [Path(path).name for name, path in operations if name == "replace"]
    cases = {"epoch=0001-step=000002": 9, "epoch=0001": 7, "epoch=0002-step=000001": 6, "epoch=0003-step=000002": 3}
    for name, num_left in cases.items():
        assert name in written
        storage = tmp_path / name
        number = next(i for i, (kind, path) in enumerate(operations) if kind == "replace" and Path(path).name == name)
        killed(trained, tiny(storage).to_dict(), below=storage, trace=trace, kill_at=number)
        assert run(trained, tiny(storage).to_dict(), str(updates), below=storage, trace=trace).exit_code == 0
        assert updates.read_text() == str(num_left), name
        assert outcome(storage / "killed") == outcome(tmp_path / "whole" / "killed")
    fault_counts("inside epochs", tried=len(cases), survived=len(cases))


@pytest.mark.parametrize("seed", range(2 if FORM == "short" else 5))
def test_a_run_killed_again_and_again_ends_with_the_same_bits(seed: int, tmp_path: Path, fault_counts: Count) -> None:
    trace, storage, chance = tmp_path / "trace", tmp_path / "runs", random.Random(seed)
    run(trained, tiny(tmp_path / "whole").to_dict(), below=tmp_path / "whole", trace=trace)
    kills = 0
    while ended := run(trained, tiny(storage).to_dict(), below=storage, trace=trace, kill_at=chance.randrange(150)):
        if ended.exit_code == 0:
            break
        assert ended.exit_code == -signal.SIGKILL
        kills += 1
    assert kills >= 2
    assert outcome(storage / "killed") == outcome(tmp_path / "whole" / "killed")
    fault_counts("driver killed", tried=kills, survived=kills, note="again and again")


def saved(directory: str, epoch: int, score: float) -> None:
    """Save a checkpoint and delete those that are no longer kept."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    save(Path(directory), epoch=epoch, score=score)
    prune_checkpoints(Path(directory), num_best=1)


def test_no_kill_while_a_checkpoint_is_written_and_others_deleted_loses_the_one_before(
    tmp_path: Path, fault_counts: Count
) -> None:
    """Epoch 2 is deleted, epoch 3 written over what an earlier attempt left of it."""
    before, trace = tmp_path / "before", tmp_path / "trace"
    for epoch, score in ((1, 3.0), (2, 5.0)):
        saved(str(before), epoch, score)
    shutil.copytree(before / "epoch=0002", before / "epoch=0003")  # its manifest says epoch 2
    operations = run(saved, str(shutil.copytree(before, tmp_path / "w")), 3, 4.0, below=tmp_path / "w", trace=trace)
    assert "exchange" in {name for name, _ in operations.operations}
    cases = chosen(len(operations.operations), short_every=3)
    for number, torn in cases:
        directory = tmp_path / f"{number}-{torn}"
        shutil.copytree(before, directory)
        ended = killed(saved, str(directory), 3, 4.0, below=directory, trace=trace, kill_at=number, torn=torn)
        found = {checkpoint.epoch: checkpoint.in_memory() for checkpoint in complete_checkpoints(directory)}
        assert 1 in found
        assert found.keys() & {2, 3}
        if promised(ended):
            assert 3 in found
        saved(str(directory), 3, 4.0)
        assert sorted(path.name for path in directory.iterdir()) == ["epoch=0001", "epoch=0003"]
        shutil.rmtree(directory)
    fault_counts("driver killed", tried=len(cases), survived=len(cases), note="checkpoint and pruning")


def cached(cache: str) -> None:
    open_dataset(DigitsData(cache_dir=Path(cache)))


def test_a_decoder_killed_at_any_file_operation_leaves_a_cache_that_the_next_one_completes(
    tmp_path: Path, fault_counts: Count
) -> None:
    trace, decoded = tmp_path / "trace", {split: Digits().load(split) for split in ("test", "train")}
    operations = run(cached, str(tmp_path / "whole"), below=tmp_path / "whole", trace=trace).operations
    (prepared,) = (tmp_path / "whole").glob("digits-*[0-9a-f]")
    whole = {file.name: file.read_bytes() for file in prepared.iterdir()}
    cases = chosen(len(operations), short_every=5)
    for number, torn in cases:
        cache = tmp_path / f"{number}-{torn}"
        killed(cached, str(cache), below=cache, trace=trace, kill_at=number, torn=torn)
        opened = open_dataset(DigitsData(cache_dir=cache)).splits
        for split, (pixels, columns) in decoded.items():
            assert (pixels_of(opened[split]) == pixels).all()
            assert (labels_of(opened[split]) == columns["label"]).all()
        (directory,) = cache.glob("digits-*[0-9a-f]")
        assert {file.name: file.read_bytes() for file in directory.iterdir()} == whole
        assert {path.name for path in cache.iterdir()} == {directory.name, f"{directory.name}.lock", VERIFIED}
    fault_counts("driver killed", tried=len(cases), survived=len(cases), note="data cache")


ENTRIES = [
    {"trial": f"{number:04d}", "event": "proposed", "overrides": {"optim.lr": 0.1 * number}} for number in range(3)
]
DESCRIPTION = dict.fromkeys(("experiment", "search", "metrics", "num_trials", "scheduler", "searcher"), "x")


def journalled(path: str) -> None:
    directory = SweepDirectory(Path(path))
    directory.write_description(DESCRIPTION)
    for entry in ENTRIES:
        directory.append_to_journal(entry)
    directory.write_summary({"best": 1})
    run_directory = directory.trial("0000")
    run_directory.path.mkdir(parents=True, exist_ok=True)
    for epoch in (1, 2):
        append_records(run_directory.records.metrics_file, [{"epoch": epoch, "val/nelbo": 0.1}])
    run_directory.records.truncate_to_epoch(1)
    run_directory.records.write_summary({"epochs": 1})


def test_journal_metrics_and_summaries_are_never_half_there(
    tmp_path: Path, fault_counts: Count, caplog: pytest.LogCaptureFixture
) -> None:
    trace = tmp_path / "trace"
    whole = tmp_path / "whole"
    whole.mkdir()
    cases = chosen(len(run(journalled, str(whole), below=whole, trace=trace).operations), short_every=1)
    for number, torn in cases:
        path = tmp_path / f"{number}-{torn}"
        path.mkdir()
        killed(journalled, str(path), below=path, trace=trace, kill_at=number, torn=torn)
        directory, history = SweepDirectory(path), RunDirectory(path / "trials" / "0000").records.history()
        journal = directory.journal()
        assert journal == ENTRIES[: len(journal)]
        assert [line["epoch"] for line in history] in ([], [1], [1, 2])
        if directory.description_file.exists():
            assert directory.description() == DESCRIPTION
        assert directory.trial("0000").records.summary() in ({}, {"epochs": 1})
        directory.append_to_journal({"more": 1})
        assert directory.journal() == [*journal, {"more": 1}]
    assert "damaged" not in caplog.text, "what a kill cuts short is no damage"
    fault_counts("driver killed", tried=len(cases), survived=len(cases), note="journal, metrics and summaries")


def copied(directory: str, checkpoint: str) -> None:
    copy_checkpoint(read_checkpoint(checkpoint), Path(directory) / "best")


def test_best_of_a_sweep_is_the_old_or_the_new_one_after_any_kill(tmp_path: Path, fault_counts: Count) -> None:
    trace = tmp_path / "trace"
    old, new = (save(tmp_path, epoch=epoch).path for epoch in (1, 2))
    before = tmp_path / "before"
    before.mkdir()
    copied(str(before), str(old))
    whole = shutil.copytree(before, tmp_path / "whole")
    cases = chosen(len(run(copied, str(whole), str(new), below=whole, trace=trace).operations), short_every=3)
    for number, torn in cases:
        sweep = shutil.copytree(before, tmp_path / f"{number}-{torn}")
        ended = killed(copied, str(sweep), str(new), below=sweep, trace=trace, kill_at=number, torn=torn)
        is_exchanged = ("exchange", str(sweep / "best")) in ended.operations[: None if torn else -1]
        assert find_checkpoint(sweep).in_memory().epoch == (2 if is_exchanged else 1)
        copied(str(sweep), str(new))
        assert find_checkpoint(sweep).in_memory().epoch == 2
        assert [path.name for path in sweep.iterdir()] == ["best"]
    fault_counts("driver killed", tried=len(cases), survived=len(cases), note="best/ of a sweep")
