"""kill -9 at every file operation: --resume goes on from the newest complete checkpoint to the same bits."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.conftest import FORM, Count
from tests.faults.file_operations import Ended, run
from vae_ray import Experiment, TrainedVAE, train
from vae_ray.checkpoints.loading import complete_checkpoints, read_checkpoint
from vae_ray.checkpoints.saving import prune_checkpoints, save_checkpoint
from vae_ray.config.experiment import DataConfig, OptimConfig
from vae_ray.data.arrow_store import open_split
from vae_ray.data.sources import Digits
from vae_ray.models.vae import build_vae
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.training.optimization import build_optimizer
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.leaderboard import write_best

pytestmark = pytest.mark.faults

TIMING = ("images_per_second", "seconds", "started_at")


def tiny(storage: Path) -> Experiment:
    """Three epochs of three steps."""
    return Experiment.from_dict(
        {
            "data": {"source": "digits", "num_validation": 100},
            "model": {"hidden": [8], "latent_dim": 2},
            "training": {"epochs": 3, "global_batch_size": 512},
            "workers": {"num": 0, "device": "cpu"},
            "run": {"storage": str(storage), "name": "killed", "seed": 5},
        }
    )


def trained(sections: dict[str, Any]) -> None:
    train(Experiment.from_dict(sections), resume=True)


def outcome(directory: Path) -> dict[str, Any]:
    """What a finished run has computed: last weights and optimizer, metrics and pictures, without how long it took."""
    last = complete_checkpoints(directory / "checkpoints")[-1]
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {
        "checkpoints": sorted(path.name for path in (directory / "checkpoints").iterdir()),
        "weights": last.read("weights.safetensors"),
        "state": last.read("training_state.pt"),
        "metrics": [{key: value for key, value in line.items() if key not in TIMING} for line in lines],
        "pictures": {
            str(file.relative_to(directory)): file.read_bytes() for file in sorted(directory.glob("images/*/*.png"))
        },
    }


def chosen(num_operations: int, *, short_every: int) -> list[tuple[int, bool]]:
    """Every operation, both undone and done (or done by half); in the short form a part of them."""
    every = [(number, torn) for number in range(num_operations) for torn in (False, True)]
    return every[::short_every] if FORM == "short" else every


def promised(ended: Ended) -> list[int]:
    """The epochs whose checkpoints had been renamed into place before the process died."""
    renamed = [path for name, path in ended.operations[:-1] if name == "replace"]
    return [int(match[1]) for path in renamed if (match := re.search(r"/epoch=(\d+)$", path))]


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
    survived = 0
    cases = chosen(len(reference.operations), short_every=59)
    for number, torn in cases:
        storage = tmp_path / f"run-{number}-{torn}"
        sections = tiny(storage).to_dict()
        killed = run(trained, sections, below=storage, trace=trace, kill_at=number, torn=torn)
        if killed.exit_code == 0:  # a writing thread of TensorBoard counts a few more or fewer operations
            survived += outcome(storage / "killed") == expected
            continue
        assert killed.exit_code == -signal.SIGKILL
        if kept := promised(killed):
            newest = complete_checkpoints(storage / "killed" / "checkpoints")[-1]
            newest.verify()
            assert newest.epoch >= kept[-1], killed.operations[-1]
        assert run(trained, sections, below=storage, trace=trace).exit_code == 0, killed.operations[-1]
        assert outcome(storage / "killed") == expected, killed.operations[-1]
        survived += 1
        shutil.rmtree(storage)
    fault_counts("driver killed", tried=len(cases), survived=survived, note="all files of a run")


def saved(directory: str, epoch: int, score: float) -> None:
    if not Path(directory).exists():
        Path(directory).mkdir(parents=True)
    model = build_vae(Experiment().model.model_copy(update={"hidden": (6,)}), (1, 4, 5), seed=epoch)
    optimizer = build_optimizer(OptimConfig(), model.parameters())
    model(torch.zeros(2, 1, 4, 5), torch.zeros(2, 20)).logits.sum().backward()
    optimizer.step()
    save_checkpoint(
        Path(directory),
        epoch=epoch,
        model=model,
        optimizer=optimizer,
        experiment=Experiment.from_dict({"model": {"hidden": [6]}}),
        metrics={"val/nelbo": score},
        selection_metric="val/nelbo",
    )
    prune_checkpoints(Path(directory), num_best=1)


def test_no_kill_while_a_checkpoint_is_written_and_others_deleted_loses_the_one_before(
    tmp_path: Path, fault_counts: Count
) -> None:
    """Epoch 2 is deleted, epoch 3 written over what an earlier attempt left of it."""
    before, trace = tmp_path / "before", tmp_path / "trace"
    for epoch, score in ((1, 3.0), (2, 5.0)):
        saved(str(before), epoch, score)
    shutil.copytree(before / "epoch=0002", before / "epoch=0003")  # says of itself that it is epoch 2
    operations = run(saved, str(shutil.copytree(before, tmp_path / "w")), 3, 4.0, below=tmp_path / "w", trace=trace)
    cases, survived = chosen(len(operations.operations), short_every=3), 0
    for number, torn in cases:
        directory = tmp_path / f"{number}-{torn}"
        shutil.copytree(before, directory)
        ended = run(saved, str(directory), 3, 4.0, below=directory, trace=trace, kill_at=number, torn=torn)
        assert ended.exit_code == -signal.SIGKILL
        found = {checkpoint.epoch: checkpoint for checkpoint in complete_checkpoints(directory)}
        for checkpoint in found.values():
            checkpoint.verify()
        assert 1 in found
        assert found.keys() & {2, 3}
        if promised(ended):
            assert 3 in found
        saved(str(directory), 3, 4.0)
        assert sorted(path.name for path in directory.iterdir()) == ["epoch=0001", "epoch=0003"]
        survived += 1
        shutil.rmtree(directory)
    fault_counts("driver killed", tried=len(cases), survived=survived, note="checkpoint and pruning")


def cached(cache: str) -> None:
    for split in ("test", "train"):
        open_split(DataConfig(cache_dir=Path(cache)), split)


def test_a_decoder_killed_at_any_file_operation_leaves_a_cache_that_the_next_one_completes(
    tmp_path: Path, fault_counts: Count
) -> None:
    trace, decoded = tmp_path / "trace", {split: Digits().decode(split) for split in ("test", "train")}
    operations = run(cached, str(tmp_path / "whole"), below=tmp_path / "whole", trace=trace).operations
    cases, survived = chosen(len(operations), short_every=5), 0
    for number, torn in cases:
        cache = tmp_path / f"{number}-{torn}"
        ended = run(cached, str(cache), below=cache, trace=trace, kill_at=number, torn=torn)
        assert ended.exit_code == -signal.SIGKILL
        for split, images in decoded.items():
            opened = open_split(DataConfig(cache_dir=cache), split)
            assert (opened.pixels.numpy() == images.pixels).all()
            assert (opened.labels.numpy() == images.labels).all()
        assert not list(cache.glob("*.partial-*"))
        survived += 1
    fault_counts("driver killed", tried=len(cases), survived=survived, note="data cache")


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
        run_directory.append_metrics({"epoch": epoch, "val/nelbo": 0.1})
    run_directory.truncate_to_epoch(1)
    run_directory.write_summary({"epochs": 1})


def test_journal_metrics_and_summaries_are_never_half_there(
    tmp_path: Path, fault_counts: Count, caplog: pytest.LogCaptureFixture
) -> None:
    trace = tmp_path / "trace"
    operations = run(journalled, str(tmp_path / "whole"), below=tmp_path, trace=trace).operations
    cases, survived = chosen(len(operations), short_every=1), 0
    for number, torn in cases:
        path = tmp_path / f"{number}-{torn}"
        path.mkdir()
        ended = run(journalled, str(path), below=path, trace=trace, kill_at=number, torn=torn)
        if ended.exit_code == 0:
            assert number >= len(ended.operations)
            survived += 1
            continue
        directory, history = SweepDirectory(path), RunDirectory(path / "trials" / "0000").history()
        journal = directory.journal()
        assert journal == ENTRIES[: len(journal)]
        assert [line["epoch"] for line in history] in ([], [1], [1, 2])
        if directory.description_file.exists():
            assert directory.description() == DESCRIPTION
        assert directory.trial("0000").summary() in ({}, {"epochs": 1})
        directory.append_to_journal({"more": 1})
        assert directory.journal() == [*journal, {"more": 1}]
        survived += 1
    assert "damaged" not in caplog.text, "what a kill cuts short is no damage"
    fault_counts("driver killed", tried=len(cases), survived=survived, note="journal, metrics and summaries")


def installed(sweep: str, checkpoint: str) -> None:
    write_best(read_checkpoint(checkpoint), SweepDirectory(Path(sweep)))


def test_best_of_a_sweep_is_whole_after_any_kill_and_the_next_report(tmp_path: Path, fault_counts: Count) -> None:
    trace, source = tmp_path / "trace", tmp_path / "checkpoints"
    saved(str(source), 1, 3.0)
    saved(str(source), 2, 2.0)
    old, new = str(source / "epoch=0001"), str(source / "epoch=0002")
    if not Path(old).exists():
        saved(str(source), 1, 1.0)
    before = tmp_path / "before"
    before.mkdir()
    installed(str(before), old)
    copy = str(shutil.copytree(before, tmp_path / "whole"))
    operations = run(installed, copy, new, below=Path(copy), trace=trace).operations
    cases, survived = chosen(len(operations), short_every=3), 0
    for number, torn in cases:
        sweep = shutil.copytree(before, tmp_path / f"{number}-{torn}")
        ended = run(installed, str(sweep), new, below=sweep, trace=trace, kill_at=number, torn=torn)
        assert ended.exit_code == -signal.SIGKILL
        if (sweep / "best").exists():  # for a moment, between two renames, there is none
            TrainedVAE.load(sweep)
        installed(str(sweep), new)
        assert TrainedVAE.load(sweep).checkpoint.epoch == 2
        assert [path.name for path in sweep.iterdir()] == ["best"]
        survived += 1
    fault_counts("driver killed", tried=len(cases), survived=survived, note="best/ of a sweep")
