"""Disks that are really full, and storage that is really away: training goes on, and nothing that was saved is lost.

A small tmpfs is mounted, which takes root (or a user namespace); without it these tests fail and say so.
"""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import digits_in_this_process
from tests.faults.conftest import FORM
from tests.runs import computed
from vae_ray import Experiment, TrainedVAE, TrainingFailed, UserError, train
from vae_ray.checkpoints.listing import complete_checkpoints
from vae_ray.parallel.group import SingleProcess
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.storage import retry as patient_files
from vae_ray.training.fit import fit_epochs

pytestmark = pytest.mark.faults

CPU = torch.device("cpu")
DISK_BYTES = 4 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of four MiB."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(mount_point)], capture_output=True, text=True
    )
    assert mounted.returncode == 0, f"needs to mount a tmpfs, which is not permitted here: {mounted.stderr.strip()}"
    yield mount_point
    subprocess.run(["umount", "--lazy", str(mount_point)], check=True)


class Filler:
    """A file that takes all the room there is."""

    def __init__(self, disk: Path) -> None:
        self.file = disk / "filler"

    def fill(self, *, leave_bytes: int = 0) -> None:
        with self.file.open("ab", buffering=0) as stream:
            try:
                while True:
                    stream.write(bytes(4096))
            except OSError:
                pass
            stream.truncate(max(0, stream.tell() - leave_bytes))

    def clear(self) -> None:
        self.file.unlink()


def experiment(disk: Path, **overrides: Any) -> Experiment:
    """Checkpoints of 0.4 MB, of which two fit beside each other."""
    return digits_in_this_process(disk).with_overrides(
        {"training.epochs": 5, "training.test_every_epochs": 0, **overrides}
    )


