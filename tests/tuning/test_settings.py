"""Contract: which ways of searching work together, and the message for those that do not."""

from typing import Any

import pytest

from tests.tuning.trials import settings_of
from vae_ray import Experiment, UserError
from vae_ray.config.experiment import field_docs
from vae_ray.tuning.metrics import METRICS
from vae_ray.tuning.schedulers import SCHEDULERS
from vae_ray.tuning.settings import DEFAULT_NUM_TRIALS, PBT_KEYS, SEARCHERS
from vae_ray.tuning.space import SearchSpace

LR = {"optim.lr": {"loguniform": [1e-4, 1e-2]}}
GRID = {"model.latent_dim": {"grid": [2, 5, 10]}, "objective.beta": {"choice": [0.5, 2]}}


def test_without_a_choice_asha_stops_trials_of_the_default_space() -> None:
    default = settings_of()
    assert (default.scheduler, default.searcher, default.metrics) == ("asha", "random", ("val/nelbo",))
    assert default.num_trials == DEFAULT_NUM_TRIALS
    assert default.space == SearchSpace.load("default")


def test_pbt_searches_by_default_what_may_change_during_a_trial() -> None:
    default = settings_of(scheduler="pbt")
    assert default.space == SearchSpace.load("optimization")
    assert set(default.space.domains) <= set(PBT_KEYS)


def test_with_two_metrics_every_trial_runs_to_the_end() -> None:
    front = settings_of(metric="val/rate, val/distortion")
    assert (front.scheduler, front.metrics) == ("none", ("val/rate", "val/distortion"))
    assert settings_of(metric=["train/rate", "train/distortion"]).metrics == ("train/rate", "train/distortion")


@pytest.mark.parametrize("metric", ["val/nelbo", "val/rate,val/distortion"])
def test_with_repeats_every_seed_runs_to_the_end(metric: str) -> None:
    repeated = settings_of(metric=metric, num_trials=4, repeats=3)
    assert (repeated.scheduler, repeated.num_trials, repeated.num_runs) == ("none", 4, 12)
    assert repeated.to_dict()["repeats"] == 3
    assert "repeats" not in settings_of(metric=metric).to_dict()
    for scheduler in ("asha", "pbt"):
        with pytest.raises(UserError, match=f"scheduler: got '{scheduler}', with .* use --scheduler none"):
            settings_of(metric=metric, scheduler=scheduler, repeats=2)
    for number in (0, -1, 2.0, True):
        with pytest.raises(UserError, match=r"repeats: got .*, should be a whole number, at least 1"):
            settings_of(metric=metric, repeats=number)


def test_a_grid_has_as_many_trials_as_points() -> None:
    assert settings_of(search=GRID, searcher="grid").num_trials == 6
    assert settings_of(search=GRID, searcher="grid", num_trials=6).num_trials == 6


@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_no_search_has_more_trials_than_there_are_configurations(searcher: str) -> None:
    assert settings_of(search=GRID, searcher=searcher).num_trials == 6
    assert settings_of(search=GRID, searcher=searcher, num_trials=5).num_trials == 5
    with pytest.raises(UserError, match=r"num_trials: got 7, but the space has 6 configurations.*--num-trials 6"):
        settings_of(search=GRID, searcher=searcher, num_trials=7)


def test_the_description_is_plain_data_that_means_the_same_again() -> None:
    first = settings_of(search=LR, metric="val/nelbo", num_trials=5, scheduler="none", searcher="optuna")
    described = first.to_dict()
    described["metric"] = described.pop("metrics")
    assert settings_of(**described) == first


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("searcher", SEARCHERS)
@pytest.mark.parametrize("metric", ["val/nelbo", "val/rate,val/distortion"])
@pytest.mark.parametrize("workers", [1, 2])
def test_every_combination_is_either_kept_or_refused(scheduler: str, searcher: str, metric: str, workers: int) -> None:
    """Never something else in silence."""
    search = {"optim.lr": {"choice": [1e-3, 1e-2]}}
    arguments = {"scheduler": scheduler, "searcher": searcher, "metric": metric, "workers_per_trial": workers}
    works = (scheduler != "pbt" or (workers, searcher) == (1, "random")) and ("," not in metric or scheduler == "none")
    if works:
        kept = settings_of(search=search, **arguments)
        assert (kept.scheduler, kept.searcher, ",".join(kept.metrics)) == (scheduler, searcher, metric)
    else:
        with pytest.raises(UserError):
            settings_of(search=search, **arguments)


