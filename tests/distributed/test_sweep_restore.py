"""kill -9 of a sweep's driver at random moments, then --resume: every trial accounted for, none run twice.

`VAE_RAY_KILLS=12 pytest tests/distributed/test_sweep_restore.py` kills oftener than the suite does.
"""

from __future__ import annotations

import contextlib
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from tests.distributed.conftest import digits
from vae_ray import SweepResult, sweep
from vae_ray.tuning.directory import SweepDirectory

pytestmark = pytest.mark.ray

NUM_KILLS = int(os.environ.get("VAE_RAY_KILLS", "1"))
SPACE = {"model.latent_dim": {"choice": [2, 6]}, "optim.lr": {"loguniform": [5e-4, 5e-3]}}
NUM_TRIALS, EPOCHS = 6, 6
ARGUMENTS: dict[str, Any] = {"search": SPACE, "num_trials": NUM_TRIALS, "scheduler": "none", "max_concurrent": 2}


def leaderboard(directory: SweepDirectory) -> list[dict[str, str]]:
    """Its rows without the time that they took."""
    with directory.leaderboard_csv.open(encoding="utf-8") as stream:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(stream)]


@pytest.fixture(scope="module")
def undisturbed(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    experiment = digits(tmp_path_factory.mktemp("sweeps"), 1, name="undisturbed", **{"training.epochs": EPOCHS})
    return sweep(experiment, **ARGUMENTS)


@contextlib.contextmanager
def driver(experiment_file: Path, search_file: Path, *extra: str) -> Iterator[subprocess.Popen[bytes]]:
    """A driver of its own process, on the test session's Ray; killed at the end if it still lives."""
    options = ["--search", str(search_file), "--num-trials", str(NUM_TRIALS), "--max-concurrent", "2", *extra]
    process = subprocess.Popen(
        [sys.executable, "-m", "vae_ray", "sweep", str(experiment_file), "--name", "killed", *options],
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def num_epochs_done(directory: SweepDirectory) -> int:
    return sum(len(directory.trial(f"{n:04d}").records.history()) for n in range(NUM_TRIALS))


@pytest.mark.parametrize("seed", range(NUM_KILLS))
def test_a_killed_sweep_resumes_to_the_undisturbed_leaderboard(
    seed: int, undisturbed: SweepResult, tmp_path: Path
) -> None:
    experiment = digits(tmp_path, 1, name="killed", **{"training.epochs": EPOCHS})
    directory = SweepDirectory(tmp_path / "killed")
    experiment_file, search_file = tmp_path / "experiment.yaml", tmp_path / "search.yaml"
    experiment_file.write_text(experiment.to_yaml())
    search_file.write_text("model.latent_dim: {choice: [2, 6]}\noptim.lr: {loguniform: [5.0e-4, 5.0e-3]}\n")

    kill_after = random.Random(seed).randrange(1, NUM_TRIALS * EPOCHS - 5)
    with driver(experiment_file, search_file, "--scheduler", "none") as process:
        deadline = time.monotonic() + 240
        while num_epochs_done(directory) < kill_after:
            assert process.poll() is None, "the driver ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    ended = {entry["trial"] for entry in directory.journal() if entry["event"] == "ended"}
    written = {
        file: file.stat().st_mtime_ns
        for name in ended
        for file in directory.trial(name).path.rglob("*")
        if file.is_file()
    }

    resumed = sweep(experiment, **ARGUMENTS, resume=True)

    assert resumed.states == {"finished": NUM_TRIALS}
    assert leaderboard(directory) == leaderboard(SweepDirectory(undisturbed.sweep_dir))
    assert {file: file.stat().st_mtime_ns for file in written} == written, "what had ended was not run again"
    for number in range(NUM_TRIALS):
        history = directory.trial(f"{number:04d}").records.history()
        assert [line["epoch"] for line in history] == list(range(1, EPOCHS + 1))


def damaged(sweep_dir: Path, copy: Path, *, seed: int) -> SweepDirectory:
    """The directory as a kill might have left it: some trials whole, some begun, some not, the journal cut anywhere."""
    shutil.copytree(sweep_dir, copy)
    directory, rng = SweepDirectory(copy), random.Random(seed)
    for file in (directory.leaderboard_csv, directory.leaderboard_parquet, directory.report, directory.summary_file):
        file.unlink()
    shutil.rmtree(directory.best)
    for number in range(NUM_TRIALS):
        trial, what = directory.trial(f"{number:04d}"), rng.choice(["whole", "begun", "untouched"])
        if what == "untouched":
            shutil.rmtree(trial.path)
        elif what == "begun":  # the last checkpoint is gone, the best and all lines are there
            shutil.rmtree(trial.checkpoints / f"epoch={EPOCHS:04d}")
    lines = directory.journal_file.read_bytes().splitlines(keepends=True)
    proposals = b"".join(lines[:NUM_TRIALS])
    ends = b"".join(line for line in lines[NUM_TRIALS:] if rng.random() < 0.5)
    is_whole = {
        n for n in range(NUM_TRIALS) if (directory.trial(f"{n:04d}").checkpoints / f"epoch={EPOCHS:04d}").exists()
    }
    ends = b"".join(line for line in ends.splitlines(keepends=True) if int(line.split(b'"')[3]) in is_whole)
    directory.journal_file.write_bytes(proposals + ends[: rng.randrange(len(ends) + 1)])
    return directory


@pytest.mark.parametrize("seed", range(NUM_KILLS))
def test_whatever_a_kill_leaves_resumes_to_the_undisturbed_leaderboard(
    seed: int, undisturbed: SweepResult, tmp_path: Path
) -> None:
    directory = damaged(undisturbed.sweep_dir, tmp_path / "undisturbed", seed=seed)
    experiment = digits(tmp_path, 1, name="undisturbed", **{"training.epochs": EPOCHS})
    sweep(experiment, **ARGUMENTS, resume=True)
    assert leaderboard(directory) == leaderboard(SweepDirectory(undisturbed.sweep_dir))


def test_a_killed_asha_sweep_resumes_with_its_rungs(undisturbed: SweepResult, tmp_path: Path) -> None:
    """The rungs fill up across the kill: the resumed scheduler stops trials by what the killed one had seen."""
    experiment = digits(tmp_path, 1, name="killed", **{"training.epochs": 9})
    directory = SweepDirectory(tmp_path / "killed")
    experiment_file, search_file = tmp_path / "experiment.yaml", tmp_path / "search.yaml"
    experiment_file.write_text(experiment.to_yaml())
    search_file.write_text("optim.lr: {grid: [2.0e-3, 1.0e-3, 3.0e-3, 1.0e-6, 2.0e-6, 3.0e-6]}\n")
    with driver(experiment_file, search_file) as process:
        deadline = time.monotonic() + 240
        while not any(entry["event"] == "ended" for entry in directory.journal()):
            assert process.poll() is None, "the driver ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    resumed = sweep(
        experiment,
        search={"optim.lr": {"grid": [2e-3, 1e-3, 3e-3, 1e-6, 2e-6, 3e-6]}},
        num_trials=6,
        max_concurrent=2,
        resume=True,
    )
    assert resumed.num_trials == 6
    # each of the bad ones meets the good ones' results at its first rung, of whichever start
    assert {row["state"] for row in leaderboard(directory) if row["trial"] in ("0003", "0004", "0005")} == {"stopped"}
    assert {row["epochs"] for row in leaderboard(directory) if row["trial"] in ("0003", "0004", "0005")} == {"1"}
    assert resumed.best["trial"] in ("0000", "0001", "0002")
