"""Truth: means, intervals and paired differences over seeds against scipy, and the ranking of configurations."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tests.tuning.trials import record_of
from vae_ray import Experiment
from vae_ray.tuning.configurations import Configuration, Difference, configurations, difference, t_interval, verdict
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.leaderboard import ranked_configurations, ranked_trials, rows, write_leaderboard
from vae_ray.tuning.records import FAILURES, TrialRecord, configuration_of, repeat_of, trial_experiment, trial_name
from vae_ray.tuning.sweep import _difference

NELBO = ("val/nelbo",)
FRONT = ("val/rate", "val/distortion")
FIRST_SEED = 7
nats = st.floats(-1e3, 1e3).map(lambda value: round(value, 3))


def seed_of(
    number: int, repeat: int, nelbo: float | None, *, state: str = "finished", rate: float = 1.0, reason: str = ""
) -> TrialRecord:
    """The trial of a configuration by one seed."""
    metrics = None if nelbo is None else {"val/nelbo": nelbo, "val/rate": rate, "val/distortion": nelbo - rate}
    name, proposed = trial_name(number, repeat), {"model.latent_dim": 2 + number}
    record = record_of(name, metrics, state=state, proposed=proposed, history=[{"seconds": 1.5}])
    return TrialRecord(**{**vars(record), "seed": FIRST_SEED + repeat, "reason": reason})


def sweep_of(values: Sequence[Sequence[float | None]]) -> list[TrialRecord]:
    """Trials by configuration and seed; one without a value failed."""
    return [
        seed_of(number, repeat, value, state="failed" if value is None else "finished")
        for number, of_seeds in enumerate(values)
        for repeat, value in enumerate(of_seeds)
    ]


def evaluated(records: Sequence[TrialRecord], found: dict[str, dict[str, float]]) -> list[TrialRecord]:
    """The trials with what evaluations of them found, by name."""
    return [replace(record, evaluated=found.get(record.name, {})) for record in records]


def names(items: Sequence[Any]) -> list[str]:
    return [item.name for item in items]


# --- intervals ------------------------------------------------------------------------------------------


@given(st.lists(nats, min_size=2, max_size=12).filter(lambda values: len(set(values)) > 1))
def test_the_interval_is_student_s(values: list[float]) -> None:
    reference = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert t_interval(values) == pytest.approx((reference.low, reference.high), rel=1e-9, abs=1e-9)


def test_one_value_has_no_interval_and_equal_ones_an_empty_one() -> None:
    assert t_interval([]) is t_interval([3.0]) is None
    assert t_interval([3.0, 3.0]) == (3.0, 3.0)
    # by hand: mean 2, s = sqrt(2), t(0.975; 1) = 12.706
    assert t_interval([1.0, 3.0]) == pytest.approx((2 - 12.706, 2 + 12.706), abs=1e-3)


pairs = st.lists(st.tuples(nats, nats), min_size=2, max_size=9)


@given(pairs.filter(lambda values: len({round(b - a, 6) for a, b in values}) > 1))
def test_the_difference_is_the_paired_one_of_student(values: list[tuple[float, float]]) -> None:
    first, second = configurations(sweep_of(list(zip(*values, strict=True))), NELBO, len(values))
    found, test = difference(first, second, "val/nelbo"), stats.ttest_rel(*zip(*values, strict=True))
    low, high = (-end for end in test.confidence_interval(0.95))  # scipy's is first - second
    assert found is not None
    assert found.num_seeds == len(values)
    assert found.mean == pytest.approx(sum(b - a for a, b in values) / len(values), abs=1e-9)
    assert found.interval == pytest.approx((high, low), rel=1e-6, abs=1e-6)


def test_only_seeds_that_both_have_are_paired() -> None:
    first, second = configurations(sweep_of([(1.0, None, 5.0), (None, 3.0, 7.5)]), NELBO, 3)
    assert difference(first, second, "val/nelbo") == Difference(2.5, None, 1)
    alone, other = configurations(sweep_of([(1.0, None), (None, 3.0)]), NELBO, 2)
    assert difference(alone, other, "val/nelbo") is None


# --- ranking --------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(nats, nats, nats), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_configurations_are_ranked_by_their_means(values: list[tuple[float, ...]], random: Any) -> None:
    order = ranked_configurations(sweep_of(values), NELBO, 3)
    means = [each.value("val/nelbo") for each in order]
    assert means == sorted(sum(of_seeds) / 3 for of_seeds in values) or means == pytest.approx(
        sorted(sum(of_seeds) / 3 for of_seeds in values), abs=1e-9
    )
    trials = ranked_trials(sweep_of(values), NELBO, 3)
    assert [configuration_of(name) for name in names(trials)[::3]] == names(order)
    assert trials[0].score == min(record.score for record in order[0].records)


@pytest.mark.parametrize("state", [*FAILURES, "pending"])
def test_a_configuration_without_all_seeds_is_behind_complete_ones_and_says_so(state: str) -> None:
    """A seed that failed had good values until then; one that is not done may become better."""
    records = [
        *(seed_of(0, 0, 1.0), seed_of(0, 1, 0.5, state=state, reason="out of memory")),
        *(seed_of(1, 0, 90.0), seed_of(1, 1, 80.0, state="stopped")),
        *(seed_of(2, 0, None, state="failed"), seed_of(2, 1, None, state="failed")),
        *(seed_of(3, 0, 70.0), seed_of(3, 1, 95.0)),
    ]
    order = ranked_configurations(records, NELBO, 2)
    assert names(order) == ["0003", "0001", "0000", "0002"]
    assert [each.state for each in order] == ["complete", "complete", "1 of 2 seeds", "0 of 2 seeds"]
    assert [each.value("val/nelbo") for each in order] == [82.5, 85.0, 1.0, None]
    assert [each.interval("val/nelbo") is None for each in order] == [False, False, True, True]
    assert order[2].reason == f"seed 8 {state}: out of memory"
    assert order[3].reason == "seed 7 failed; seed 8 failed"


def test_the_front_is_that_of_the_means() -> None:
    """By single seeds 0000 would be on the front twice: its points are the extremes of the plane."""
    points = {0: [(0.0, 40.0), (40.0, 0.0)], 1: [(10.0, 10.0), (12.0, 12.0)], 2: [(5.0, 30.0), (5.0, 20.0)]}
    records = [
        seed_of(number, repeat, rate + distortion, rate=rate)
        for number, of_seeds in points.items()
        for repeat, (rate, distortion) in enumerate(of_seeds)
    ]
    order = ranked_configurations(records, FRONT, 2)
    assert names(order) == ["0001", "0002", "0000"]
    table = rows(records, FRONT, SweepDirectory(Path()), 2)
    assert [row["pareto_front"] for row in table] == [True, True, False]


# --- the leaderboard ------------------------------------------------------------------------------------


def test_a_row_has_mean_interval_and_the_value_of_each_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the records' directories are
    found = {"0000": {"val/nll": 1.0}, "0000-1": {"val/nll": 2.0}, "0001": {}}
    records, directory = evaluated(sweep_of([(31.0, 33.0, 32.0), (30.0, None, 29.0)]), found), SweepDirectory(Path())
    table = rows(records, NELBO, directory, 3)
    first, second = table
    low, high = t_interval([31.0, 33.0, 32.0]) or (0.0, 0.0)
    assert list(first.items())[:9] == [
        *(("rank", 1), ("configuration", "0000"), ("state", "complete"), ("seeds", 3)),
        *(("val/nelbo", 32.0), ("val/nelbo_low", low), ("val/nelbo_high", high)),
        *(("val/nelbo_seed_7", 31.0), ("val/nelbo_seed_8", 33.0)),
    ]
    assert (first["val/rate"], first["val/distortion"], first["seconds"]) == (1.0, 31.0, 4.5)
    assert (first["trial"], first["checkpoint"], first["reason"]) == ("0000", "0000/checkpoints/epoch=0003", "")
    assert (second["rank"], second["state"], second["reason"]) == (2, "2 of 3 seeds", "seed 8 failed")
    assert (second["val/nelbo"], second["val/nelbo_seed_8"], second["trial"]) == (29.5, None, "0001-2")
    assert first["val/nll"] is None, "a mean over two of three seeds would not compare"
    write_leaderboard(table, directory)
    assert pyarrow.parquet.read_table(directory.leaderboard_parquet).to_pylist() == table
    assert pyarrow.csv.read_csv(directory.leaderboard_csv)["val/nelbo"].to_pylist() == [32.0, 29.5]


def test_evaluated_metrics_are_means_over_the_seeds() -> None:
    found = {name: {"val/nll": value, "val/nelbo": -1.0} for name, value in (("0000", 1.0), ("0000-1", 2.0))}
    records = evaluated(sweep_of([(31.0, 33.0), (40.0, 41.0)]), found)
    table = rows(records, NELBO, SweepDirectory(Path()), 2)
    assert [row["val/nll"] for row in table] == [1.5, None]
    assert table[0]["val/nelbo"] == 32.0, "what ranks is what training recorded"


# --- in plain words -------------------------------------------------------------------------------------


def verdict_of(*values: Sequence[float | None], metrics: Sequence[str] = NELBO) -> list[str]:
    return verdict(ranked_configurations(sweep_of(values), metrics, len(values[0])), metrics)


def test_what_is_said_of_a_difference_is_careful() -> None:
    sure = verdict_of((30.0, 31.0, 32.0, 33.0), (40.0, 41.5, 42.0, 43.5))
    assert sure[0] == (
        "val/nelbo of 0000 is 10.2 nats lower than that of 0001 (mean of 4 seeds, paired; 95 % interval 9.79 to 10.7, "
        "which does not contain 0)."
    )
    assert sure[1].startswith("An interval of 4 seeds says little")
    unsure = verdict_of((30.0, 31.0), (29.0, 35.0))
    assert "which contains 0: these seeds do not tell the two apart" in unsure[0]
    assert unsure[1].startswith("An interval of 2 seeds says little")
    for lines in (sure, unsure):
        assert lines[-1].startswith("The best of 2 configurations looks better than it is")
        assert "significant" not in " ".join(lines)


def test_of_one_seed_nothing_is_concluded_and_of_many_the_warning_is_gone() -> None:
    one = verdict_of((30.0, None), (40.0, None))
    assert one[0].endswith("by one seed: that says nothing about chance.")
    assert "interval" not in one[0]
    assert "have no seed in common" in verdict_of((30.0, None), (None, 40.0))[0]
    many = verdict_of([float(n) for n in range(10)], [n + 5.0 + n % 2 for n in range(10)])
    assert [line.startswith("An interval") for line in many] == [False, False]
    assert verdict_of((30.0, 31.0)) == verdict_of((30.0, 31.0), (None, None)) == []


def test_with_two_metrics_each_has_its_difference() -> None:
    lines = verdict_of((30.0, 31.0), (30.0, 31.5), metrics=FRONT)
    assert [line.partition(" of ")[0] for line in lines[:2]] == ["val/rate", "val/distortion"]


# --- seeds ----------------------------------------------------------------------------------------------


@given(st.integers(0, 20_000), st.integers(0, 200))
def test_a_name_says_which_configuration_and_which_seed(number: int, repeat: int) -> None:
    name = trial_name(number, repeat)
    assert (configuration_of(name), repeat_of(name)) == (trial_name(number), repeat)
    assert configuration_of(configuration_of(name)) == configuration_of(name)


def test_seeds_follow_the_experiment_s_and_the_images_stay() -> None:
    base = Experiment.preset("digits").with_overrides({"run.seed": 5, "data.num_validation": 100})
    own = {"model.latent_dim": 3}
    every = [trial_experiment(base, "/sweep", trial_name(2, repeat), own) for repeat in range(3)]
    assert [each.run.seed for each in every] == [5, 6, 7]
    assert [each.split_seed for each in every] == [5, 5, 5]
    assert every[0].data == base.data, "the first is the trial of a sweep without repeats"
    place = {"run.name": "0002", "run.seed": 5, "data.split_seed": "auto"}
    assert {each.with_overrides(place).to_yaml() for each in every} == {every[0].to_yaml()}


def test_a_sweep_is_extended_by_more_seeds_and_never_shortened() -> None:
    content = {"experiment": Experiment().to_dict(), "search": {}, "metrics": [*NELBO], "scheduler": "none"}
    one = {**content, "searcher": "grid", "num_trials": 4, "fingerprints": {}}
    three = {**one, "repeats": 3}
    assert _difference(one, three) == _difference(three, three) == []
    assert _difference(three, one) == ["repeats: 3 -> 1"]
    assert _difference(three, {**three, "num_trials": 5}) == ["num_trials: 4 -> 5"], "the grid has its size"
    assert _difference({**one, "searcher": "random"}, {**three, "searcher": "random", "num_trials": 5}) == []


def test_a_configuration_s_trials_are_in_the_order_of_their_seeds() -> None:
    (each,) = configurations([seed_of(0, repeat, 40.0 - repeat) for repeat in range(12)], NELBO, 12)
    assert isinstance(each, Configuration)
    assert list(each.values("val/nelbo")) == list(range(FIRST_SEED, FIRST_SEED + 12))
    assert each.measured[0].seed == FIRST_SEED + 11
