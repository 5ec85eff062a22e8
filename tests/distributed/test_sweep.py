"""Sweeps on real Ray: what they leave, whom they choose, and what they do with trials that fail."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import digits
from vae_ray import SweepResult, TrainedVAE, UserError, sweep, train
from vae_ray.cli.main import main
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.records import read_lineage
from vae_ray.tuning.schedulers import rungs

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

EPOCHS_TO_KILL_IN = 10
SPACE = {
    "model.latent_dim": {"choice": [2, 6]},
    "optim.lr": {"loguniform": [5e-4, 5e-3]},
    "objective.beta": {"choice": [0.5, 1.0, 2.0]},
}


def rows_of(result: SweepResult) -> list[dict[str, str]]:
    with result.leaderboard.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def trial_processes() -> list[int]:
    """Processes that now run a trial, by the title that Ray gives them."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (directory / "cmdline").read_bytes().startswith(b"ray::ResourceTrainable"):
                found.append(int(directory.name))
    return found


@contextlib.contextmanager
def once(condition: Callable[[], bool], act: Callable[[], None]) -> Iterator[None]:
    """Do `act` as soon as `condition` holds, while the body runs."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            if condition():
                act()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.fixture(scope="module")
def refusals() -> list[str]:
    """The errors of a second driver of `swept`, which starts while the first runs."""
    return []


@pytest.fixture(scope="module")
def swept(cluster: None, refusals: list[str], tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    """Five trials to the end."""
    storage = tmp_path_factory.mktemp("sweeps")
    experiment = digits(storage, 1, name="whole")
    arguments: dict[str, Any] = {"search": SPACE, "num_trials": 5, "scheduler": "none", "max_concurrent": 2}

    def start_another() -> None:
        with pytest.raises(UserError) as refusal:
            sweep(experiment, **arguments, resume=True)
        refusals.append(str(refusal.value))

    with once((storage / "whole" / "trials.jsonl").exists, start_another):
        return sweep(experiment, **arguments)


def test_a_second_driver_is_refused_while_the_first_runs(swept: SweepResult, refusals: list[str]) -> None:
    assert swept.states == {"finished": 5}
    assert refusals == ["run.name: 'whole' is running right now; choose another --name"]


def test_the_leaderboard_has_every_trial_once_and_the_best_first(swept: SweepResult) -> None:
    rows = rows_of(swept)
    assert sorted(row["trial"] for row in rows) == ["0000", "0001", "0002", "0003", "0004"]
    values = [float(row["val/nelbo"]) for row in rows]
    assert values == sorted(values)
    assert swept.best["trial"] == rows[0]["trial"]
    assert swept.best["metrics"]["val/nelbo"] == values[0]
    assert swept.num_trials == 5
    assert swept.num_failed == 0
    assert swept.states == {"finished": 5}


def test_best_is_a_complete_checkpoint_that_evaluates_to_its_metrics(swept: SweepResult) -> None:
    model = TrainedVAE.load(swept.best["checkpoint"])
    assert TrainedVAE.load(swept.sweep_dir).checkpoint == model.checkpoint
    assert model.experiment.flat()["optim.lr"] == swept.best["overrides"]["optim.lr"]
    assert model.evaluate("test")["test/nelbo"] == pytest.approx(swept.best["metrics"]["test/nelbo"], abs=1e-4)


def test_every_trial_leaves_what_a_run_leaves(swept: SweepResult) -> None:
    for row in rows_of(swept):
        run = RunDirectory(swept.sweep_dir / "trials" / row["trial"])
        assert TrainedVAE.load(run.path).checkpoint.path == swept.sweep_dir / row["checkpoint"]
        assert run.experiment().flat()["model.latent_dim"] == int(row["model.latent_dim"])
        assert [line["epoch"] for line in run.records.history()] == [1, 2, 3]
        for kind in ("samples", "reconstructions", "traversals"):
            assert len(list((run.images / kind).iterdir())) == 3
        assert len(list(run.tensorboard.rglob("*tfevents*"))) == 2, "scalars and images; hyperparameters"
        assert 1 <= len(list(run.checkpoints.iterdir())) <= 2, "the best and the last"


def test_a_trial_is_the_run_of_its_experiment_number_for_number(swept: SweepResult, tmp_path: Path) -> None:
    trial = RunDirectory(swept.sweep_dir / "trials" / swept.best["trial"])
    place = {"run.name": "again", "run.storage": str(tmp_path), "workers.num": 0}
    again = train(trial.experiment().with_overrides(place))

    def numbers(history: list[dict[str, Any]]) -> list[dict[str, float]]:
        return [{key: value for key, value in line.items() if "/" in key} for line in history]

    assert numbers(again.history) == numbers(trial.records.history())


def test_the_report_command_writes_everything_again_from_the_files(
    swept: SweepResult, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [swept.leaderboard, swept.report, swept.sweep_dir / "leaderboard.parquet"]
    before = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
    assert main(["report", str(swept.sweep_dir), "--json"]) == 0
    assert [file.read_bytes() for file in files] == before
    assert json.loads(capsys.readouterr().out)["best"] == swept.best


def test_nothing_of_tune_is_left(swept: SweepResult) -> None:
    shown = {path.name for path in swept.sweep_dir.iterdir() if not path.name.startswith(".")}
    hidden = {path.name for path in swept.sweep_dir.iterdir() if path.name.startswith(".")}
    files = {"sweep.yaml", "trials.jsonl", "leaderboard.csv", "leaderboard.parquet", "report.html", "summary.json"}
    assert shown == {*files, "best", "trials"}
    assert hidden <= {".driver.lock"}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "the next Ctrl-C would do nothing"


def test_a_used_name_is_refused_and_resuming_a_finished_sweep_runs_nothing(swept: SweepResult) -> None:
    experiment = digits(swept.sweep_dir.parent, 1, name="whole")
    with pytest.raises(UserError, match=r"already used .* by this sweep; add --resume"):
        sweep(experiment, search=SPACE, num_trials=5, scheduler="none")
    with pytest.raises(UserError, match=r"cannot be resumed as a different sweep \(optim.grad_clip: None -> 5.0\)"):
        sweep(
            experiment.with_overrides({"optim.grad_clip": 5}), search=SPACE, num_trials=5, scheduler="none", resume=True
        )
    written = {path: path.stat().st_mtime_ns for path in (swept.sweep_dir / "trials").rglob("*") if path.is_file()}
    again = sweep(experiment, search=SPACE, num_trials=5, scheduler="none", resume=True)
    assert again.best == swept.best
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_the_smallest_beta_does_not_win_by_its_loss(tmp_path: Path) -> None:
    experiment = digits(tmp_path, 1, name="betas", **{"training.epochs": 12})
    space = {"objective.beta": {"grid": [0.01, 0.5, 1.0, 8.0]}}
    result = sweep(experiment, search=space, searcher="grid", scheduler="none", max_concurrent=2)
    rows = {float(row["objective.beta"]): row for row in rows_of(result)}
    directory = SweepDirectory(result.sweep_dir)
    last = {beta: directory.trial(row["trial"]).records.history()[-1] for beta, row in rows.items()}
    by_loss = min(last, key=lambda beta: last[beta]["train/loss"])
    by_nelbo = min(rows, key=lambda beta: float(rows[beta]["val/nelbo"]))
    assert by_loss == 0.01, "what each optimised is smallest where the rate costs least"
    assert result.best["overrides"]["objective.beta"] == by_nelbo
    assert by_nelbo != 0.01
    # The rate falls with beta: the sweep shows the trade-off itself.
    rates = [last[beta]["val/rate"] for beta in sorted(rows)]
    assert rates == sorted(rates, reverse=True)


def test_asha_stops_bad_trials_and_keeps_their_best(tmp_path: Path) -> None:
    experiment = digits(tmp_path, 1, name="asha", **{"training.epochs": 9})
    space = {"optim.lr": {"grid": [2e-3, 1e-3, 1e-6, 2e-6, 3e-6, 4e-6]}}
    result = sweep(experiment, search=space, num_trials=6, max_concurrent=2)
    rows = {row["trial"]: row for row in rows_of(result)}
    assert result.best["trial"] in ("0000", "0001")
    assert result.states["stopped"] >= 3
    for row in rows.values():
        if row["state"] == "stopped":
            assert int(row["epochs"]) in rungs(9)
            assert TrainedVAE.load(result.sweep_dir / row["checkpoint"]).checkpoint.epoch <= int(row["epochs"])
            events = list((result.sweep_dir / "trials" / row["trial"] / "tensorboard").rglob("*tfevents*"))
            assert len(events) == 2, "a stopped trial has its hyperparameters in TensorBoard too"


def test_failed_trials_are_marked_with_their_reason_and_the_others_go_on(tmp_path: Path) -> None:
    experiment = digits(tmp_path, 1, name="failures", **{"training.epochs": EPOCHS_TO_KILL_IN})
    directory = SweepDirectory(tmp_path / "failures")
    space = {"optim.lr": {"grid": [1e-3, 1e30, 2e-3]}}

    def first_trial_is_under_way() -> bool:
        return len(directory.trial("0000").records.history()) >= 3

    def kill_it() -> None:
        for process in trial_processes():  # the one at work, and any that the last test has left to be ended
            os.kill(process, signal.SIGKILL)

    arguments: dict[str, Any] = {"search": space, "num_trials": 3, "scheduler": "none", "max_concurrent": 1}
    with once(first_trial_is_under_way, kill_it):
        result = sweep(experiment, **arguments)
    rows = {row["trial"]: row for row in rows_of(result)}
    assert {name: row["state"] for name, row in rows.items()} == {
        "0000": "killed",
        "0001": "diverged",
        "0002": "finished",
    }
    assert "its process died" in rows["0000"]["reason"]
    assert "is not finite; the batch is in" in rows["0001"]["reason"]
    assert result.num_failed == 2
    assert result.best["trial"] == "0002"
    assert rows["0000"]["rank"] == rows["0001"]["rank"] == ""

    before = directory.trial("0000").records.history()
    resumed = sweep(experiment, **arguments, resume=True)
    rows = {row["trial"]: row for row in rows_of(resumed)}
    assert {name: row["state"] for name, row in rows.items()} == {
        "0000": "finished",
        "0001": "diverged",
        "0002": "finished",
    }
    after = directory.trial("0000").records.history()
    assert [line["epoch"] for line in after] == list(range(1, EPOCHS_TO_KILL_IN + 1))
    # what it had saved was not computed again
    saved = [line for line in before[:-1] if line["started_at"] == after[line["epoch"] - 1]["started_at"]]
    assert len(saved) >= 2


def test_if_all_trials_fail_the_exit_code_is_1_and_the_json_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = tmp_path / "search.yaml"
    search.write_text("optim.lr: {uniform: [1.0e+30, 2.0e+30]}\n")
    arguments = ["sweep", "digits", "--storage", str(tmp_path), "--name", "bad", "--search", str(search)]
    assert main([*arguments, "--num-trials", "2", "--training.epochs", "2", "--json"]) == 1
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert (answer["num_trials"], answer["num_failed"], answer["best"]) == (2, 2, {})
    assert "diverged" in captured.err
    assert Path(answer["report"]).exists()


def test_pbt_copies_weights_and_changes_configurations_and_goes_on_without_a_member_that_fails(tmp_path: Path) -> None:
    experiment = digits(tmp_path, 1, name="pbt", **{"training.epochs": 10, "run.checkpoints_kept": 100})
    space = {"optim.lr": {"grid": [1e-3, 1e30, 2e-3, 4e-3]}, "objective.beta": {"uniform": [0.5, 2.0]}}
    result = sweep(experiment, scheduler="pbt", num_trials=4, search=space)
    directory = SweepDirectory(result.sweep_dir)
    exploits, doomed = 0, {"0001"}
    for name in ("0000", "0001", "0002", "0003"):
        for step in read_lineage(directory.trial(name)):
            exploits += 1
            epoch, donor = step["epoch"], directory.trial(step["weights_of"])
            own = directory.trial(name).checkpoints
            copied = own / f"epoch={epoch:04d}" / "weights.safetensors"
            assert (
                copied.read_bytes() == (donor.checkpoints / f"epoch={epoch:04d}" / "weights.safetensors").read_bytes()
            )
            before = json.loads((donor.checkpoints / f"epoch={epoch:04d}" / "experiment.json").read_text())
            assert (before["optim"]["lr"], before["objective"]["beta"]) != tuple(step["overrides"].values())
            if step["overrides"]["optim.lr"] == 1e30:  # a mutation can choose it again
                doomed.add(name)
                continue
            after = TrainedVAE.load(own / f"epoch={epoch + 1:04d}").experiment.flat()
            assert {key: after[key] for key in step["overrides"]} == step["overrides"]
    assert {row["trial"] for row in rows_of(result) if row["state"] == "diverged"} == doomed
    assert result.states == {"finished": 4 - len(doomed), "diverged": len(doomed)}
    assert len(doomed) < 4
    assert exploits >= 1


def test_optuna_proposes_and_a_resumed_sweep_goes_on_from_what_it_learnt(tmp_path: Path) -> None:
    experiment = digits(tmp_path, 1, name="optuna", **{"training.epochs": 1})
    arguments: dict[str, Any] = {"search": SPACE, "searcher": "optuna", "metric": ["val/rate", "val/distortion"]}
    first = sweep(experiment, num_trials=3, max_concurrent=2, **arguments)
    assert first.num_trials == 3
    assert 1 <= len(first.pareto_front) <= 3
    directory = SweepDirectory(first.sweep_dir)
    lines = {name: directory.trial(name).records.history() for name in ("0000", "0001", "0002")}
    grown = sweep(experiment, num_trials=5, max_concurrent=2, **arguments, resume=True)
    assert grown.states == {"finished": 5}
    assert {name: directory.trial(name).records.history() for name in lines} == lines, "only the new ones were run"
    proposed = [entry["overrides"] for entry in directory.journal() if entry["event"] == "proposed"]
    assert len({json.dumps(overrides) for overrides in proposed}) == 5
    with pytest.raises(UserError, match="num_trials: 5 -> 2"):
        sweep(experiment, num_trials=2, **arguments, resume=True)
