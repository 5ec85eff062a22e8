"""System: what has become of each trial is read from its own files, whatever a kill has left of them.

The sweep is real, only small and without Ray: each trial was trained in this process as far as its state says.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import digits_in_this_process
from vae_ray import Experiment, UserError
from vae_ray.errors import Diverged
from vae_ray.parallel.group import SingleProcess
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.training.fit import fit_epochs
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.records import (
    FAILURE_FILE,
    FAILURES,
    LINEAGE_FILE,
    TrialRecord,
    read_failure,
    read_trials,
    trial_experiment,
)
from vae_ray.tuning.settings import settings
from vae_ray.tuning.trial import recorded_failure

FINISHED, UNTOLD, STOPPED, DIVERGED, KILLED, BEGUN, PROPOSED, CHANGED = (f"{number:04d}" for number in range(8))
STATES = {
    FINISHED: "finished",
    UNTOLD: "finished",  # the driver was killed before it wrote down the end
    STOPPED: "stopped",
    DIVERGED: "diverged",
    KILLED: "killed",
    BEGUN: "pending",
    PROPOSED: "pending",
    CHANGED: "finished",  # by PBT, after its first epoch
}
WHY_KILLED = 'its process died, with "quotes", a, comma; and a\nsecond line, ünlucky'


def small_sweep(path: Path) -> SweepDirectory:
    """The directory of a sweep of two epochs of the digits, before its first trial."""
    small = {"model.network.hidden": "16", "model.latent_dim": 3, "training.epochs": 2, "run.checkpoints_kept": 2}
    place = {"workers.num": 1, "run.name": path.name}
    base = digits_in_this_process(path.parent).with_overrides({**small, **place})
    path.mkdir()
    directory = SweepDirectory(path)
    chosen = settings(
        search={"objective.beta": {"loguniform": [0.01, 4.0]}},
        metric="val/nelbo",
        num_trials=8,
        scheduler="none",
        searcher="random",
        workers_per_trial=1,
    )
    directory.write_description({"experiment": base.to_dict(), **chosen.to_dict()})
    return directory


def propose(directory: SweepDirectory, name: str, **overrides: Any) -> None:
    directory.append_to_journal({"trial": name, "event": "proposed", "overrides": overrides})


def end(directory: SweepDirectory, name: str, state: str, reason: str = "", *, epoch: int = 2) -> None:
    entry = {"trial": name, "event": "ended", "epoch": epoch, "state": state, "reason": reason}
    directory.append_to_journal(entry)


def train_trial(directory: SweepDirectory, name: str, *, epochs: int, **overrides: Any) -> None:
    """Train a trial up to that epoch, or until it diverges, as its own process does."""
    run = directory.trial(name)
    base = Experiment.from_dict(directory.description()["experiment"])
    experiment = trial_experiment(base, directory.location, name, overrides)
    run.path.mkdir(parents=True, exist_ok=True)
    with (
        contextlib.suppress(Diverged),
        recorded_failure(run),
        contextlib.closing(fit_epochs(experiment, run.path, SingleProcess(torch.device("cpu")))) as training,
    ):
        for _ in range(epochs - max((line["epoch"] for line in run.records.history()), default=0)):
            next(training)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> SweepDirectory:
    directory = small_sweep(tmp_path_factory.mktemp("records") / "sweep")
    beta = {FINISHED: 1.0, UNTOLD: 0.25, STOPPED: 0.5, KILLED: 2.0, BEGUN: 0.125, CHANGED: 0.01, PROPOSED: 4.0}
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


def test_a_sweep_without_trials_has_no_records(tmp_path: Path) -> None:
    assert read_trials(small_sweep(tmp_path / "sweep")) == []


def test_only_failures_have_a_reason_and_count_as_failed(built: SweepDirectory) -> None:
    for record in read_trials(built):
        assert bool(record.reason) == record.failed == (record.state in FAILURES)
    assert record_of(built, DIVERGED).reason.startswith("epoch 1, step 2 of 42: the loss or its gradient is not finite")
    assert record_of(built, KILLED).reason == WHY_KILLED


def test_a_trial_that_is_whole_is_finished_whatever_the_journal_says(directory: SweepDirectory) -> None:
    """Its last checkpoint was complete before its process, or the driver, died."""
    end(directory, UNTOLD, "killed", "its process died")
    end(directory, FINISHED, "stopped")
    for name in (UNTOLD, FINISHED):
        record = record_of(directory, name)
        assert (record.state, record.reason, record.failed) == ("finished", "", False)


def test_the_last_end_counts(directory: SweepDirectory) -> None:
    """A killed trial was taken up by the next driver, which stopped it."""
    end(directory, KILLED, "stopped", epoch=1)
    assert (record_of(directory, KILLED).state, record_of(directory, KILLED).reason) == ("stopped", "")


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


def test_a_description_without_an_experiment_is_a_mistake(directory: SweepDirectory) -> None:
    directory.write_description({**directory.description(), "experiment": {"optim": {"lrr": 1}}})
    with pytest.raises(UserError, match=r"optim\.lrr"):
        read_trials(directory)


# --- how far they came ----------------------------------------------------------------------------------


def test_a_trial_has_come_as_far_as_its_last_complete_checkpoint(built: SweepDirectory) -> None:
    done = {record.name: record.epochs_done for record in read_trials(built)}
    assert done == {**dict.fromkeys(STATES, 2), STOPPED: 1, DIVERGED: 0, KILLED: 0, BEGUN: 1, PROPOSED: 0}
    for record in read_trials(built):
        assert epochs_of(record) == list(range(1, record.epochs_done + 1))


DAMAGES: dict[str, Callable[[RunDirectory], None]] = {
    "the checkpoint is gone": lambda run: shutil.rmtree(run.checkpoints / "epoch=0002"),
    "its manifest is gone": lambda run: (run.checkpoints / "epoch=0002/manifest.json").unlink(),
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
    assert [line["epoch"] for line in directory.trial(UNTOLD).records.history()] == [1, 2]
    DAMAGES[damage](directory.trial(UNTOLD))
    record = record_of(directory, UNTOLD)
    assert (record.state, record.epochs_done, epochs_of(record)) == ("pending", 1, [1])


def test_a_torn_line_of_metrics_is_no_epoch(directory: SweepDirectory) -> None:
    with directory.trial(BEGUN).records.metrics_file.open("a") as stream:
        stream.write('{"epoch": 2, "val/nelbo": 3')
    assert epochs_of(record_of(directory, BEGUN)) == [1]


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


def test_a_trial_goes_on_with_the_overrides_of_its_last_exploit(directory: SweepDirectory) -> None:
    record = record_of(directory, BEGUN)
    assert record.current == record.proposed == {"objective.beta": 0.125}
    with (record.run.path / LINEAGE_FILE).open("a") as stream:
        for beta in (1.5, 2.5):
            line = {"epoch": 1, "weights_of": FINISHED, "overrides": {"objective.beta": beta}}
            stream.write(json.dumps(line) + "\n")
        stream.write('{"epoch": 2, "weights_of": "0000", "overr')  # cut short by a kill
    assert record.current == {"objective.beta": 2.5}
    assert record.proposed == {"objective.beta": 0.125}


def test_a_trial_s_experiment_is_the_base_with_its_overrides_and_place(built: SweepDirectory) -> None:
    base = Experiment.from_dict(built.description()["experiment"])
    for record in read_trials(built):
        if record.checkpoints:
            assert record.best is not None
            own = record.best.experiment()
            assert own == trial_experiment(base, built.location, record.name, record.overrides)
            assert (own.run.name, Path(own.run.storage)) == (record.name, built.path / "trials")


# --- failures -------------------------------------------------------------------------------------------


def test_a_failed_trial_leaves_why_and_one_that_did_not_fail_leaves_nothing(built: SweepDirectory) -> None:
    left = {name: read_failure(built.trial(name)) for name in STATES}
    assert left.pop(DIVERGED)["state"] == "diverged"
    assert set(map(str, left.values())) == {"{}"}


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
