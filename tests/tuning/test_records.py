"""System: the state of each trial is read from its own files, whatever a kill has left of them.

The sweep is real, only small and without Ray: each trial was trained in this process as far as its state says.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.tuning.trials import end, propose, small_sweep, train_trial
from vae_ray import Experiment
from vae_ray.errors import Diverged
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.records import FAILURE_FILE, FAILURES, TrialRecord, read_failure, read_trials, trial_experiment
from vae_ray.tuning.trial import recorded_failure

FINISHED, MISSED, STOPPED, DIVERGED, KILLED, BEGUN, PROPOSED, CHANGED = (f"{number:04d}" for number in range(8))
STATES = {
    FINISHED: "finished",
    MISSED: "finished",  # the driver was killed before it wrote the end
    STOPPED: "stopped",
    DIVERGED: "diverged",
    KILLED: "killed",
    BEGUN: "pending",
    PROPOSED: "pending",
    CHANGED: "finished",  # by PBT, after its first epoch
}
WHY_KILLED = 'its process died, with "quotes", a, comma; and a\nsecond line, ünlucky'


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> SweepDirectory:
    directory = small_sweep(tmp_path_factory.mktemp("records") / "sweep")
    beta = {FINISHED: 1.0, MISSED: 0.25, STOPPED: 0.5, KILLED: 2.0, BEGUN: 0.125, CHANGED: 0.01, PROPOSED: 4.0}
    for name in reversed(STATES):  # trials are proposed in any order
        own = {"objective.beta": beta[name]} if name != DIVERGED else {"optim.lr": 1e30, "optim.warmup_steps": 0}
        propose(directory, name, **own)
        epochs = {STOPPED: 1, DIVERGED: 1, BEGUN: 1, CHANGED: 1, KILLED: 0, PROPOSED: 0}.get(name, 2)
        if epochs:
            train_trial(directory, name, epochs=epochs, **own)
    train_trial(directory, CHANGED, epochs=2, **{"objective.beta": 4.0})
    end(directory, FINISHED, "finished")
    end(directory, CHANGED, "finished")
    end(directory, STOPPED, "stopped", epoch=1)
    end(directory, DIVERGED, **read_failure(directory.trial(DIVERGED)), epoch=0)
    end(directory, KILLED, "killed", WHY_KILLED, epoch=0)
    return directory


@pytest.fixture
def directory(built: SweepDirectory, tmp_path: Path) -> SweepDirectory:
    """A copy that a test may damage."""
    shutil.copytree(built.path, tmp_path / "sweep")
    return SweepDirectory(tmp_path / "sweep")


def record_of(directory: SweepDirectory, name: str) -> TrialRecord:
    (record,) = (record for record in read_trials(directory) if record.name == name)
    return record


def epochs_of(record: TrialRecord) -> list[int]:
    return [line["epoch"] for line in record.history]


# --- states ---------------------------------------------------------------------------------------------


def test_every_trial_is_there_once_by_name_in_its_state(built: SweepDirectory) -> None:
    assert [(record.name, record.state) for record in read_trials(built)] == list(STATES.items())


def test_only_failures_have_a_reason_and_count_as_failed(built: SweepDirectory) -> None:
    for record in read_trials(built):
        assert bool(record.reason) == record.failed == (record.state in FAILURES)
    assert record_of(built, DIVERGED).reason.startswith("epoch 1, step 2 of 42: the distortion is not finite")
    assert record_of(built, KILLED).reason == WHY_KILLED


def test_a_trial_that_is_whole_is_finished_whatever_the_journal_says(directory: SweepDirectory) -> None:
    """Its last checkpoint was complete before its process, or the driver, died."""
    end(directory, MISSED, "killed", "its process died")
    end(directory, FINISHED, "stopped")
    for name in (MISSED, FINISHED):
        record = record_of(directory, name)
        assert (record.state, record.reason, record.failed) == ("finished", "", False)


def test_a_trial_proposed_twice_keeps_what_it_began_with(directory: SweepDirectory) -> None:
    propose(directory, FINISHED, **{"objective.beta": 3.0})
    assert record_of(directory, FINISHED).proposed == {"objective.beta": 1.0}
    assert len(read_trials(directory)) == len(STATES)


def test_a_trial_has_the_epochs_of_its_own_overrides(directory: SweepDirectory) -> None:
    for name, like, epochs in (("0100", STOPPED, 1), ("0101", FINISHED, 3)):
        propose(directory, name, **{"training.epochs": epochs})
        shutil.copytree(directory.trial(like).path, directory.trial(name).path)
    assert (record_of(directory, "0100").state, record_of(directory, "0100").epochs_done) == ("finished", 1)
    assert (record_of(directory, "0101").state, record_of(directory, "0101").epochs_done) == ("pending", 2)


# --- how far they came ----------------------------------------------------------------------------------


def test_a_trial_has_come_as_far_as_its_last_complete_checkpoint(built: SweepDirectory) -> None:
    done = {record.name: record.epochs_done for record in read_trials(built)}
    assert done == {**dict.fromkeys(STATES, 2), STOPPED: 1, DIVERGED: 0, KILLED: 0, BEGUN: 1, PROPOSED: 0}
    for record in read_trials(built):
        assert epochs_of(record) == list(range(1, record.epochs_done + 1))


DAMAGES: dict[str, Callable[[RunDirectory], None]] = {
    "its manifest is torn": lambda run: tear(run.checkpoints / "epoch=0002/manifest.json"),
    "it was never renamed": lambda run: rename(run.checkpoints / "epoch=0002", ".partial-epoch=0002"),
}


def tear(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def rename(path: Path, name: str) -> None:
    path.rename(path.with_name(name))


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_epoch_without_a_whole_checkpoint_was_not_done(directory: SweepDirectory, damage: str) -> None:
    """It will be trained again, so its line must not count twice."""
    assert [line["epoch"] for line in directory.trial(MISSED).records.history()] == [1, 2]
    DAMAGES[damage](directory.trial(MISSED))
    record = record_of(directory, MISSED)
    assert (record.state, record.epochs_done, epochs_of(record)) == ("pending", 1, [1])


# --- best checkpoint and overrides ----------------------------------------------------------------------


def test_the_best_checkpoint_is_the_epoch_of_the_smallest_nelbo(built: SweepDirectory) -> None:
    for record in read_trials(built):
        if record.history:
            assert record.best is not None
            best = min(record.history, key=lambda line: line["val/nelbo"])
            assert (record.best.epoch, record.value("val/nelbo")) == (best["epoch"], best["val/nelbo"])
            assert record.value("val/rate") == best["val/rate"]


def test_a_trial_without_a_checkpoint_has_no_best_and_no_value(built: SweepDirectory) -> None:
    record = record_of(built, PROPOSED)
    assert (record.best, record.value("val/nelbo"), record.history) == (None, None, [])
    assert record.overrides == record.proposed == {"objective.beta": 4.0}


def test_overrides_are_those_of_the_best_checkpoint_not_those_it_began_with(built: SweepDirectory) -> None:
    record = record_of(built, CHANGED)
    assert record.best is not None
    assert record.best.epoch == 2
    assert record.proposed == {"objective.beta": 0.01}
    assert record.overrides == {"objective.beta": 4.0}


def test_a_trial_s_experiment_is_the_base_with_its_overrides_and_place(built: SweepDirectory) -> None:
    base = Experiment.from_dict(built.description()["experiment"])
    for record in read_trials(built):
        if record.checkpoints:
            assert record.best is not None
            own = record.best.experiment()
            assert own == trial_experiment(base, built.location, record.name, record.overrides)
            assert (own.run.name, Path(own.run.storage)) == (record.name, built.path / "trials")


# --- failures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"3", b'"state"', b'{"state": "failed"}', b"\xff\xfe", b'{"state": "failed", "reas'],
    ids=repr,
)
def test_garbage_is_no_failure(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FAILURE_FILE).write_bytes(content)
    assert read_failure(RunDirectory(tmp_path)) == {}


def test_a_failure_is_one_line_and_forgotten_by_the_next_attempt(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    failures: list[tuple[Exception, str, str]] = [
        (ValueError("no\n  such   thing"), "failed", "ValueError: no such thing"),
        (Diverged("epoch 3: not finite"), "diverged", "epoch 3: not finite"),
        (MemoryError(), "failed", "out of memory"),
        (torch.OutOfMemoryError("CUDA: 3 GiB\nasked"), "failed", "out of memory: CUDA: 3 GiB asked"),
    ]
    for error, state, reason in failures:
        with pytest.raises(type(error)), recorded_failure(run):
            raise error
        assert read_failure(run) == {"state": state, "reason": reason}
    with recorded_failure(run):
        assert read_failure(run) == {}
    assert not (tmp_path / FAILURE_FILE).exists()


def test_histories_hold_finite_numbers_alone(built: SweepDirectory) -> None:
    """An epoch that diverged has no line: nothing that compares trials ever meets a NaN."""
    numbers = [value for record in read_trials(built) for line in record.history for value in line.values()]
    assert len(numbers) > 100
    assert all(map(math.isfinite, numbers))
