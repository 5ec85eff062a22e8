"""kill -9 at every step of a short run, before and after the update: --resume ends with the same bits."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.faults.killed_training import exit_code_of_training
from vae_ray import Experiment, TrainResult, train

pytestmark = [pytest.mark.faults, pytest.mark.event("worker killed")]

EPOCHS, STEPS_PER_EPOCH, EVERY = 3, 8, 3
NUM_STEPS = EPOCHS * STEPS_PER_EPOCH


def experiment(storage: Path, name: str) -> Experiment:
    """Three epochs of 180 images in eight batches, the last smaller; saved after 3, 6, 8, 9, 12, 15, 16, ... steps."""
    return Experiment.from_dict(
        {
            "data": {"source": "digits", "num_validation": 1438 - 180},
            "model": {"hidden": [8], "latent_dim": 2},
            "optim": {"lr": 1e-2, "schedule": "cosine", "warmup_steps": 5},
            "training": {"epochs": EPOCHS, "global_batch_size": 23, "test_every_epochs": 0},
            "workers": {"num": 0, "device": "cpu"},
            "run": {"storage": str(storage), "name": name, "seed": 3, "checkpoint_every_steps": EVERY},
        }
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The run that nobody kills."""
    return train(experiment(tmp_path_factory.mktemp("undisturbed"), "undisturbed"))


def numbers(run: Path) -> list[dict[str, Any]]:
    """What a run computed, without how long it took."""
    timing = ("images_per_second", "seconds", "started_at")
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timing} for line in found]


def contents(run: Path) -> dict[str, bytes]:
    """Weights, optimizer and progress of every checkpoint, by name."""
    return {
        str(file.relative_to(run)): file.read_bytes()
        for file in (run / "checkpoints").rglob("*")
        if file.name in ("weights.safetensors", "training_state.pt")
    }


def assert_same(run: Path, undisturbed: Path) -> None:
    assert contents(run) == contents(undisturbed)
    assert numbers(run) == numbers(undisturbed)
    assert not list(run.glob("checkpoints/.partial*"))


@pytest.mark.parametrize("before", [True, False], ids=["before the update", "after the update"])
@pytest.mark.parametrize("step", range(1, NUM_STEPS + 1))
def test_a_run_killed_at_any_step_ends_with_the_same_bits(
    undisturbed: TrainResult, tmp_path: Path, step: int, before: bool
) -> None:
    mine = experiment(tmp_path, "killed")
    assert exit_code_of_training(mine, kill_at_update=step, before=before) == -signal.SIGKILL
    assert exit_code_of_training(mine) == 0
    assert_same(tmp_path / "killed", undisturbed.run_dir)


@pytest.mark.parametrize("survived", [1, 2, 3, 4, 5])
def test_a_run_killed_again_and_again_ends_with_the_same_bits(
    undisturbed: TrainResult, tmp_path: Path, survived: int
) -> None:
    """Each process is killed in its n-th step; where that is before its first save, the next goes further."""
    mine, kills, steps = experiment(tmp_path, "killed"), 0, survived
    while exit_code_of_training(mine, kill_at_update=steps + 1) == -signal.SIGKILL:
        kills += 1
        steps = survived if kills % 2 else survived + EVERY
    assert kills >= NUM_STEPS // (survived + EVERY)
    assert_same(tmp_path / "killed", undisturbed.run_dir)


@pytest.mark.event("inside epochs")
def test_no_step_is_computed_twice_but_those_since_the_last_save(undisturbed: TrainResult, tmp_path: Path) -> None:
    """Killed before its 12th update, the run resumes after the 9th: 15 updates are left, and not one more."""
    mine = experiment(tmp_path, "killed")
    assert exit_code_of_training(mine, kill_at_update=12) == -signal.SIGKILL
    assert (tmp_path / "killed/checkpoints/epoch=0002-step=000001").is_dir()
    assert exit_code_of_training(mine, kill_at_update=NUM_STEPS - 9 + 1) == 0
    assert_same(tmp_path / "killed", undisturbed.run_dir)
