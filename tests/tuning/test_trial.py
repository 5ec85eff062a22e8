"""Contract: under PBT a trial continues from another's checkpoint with its own hyperparameters, after any kill."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tuning.trials import propose, small_sweep, train_trial
from vae_ray import Experiment
from vae_ray.checkpoints.loading import Checkpoint, read_checkpoint
from vae_ray.checkpoints.quarantine import load_newest
from vae_ray.errors import CorruptFile
from vae_ray.parallel.group import SingleProcess
from vae_ray.training.trainer import Trainer
from vae_ray.tuning import trial
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.records import TrialRecord, read_trials, trial_experiment
from vae_ray.tuning.trial import adopt, record_lineage

HEIR, DONOR = "0000", "0001"
BEFORE = {"optim.lr": 1e-3, "optim.weight_decay": 0.1, "objective.beta": 1.0}
DONOR_S = {"optim.lr": 2e-3, "optim.weight_decay": 0.2, "objective.beta": 2.0}
MUTATED = {"optim.lr": 3e-3, "optim.weight_decay": 0.3, "objective.beta": 3.0}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> SweepDirectory:
    """Two trials after their first epoch of two."""
    directory = small_sweep(tmp_path_factory.mktemp("pbt") / "sweep")
    for name, overrides in ((HEIR, BEFORE), (DONOR, DONOR_S)):
        propose(directory, name, **overrides)
        train_trial(directory, name, epochs=1, **overrides)
    return directory


def copy_of(directory: SweepDirectory, path: Path) -> SweepDirectory:
    return SweepDirectory(shutil.copytree(directory.path, path))


def donor_s(directory: SweepDirectory) -> Checkpoint:
    return read_checkpoint(directory.trial(DONOR).checkpoints / "epoch=0001")


def heir_of(directory: SweepDirectory) -> TrialRecord:
    return read_trials(directory)[0]


def adopted(directory: SweepDirectory) -> None:
    adopt(directory.trial(HEIR), donor_s(directory), HEIR, MUTATED)


def continuation(directory: SweepDirectory) -> tuple[str, dict[str, Any]]:
    """Whose weights the trial continues from, and with which overrides."""
    newest = load_newest(directory.trial(HEIR).checkpoints, pull=lambda path=None: None)
    assert newest is not None
    return str(newest.experiment().run.name), heir_of(directory).current


def test_before_an_adoption_a_trial_continues_as_it_was_proposed(built: SweepDirectory) -> None:
    assert continuation(built) == (HEIR, BEFORE)
    assert heir_of(built).lineage == []


class Killed(BaseException):
    """Raised in place of a kill, which no handler of an `Exception` sees either."""


@pytest.mark.parametrize("is_done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("step", "is_ahead"),
    [
        ("copy_checkpoint", False),
        ("copy_checkpoint", True),
        ("atomic_remove_directory", True),  # of the later checkpoints of a trial that is ahead of its donor
        ("append_records", False),
        ("append_records", True),
    ],
)
def test_a_kill_between_any_two_steps_leaves_a_trial_that_continues_as_one_or_the_other(
    step: str, is_done: bool, is_ahead: bool, built: SweepDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step by itself is done or not: `tests/faults` kills at every file operation of the first and the last."""
    directory = copy_of(built, tmp_path / "sweep")
    if is_ahead:
        train_trial(directory, HEIR, epochs=2, **BEFORE)

    def killed(*arguments: Any) -> None:
        if is_done:
            original(*arguments)
        raise Killed

    original = getattr(trial, step)
    monkeypatch.setattr(trial, step, killed)
    with pytest.raises(Killed):
        adopted(directory)
    monkeypatch.undo()
    is_adopted = step == "append_records" or (is_done and not (is_ahead and step == "copy_checkpoint"))
    is_recorded = step == "append_records" and is_done
    # between the copy and its record the mutation is lost; the donor's own hyperparameters fit its weights
    expected = (DONOR, MUTATED if is_recorded else DONOR_S) if is_adopted else (HEIR, BEFORE)
    assert continuation(directory) == expected
    record_lineage(directory.trial(HEIR), HEIR, expected[1])  # as the trial does when it starts again
    lineage = [(entry["weights_of"], entry["overrides"]) for entry in heir_of(directory).lineage]
    assert lineage == ([expected] if is_adopted else [])
    train_trial(directory, HEIR, epochs=2, **expected[1])
    assert (heir_of(directory).state, heir_of(directory).current) == ("finished", expected[1])


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_trial_continues_from_the_adopted_checkpoint(epochs: int, built: SweepDirectory, tmp_path: Path) -> None:
    directory = copy_of(built, tmp_path / "sweep")
    train_trial(directory, HEIR, epochs=epochs, **BEFORE)
    adopted(directory)
    assert continuation(directory) == (DONOR, MUTATED)
    assert [entry["epoch"] for entry in heir_of(directory).lineage] == [1]


def test_a_damaged_checkpoint_is_not_adopted(built: SweepDirectory, tmp_path: Path) -> None:
    directory = copy_of(built, tmp_path / "sweep")
    (donor_s(directory).path / "weights.safetensors").write_bytes(b"torn")
    with pytest.raises(CorruptFile):
        adopted(directory)
    assert continuation(directory) == (HEIR, BEFORE)
    assert heir_of(directory).lineage == []


def test_tensors_are_the_donor_s_and_hyperparameters_the_mutated_ones(built: SweepDirectory, tmp_path: Path) -> None:
    directory = copy_of(built, tmp_path / "sweep")
    adopted(directory)
    base = Experiment.from_dict(directory.description()["experiment"])
    base = base.with_overrides({"optim.schedule": "constant", "optim.warmup_steps": 0})
    experiment = trial_experiment(base, directory.location, HEIR, heir_of(directory).current)
    trainer = Trainer(experiment, directory.trial(HEIR), SingleProcess(torch.device("cpu")))
    stored = donor_s(directory).training_state()
    tensors = trainer.state.tensors()
    assert any(name.endswith("exp_avg") for name in stored)
    assert tensors.keys() == stored.keys()
    assert all(torch.equal(tensors[name], stored[name]) for name in stored)
    record = trainer.run_epoch(None)
    (optimizer,) = trainer.state.optimizers.values()
    (group,) = optimizer.param_groups
    reference = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    assert (group["lr"], group["weight_decay"], group["betas"]) == (3e-3, 0.3, reference.defaults["betas"])
    assert (record["lr"], record["beta"]) == (3e-3, 3.0)
