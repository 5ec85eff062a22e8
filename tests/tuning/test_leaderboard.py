"""Truth and contract: the ranking, the tables, and what `best/` holds."""

import io
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tests.tuning.trials import end, propose, record_of, small_sweep, train_trial
from vae_ray import TrainedVAE
from vae_ray.checkpoints.saving import copy_checkpoint
from vae_ray.tuning import leaderboard
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.leaderboard import non_dominated, ranked
from vae_ray.tuning.metrics import METRICS
from vae_ray.tuning.progress import SweepView
from vae_ray.tuning.records import FAILURES, TrialRecord, read_trials
from vae_ray.tuning.summary import summarize_sweep

RATE_DISTORTION = ("val/rate", "val/distortion")
SMALL_BETA, MIDDLE_BETA, LARGE_BETA, FAILED, PROPOSED = (f"{number:04d}" for number in range(5))
REASON = 'a "quoted" reason, with a comma;\nand a second line: ünlucky'


def names(records: Sequence[TrialRecord]) -> list[str]:
    return [record.name for record in records]


# Few different values, so that ties, duplicates and dominated points are all frequent.
points = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=9)


def records_at(points: Sequence[tuple[float, float]]) -> list[TrialRecord]:
    return [
        record_of(f"{number:04d}", {"val/nelbo": float(sum(point)), "val/rate": point[0], "val/distortion": point[1]})
        for number, point in enumerate(points)
    ]


def dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Pareto dominance, literally: nowhere worse and somewhere better."""
    return a[0] <= b[0] and a[1] <= b[1] and (a[0] < b[0] or a[1] < b[1])


# --- one metric -----------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([1.0, 2.0, 2.5, 7.0]), max_size=7), st.randoms(use_true_random=False))
def test_trials_are_ranked_by_the_metric_and_ties_by_name(values: list[float], random: Any) -> None:
    records = [record_of(f"{number:04d}", {"val/nelbo": value}) for number, value in enumerate(values)]
    random.shuffle(records)
    order = sorted((value, f"{number:04d}") for number, value in enumerate(values))
    assert names(ranked(records, ["val/nelbo"])) == [name for _, name in order]


@given(st.lists(st.sampled_from(["finished", "stopped", "pending", *FAILURES]), min_size=1, max_size=6), st.data())
def test_failed_trials_come_last_however_good_they_were(states: list[str], data: st.DataObject) -> None:
    values = data.draw(st.lists(st.none() | st.floats(-5, 5), min_size=len(states), max_size=len(states)))
    records = [
        record_of(f"{n:04d}", None if value is None else {"val/nelbo": value}, state=state)
        for n, (state, value) in enumerate(zip(states, values, strict=True))
    ]
    order = ranked(records, ["val/nelbo"])
    assert sorted(names(order)) == names(records)
    is_ranked = [not record.failed and record.best is not None for record in order]
    assert is_ranked == sorted(is_ranked, reverse=True)


def test_a_trial_that_lacks_the_metric_is_not_ranked_before_one_that_has_it() -> None:
    records = [record_of("0000", {}), record_of("0001", {"train/nelbo": 9.0})]
    assert names(ranked(records, ["train/nelbo"])) == ["0001", "0000"]


# --- two metrics ----------------------------------------------------------------------------------------


@given(points)
def test_the_pareto_front_is_what_no_other_dominates(points: list[tuple[float, float]]) -> None:
    expected = [
        f"{number:04d}" for number, point in enumerate(points) if not any(dominates(other, point) for other in points)
    ]
    assert names(non_dominated(records_at(points), RATE_DISTORTION)) == expected


def test_failed_trials_neither_are_on_the_front_nor_push_others_from_it() -> None:
    good = {"val/rate": 0.0, "val/distortion": 0.0}
    failed = [record_of(f"9{n:03d}", good, state=state) for n, state in enumerate(FAILURES)]
    assert names(non_dominated([*failed, *records_at([(2, 3)])], RATE_DISTORTION)) == ["0000"]


@given(points)
def test_two_metrics_rank_front_by_front_and_a_front_by_nelbo(points: list[tuple[float, float]]) -> None:
    depth: dict[int, int] = {}
    for level in range(len(points)):
        left = [number for number in range(len(points)) if number not in depth]
        depth |= {n: level for n in left if not any(dominates(points[other], points[n]) for other in left)}
    order = sorted(range(len(points)), key=lambda n: (depth[n], sum(points[n]), n))
    assert names(ranked(records_at(points), RATE_DISTORTION)) == [f"{number:04d}" for number in order]


# --- tables and best/ of a real sweep -------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> SweepDirectory:
    """Three trials of different beta, one that failed after an epoch and one that was never begun."""
    directory = small_sweep(tmp_path_factory.mktemp("leaderboard") / "sweep")
    betas = {SMALL_BETA: 0.01, MIDDLE_BETA: 0.5, LARGE_BETA: 4.0, FAILED: 1.0, PROPOSED: 2.0}
    for name, beta in betas.items():
        own = {
            "objective.beta": beta,
            "model.network.hidden": "[16]" if beta == 0.5 else "[12, 8]",
            "optim.grad_clip": None,
        }
        propose(directory, name, **own)
        if name != PROPOSED:
            train_trial(directory, name, epochs=1 if name == FAILED else 2, **own)
    end(directory, FAILED, "failed", REASON, epoch=1)
    return directory


@pytest.fixture(scope="module")
def records(directory: SweepDirectory) -> list[TrialRecord]:
    return read_trials(directory)


@pytest.fixture(scope="module")
def table(directory: SweepDirectory, records: list[TrialRecord]) -> list[dict[str, Any]]:
    table = leaderboard.rows(records, ["val/nelbo"], directory)
    leaderboard.write_leaderboard(table, directory)
    return table


def test_the_smallest_beta_has_the_smallest_loss_and_does_not_win(records: list[TrialRecord]) -> None:
    loss = {record.name: min(line["train/loss"] for line in record.history) for record in records if record.history}
    nelbo = {record.name: record.value("val/nelbo") for record in records if record.history}
    assert min(loss, key=lambda name: loss[name]) == SMALL_BETA
    winner = ranked(records, ["val/nelbo"])[0].name
    assert winner != SMALL_BETA
    assert nelbo[winner] == min(value for name, value in nelbo.items() if name != FAILED)


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_that_can_be_chosen_is_measured_in_every_checkpoint(
    records: list[TrialRecord], metric: str
) -> None:
    assert all(math.isfinite(checkpoint.metrics[metric]) for record in records for checkpoint in record.checkpoints)


def test_a_row_is_what_a_trial_s_own_files_hold(
    directory: SweepDirectory, records: list[TrialRecord], table: list[dict[str, Any]]
) -> None:
    by_name = {row["trial"]: row for row in table}
    assert sorted(by_name) == names(records)
    for record in records:
        row = by_name[record.name]
        assert (row["state"], row["epochs"], row["reason"]) == (record.state, record.epochs_done, record.reason)
        assert row["seconds"] == sum(line["seconds"] for line in record.history)
        if record.best is not None:
            manifest = json.loads((directory.path / row["checkpoint"] / "manifest.json").read_text())
            assert row["best_epoch"] == manifest["epoch"]
            measured = {key: value for key, value in manifest["metrics"].items() if "/" in key}
            assert measured == {key: value for key, value in row.items() if "/" in key}
            flat = record.best.experiment().flat()
            assert row["objective.beta"] == flat["objective.beta"]
            assert json.loads(row["model.network.hidden"]) == flat["model.network.hidden"]


def test_ranks_count_from_1_and_only_trials_that_can_be_compared_have_one(table: list[dict[str, Any]]) -> None:
    assert [row["rank"] for row in table] == [1, 2, 3, None, None]
    assert [row["trial"] for row in table[3:]] == [FAILED, PROPOSED]
    values = [row["val/nelbo"] for row in table[:3]]
    assert values == sorted(values)


def test_the_front_is_drawn_on_the_split_by_which_trials_are_compared(
    directory: SweepDirectory, records: list[TrialRecord]
) -> None:
    for split in ("val", "train"):
        front = non_dominated(records, [f"{split}/rate", f"{split}/distortion"])
        for metrics in ([f"{split}/nelbo"], [f"{split}/distortion", f"{split}/rate"]):
            table = leaderboard.rows(records, metrics, directory)
            assert {row["trial"] for row in table if row["pareto_front"]} == set(names(front))


def test_csv_and_parquet_hold_the_same_values_as_the_table(
    directory: SweepDirectory, table: list[dict[str, Any]]
) -> None:
    parquet = pyarrow.parquet.read_table(directory.leaderboard_parquet)
    assert parquet.to_pylist() == table
    read_as = pyarrow.csv.ConvertOptions(
        column_types=parquet.schema, strings_can_be_null=True, quoted_strings_can_be_null=False
    )
    with_line_ends = pyarrow.csv.ParseOptions(newlines_in_values=True)
    read = pyarrow.csv.read_csv(directory.leaderboard_csv, parse_options=with_line_ends, convert_options=read_as)
    assert read.to_pylist() == table


@pytest.mark.parametrize("metrics", [("val/nelbo",), RATE_DISTORTION], ids=str)
def test_live_line_leaderboard_summary_and_best_name_the_same_trial_and_epoch(
    metrics: tuple[str, ...], directory: SweepDirectory, records: list[TrialRecord]
) -> None:
    directory.write_description({**directory.description(), "metrics": list(metrics)})
    written = io.StringIO()
    view = SweepView(
        "mine", metric="val/nelbo", num_trials=5, epochs=2, records=[], console=Console(file=written, width=200)
    )
    with view:
        for record in records:
            for line in record.history:
                view.epoch(record.name, record.proposed, line)
            view.ended(record.name, record.state, record.reason, record.epochs_done)
    result = summarize_sweep(directory, started_at=0.0, trust_code=True)
    best = TrainedVAE.load(directory.best).checkpoint
    winner = ranked(records, metrics)[0]
    assert winner.best is not None
    assert (result.best["trial"], best.metrics) == (winner.name, winner.best.metrics)
    assert f"best val/nelbo {best.score:.2f} (trial {winner.name})" in written.getvalue()
    smallest = min(line["val/nelbo"] for record in records if not record.failed for line in record.history)
    assert best.metrics["val/nelbo"] == result.best["metrics"]["val/nelbo"] == smallest


def test_best_evaluates_to_the_winner_s_metrics(directory: SweepDirectory, records: list[TrialRecord]) -> None:
    winner = ranked(records, ["val/nelbo"])[0].best
    assert winner is not None
    copy_checkpoint(winner, directory.best)
    evaluated = TrainedVAE.load(directory.best).evaluate("test", "elbo")
    # float32 sums in another order
    assert evaluated == pytest.approx({key: winner.metrics[key] for key in evaluated}, rel=1e-6)


def test_a_sweep_whose_trials_all_failed_has_no_best(directory: SweepDirectory, tmp_path: Path) -> None:
    failed = small_sweep(tmp_path / "sweep")
    shutil.copytree(directory.trial(FAILED).path, failed.trial(FAILED).path)
    propose(failed, FAILED, **{"objective.beta": 1.0})
    end(failed, FAILED, "failed", REASON, epoch=1)
    result = summarize_sweep(failed, started_at=0.0, trust_code=True)
    assert (result.best, result.num_failed, result.pareto_front) == ({}, 1, [])
    assert not failed.best.exists()
    (row,) = pyarrow.parquet.read_table(failed.leaderboard_parquet).to_pylist()
    assert (row["rank"], row["state"], row["reason"]) == (None, "failed", REASON)
    assert row["val/nelbo"] is not None  # it was good for an epoch, all the same