def run_of(experiment: Experiment) -> RunDirectory:
    run = RunDirectory(Path(experiment.run.storage) / str(experiment.run.name))
    run.path.mkdir(parents=True)
    run.write_experiment(experiment)
    return run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The run on a disk with room for it."""
    return RunDirectory(train(experiment(tmp_path_factory.mktemp("undisturbed"))).run_dir)


def same_end(run: RunDirectory, other: RunDirectory) -> bool:
    ends = [complete_checkpoints(each.checkpoints)[-1] for each in (run, other)]
    return ends[0].epoch == ends[1].epoch and ends[0].read("weights.safetensors") == ends[1].read("weights.safetensors")


@pytest.mark.event("disk full")
@pytest.mark.parametrize("leave_bytes", [0, 8192, 65536], ids=lambda n: f"{n} bytes free")
def test_a_disk_full_for_some_epochs_costs_their_checkpoints_and_pictures_only(
    disk: Path, undisturbed: RunDirectory, caplog: pytest.LogCaptureFixture, leave_bytes: int
) -> None:
    mine, filler = experiment(disk), Filler(disk)
    run = run_of(mine)
    epochs = fit_epochs(mine, run.path, SingleProcess(CPU), keep_warnings=True)
    next(epochs)
    before = complete_checkpoints(run.checkpoints)
    filler.fill(leave_bytes=leave_bytes)
    for epoch in (2, 3):
        assert next(epochs).record["epoch"] == epoch
        assert complete_checkpoints(run.checkpoints) == before
        assert not list(run.checkpoints.glob(".partial*"))
        TrainedVAE.load(before[-1].path)
    filler.clear()
    for epoch in (4, 5):
        assert next(epochs).record["epoch"] == epoch
    assert next(epochs, None) is None
    assert same_end(run, undisturbed)
    assert computed(run.path) == computed(undisturbed.path)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    not_saved = [text for text in said if "the checkpoint could not be written (No space left on device" in text]
    assert ["epoch=0002" in not_saved[0], "epoch=0003" in not_saved[1], len(not_saved)] == [True, True, 2]
    assert "bytes needed" in not_saved[0]
    assert " free" in not_saved[0]
    assert "training continues" in not_saved[0]
    assert len(said) <= 3, "one of metrics, pictures or events, and one a checkpoint"
    assert run.records.warnings() == said, "for the driver of a Ray worker"


@pytest.mark.event("disk full")
def test_a_disk_full_at_the_end_fails_the_run_and_keeps_what_was_saved(disk: Path, undisturbed: RunDirectory) -> None:
    mine, filler = experiment(disk), Filler(disk)
    run = run_of(mine)
    epochs = fit_epochs(mine, run.path, SingleProcess(CPU))
    for _ in range(3):
        next(epochs)
    filler.fill()
    next(epochs)
    with pytest.raises(TrainingFailed, match=r"epoch=0005: the checkpoint could not be written \(No space left"):
        next(epochs)
    assert complete_checkpoints(run.checkpoints)[-1].epoch == 3
    filler.clear()
    assert train(mine, resume=True).epochs == 5
    assert same_end(run, undisturbed)
    assert computed(run.path) == computed(undisturbed.path)


@pytest.mark.event("disk full")
def test_checkpoints_inside_epochs_on_a_full_disk_cost_nothing_but_a_warning(
    disk: Path, undisturbed: RunDirectory
) -> None:
    mine, filler = experiment(disk, **{"run.checkpoint_every_steps": 10}), Filler(disk)
    run = run_of(mine)
    epochs = fit_epochs(mine, run.path, SingleProcess(CPU))
    next(epochs)
    filler.fill()
    next(epochs)
    filler.clear()
    assert len(list(epochs)) == 3
    assert same_end(run, undisturbed)
    assert computed(run.path) == computed(undisturbed.path)


@pytest.mark.event("disk full")
def test_tensorboard_events_of_a_full_disk_are_written_later(disk: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    mine, filler = experiment(disk), Filler(disk)
    run = run_of(mine)
    epochs = fit_epochs(mine, run.path, SingleProcess(CPU))
    next(epochs)
    filler.fill()
    next(epochs)
    filler.clear()
    list(epochs)
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    assert [event.step for event in events.Scalars("train/nelbo")] == [1, 2, 3, 4, 5]


@pytest.mark.event("disk full")
def test_a_run_does_not_begin_on_a_full_disk(disk: Path, undisturbed: RunDirectory) -> None:
    mine, filler = experiment(disk), Filler(disk)
    filler.fill()
    with pytest.raises(UserError, match=r"run\.storage: .* cannot be written \(No space left on device\)"):
        train(mine)
    filler.clear()
    run = RunDirectory(train(mine, resume=True).run_dir)
    assert same_end(run, undisturbed)
    assert computed(run.path) == computed(undisturbed.path)


def away_for(run: RunDirectory, seconds: float) -> threading.Thread:
    """Take the run's directory away, as an unmounted file system is, and bring it back after a while."""
    elsewhere = run.path.with_name("away")
    os.rename(run.path, elsewhere)

    def bring_back() -> None:
        time.sleep(seconds)
        os.rename(elsewhere, run.path)

    thread = threading.Thread(target=bring_back)
    thread.start()
    return thread


@pytest.mark.event("storage away")
@pytest.mark.parametrize("seconds", [2.0] if FORM == "short" else [2.0, 30.0])
def test_storage_that_is_away_for_a_while_costs_nothing(
    tmp_path: Path, undisturbed: RunDirectory, caplog: pytest.LogCaptureFixture, seconds: float
) -> None:
    mine = experiment(tmp_path)
    run = run_of(mine)
    epochs = fit_epochs(mine, run.path, SingleProcess(CPU))
    next(epochs)
    thread = away_for(run, seconds)
    assert len(list(epochs)) == 4
    thread.join()
    assert same_end(run, undisturbed)
    assert computed(run.path) == computed(undisturbed.path)
    names = sorted(path.name for path in (run.images / "samples").iterdir())
    assert names == [f"epoch={epoch:04d}.png" for epoch in range(1, 6)]
    assert sum("the storage is away" in record.getMessage() for record in caplog.records) == 1


def test_patience_outlasts_half_a_minute() -> None:
    assert sum(patient_files.PAUSES_SECONDS) > 60
    assert max(patient_files.PAUSES_SECONDS) < 30