@pytest.mark.parametrize("key", PBT_KEYS)
def test_what_pbt_may_change_is_a_real_number_of_the_experiment(key: str) -> None:
    assert {doc.type for doc in field_docs() if doc.key == key} == {"FLOAT"}
    space = settings_of(search={key: {"uniform": [0.1, 0.2]}}, scheduler="pbt").space
    assert space.checked(Experiment()).draw(0, 0)


MISTAKES: list[tuple[str, dict[str, Any], list[str]]] = [
    ("the loss", {"metric": "train/loss"}, ["metric: got 'train/loss'", "smallest beta would win", "val/nelbo"]),
    ("the loss among two", {"metric": "val/rate,val/loss"}, ["metric: got 'val/loss'"]),
    ("a test metric", {"metric": "test/nelbo"}, ["metric: got 'test/nelbo'", "are no test", "val/nelbo"]),
    ("the rate alone", {"metric": "val/rate"}, ["metric: got 'val/rate'", "collapsed", "--metric val/nelbo"]),
    (
        "the distortion alone",
        {"metric": ["train/distortion"]},
        ["metric: got 'train/distortion'", "an autoencoder", "--metric train/rate,train/distortion"],
    ),
    ("an unknown metric", {"metric": "val/nebo"}, ["metric: got 'val/nebo'", "did you mean 'val/nelbo'"]),
    ("no metric", {"metric": ""}, ["metric: got ''", *METRICS]),
    ("an empty list of metrics", {"metric": []}, ["metric: got"]),
    ("three metrics", {"metric": "val/nelbo,val/rate,val/distortion"}, ["metric: got", "two different ones"]),
    ("a metric twice", {"metric": "val/rate,val/rate"}, ["metric: got 'val/rate,val/rate'", "two different ones"]),
    ("an unknown scheduler", {"scheduler": "ashaa"}, ["scheduler: got 'ashaa'", "did you mean 'asha'"]),
    ("a scheduler far from all", {"scheduler": "median"}, ["scheduler: got 'median'", *SCHEDULERS]),
    ("an unknown searcher", {"searcher": "optua"}, ["searcher: got 'optua'", "did you mean 'optuna'"]),
    (
        "asha by two metrics",
        {"scheduler": "asha", "metric": "val/rate,val/distortion"},
        ["scheduler: got 'asha'", "two metrics", "--scheduler none"],
    ),
    (
        "pbt with two workers",
        {"scheduler": "pbt", "workers_per_trial": 2},
        ["pbt needs trials of one worker", "--workers-per-trial 1"],
    ),
    ("pbt with optuna", {"scheduler": "pbt", "searcher": "optuna"}, ["searcher: got 'optuna'", "--searcher random"]),
    (
        "pbt of a network's shape",
        {"scheduler": "pbt", "search": {"model.latent_dim": {"choice": [2, 5]}}},
        ["search: model.latent_dim", "cannot change while a trial runs", *PBT_KEYS, "--scheduler asha"],
    ),
    (
        "pbt of whole numbers",
        {"scheduler": "pbt", "search": {"objective.beta": {"int": [1, 8]}}},
        ["search: objective.beta", "uniform, loguniform or choice"],
    ),
    ("pbt of one", {"scheduler": "pbt", "num_trials": 1}, ["num_trials: got 1", "at least 2"]),
    ("no trials", {"num_trials": 0}, ["num_trials: got 0", "at least 1", "--num-trials 16"]),
    (
        "another number than the grid's",
        {"search": GRID, "searcher": "grid", "num_trials": 5},
        ["num_trials: got 5", "6 points", "--searcher random"],
    ),
    ("a grid of a range", {"search": LR, "searcher": "grid"}, ["search: optim.lr", "a range has no grid"]),
    ("an unknown space", {"search": "defaults"}, ["search: 'defaults' does not exist", "did you mean 'default'"]),
    ("a space that is none", {"search": {"optim.lr": 1}}, ["search: optim.lr: got 1"]),
]


@pytest.mark.parametrize(("arguments", "parts"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_what_cannot_work_is_refused_in_one_line_that_says_what_would(
    arguments: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        settings_of(**arguments)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == []
    assert "\n" not in message
