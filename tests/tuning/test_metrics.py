"""Truth and contract: which values rank trials, in which direction, and why the others do not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import digits_in_this_process
from tests.tuning.trials import record_of, settings_of
from vae_ray import Experiment, TrainedVAE, UserError, train
from vae_ray.data.splits import Splits
from vae_ray.evaluation import table
from vae_ray.evaluation.disentanglement import disentanglement_metrics
from vae_ray.tuning.configurations import verdict
from vae_ray.tuning.evaluations import check_ranking
from vae_ray.tuning.leaderboard import best_trials, ranked, ranked_configurations, rows
from vae_ray.tuning.metrics import (
    EVALUATED,
    REFUSED,
    TERMS,
    checked_metrics,
    curve_metrics,
    evaluated_by,
    higher_is_better,
    value_text,
    without_siblings,
)
from vae_ray.tuning.records import FAILURES, TrialRecord
from vae_ray.tuning.sweep import SweepDirectory

MIG, NLL = "val/mig_locatello", "val/nll"


def trial(name: str, metric: str, value: float | None, *, state: str = "finished", seed: int = 0) -> TrialRecord:
    """One whose nelbo is the larger the better it is by the metric: the two orders are opposite."""
    nelbo = 0.0 if value is None else value if higher_is_better(metric) else -value
    record = record_of(name, {"val/nelbo": nelbo}, state=state, proposed={"optim.lr": 0.1}, history=[{"seconds": 1.0}])
    return replace(record, seed=seed, evaluated={} if value is None else {metric: value})


def names(items: Any) -> list[str]:
    return [item.name for item in items]


# --- which values ---------------------------------------------------------------------------------------


def pixels(images: torch.Tensor) -> torch.Tensor:
    """A feature space that costs nothing."""
    return images.flatten(1)


@pytest.fixture(scope="module")
def every_value(tmp_path_factory: pytest.TempPathFactory, isolated_cache: Path) -> dict[str, set[str]]:
    """What each metric of the table gives: of a hierarchy with 256 levels, and of images with labels and factors."""
    overrides = {
        "model.network": "ladder",
        "model.network.hidden": "8,8",
        "likelihood": "discretized_logistic",
        "training.epochs": 1,
    }
    model = TrainedVAE.load(
        train(digits_in_this_process(tmp_path_factory.mktemp("run")).with_overrides(overrides)).run_dir
    )
    names = [name for name in table.METRICS if name != "disentanglement"]
    space: dict[str, Any] = {"features": "tests.tuning.test_metrics:pixels"}
    found = {}
    for name in names:
        own = space if name in ("fid", "kid", "precision-recall") else {}
        evaluation = model.evaluate("test", name, num_samples=6, num_images=100, **own)
        found[name] = {key.partition("/")[2] for key in evaluation}
    rng = np.random.default_rng(0)
    mean, factors = rng.normal(size=(100, 3)), rng.integers(0, 3, (100, 2))
    given = disentanglement_metrics(mean, factors, seed=0, logvar=0 * mean, z=mean)
    return {**found, "disentanglement": {*given}}


def test_every_value_of_an_evaluation_either_ranks_or_is_refused_with_the_reason(
    every_value: dict[str, set[str]],
) -> None:
    assert every_value.keys() == table.METRICS.keys()
    for metric, values in every_value.items():
        for value in values - {*TERMS}:
            assert evaluated_by(f"val/{value}") == metric, value
            try:
                assert checked_metrics(f"val/{value}") == (f"val/{value}",)
            except UserError as error:
                message = str(error)
                assert message.startswith(f"metric: got 'val/{value}', ")
                assert f"and --evaluate {metric} to see it beside that" in message
                assert "\n" not in message
    labels = {name.partition("[")[0] for values in every_value.values() for name in values}
    listed = {name.partition("[")[0].removesuffix("_K") for name in (*EVALUATED, *REFUSED)}
    assert {name for name in listed if not any(label.startswith(name) for label in labels)} == set(), "names of nothing"


@pytest.mark.parametrize("value", REFUSED)
def test_what_is_named_instead_of_a_refused_value_can_be_chosen(value: str) -> None:
    assert checked_metrics(f"val/{REFUSED[value].instead}")
    assert REFUSED[value].metric in table.METRICS


@pytest.mark.parametrize(
    ("metric", "part"),
    [
        ("test/mig_locatello", "use --metric val/mig_locatello"),
        ("val/mig_locatelo", "did you mean 'val/mig_locatello'?"),
        ("val/kid[classifier, accuracy 0.9]", "its feature space is a classifier that each evaluation trains"),
        ("val/linear_probe", "it is of a label; use --metric val/linear_probe[LABEL]"),
        ("val/linear_probe[label, pca of pixels]", "it is of images, not of a trial"),
        ("train/linear_probe[label]", "fitted to training images; use --metric val/linear_probe[label]"),
        ("val/mig_locatello,val/nelbo", "'val/mig_locatello' among two, but it ranks alone"),
        ("val/nelbo,val/nll", "'val/nll' among two, but it ranks alone; use --metric val/nll"),
    ],
)
def test_what_cannot_rank_is_refused_in_one_line_that_says_what_can(metric: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        settings_of(metric=metric)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_code_that_knows_one_factor_alone_has_all_of_dci_disentanglement() -> None:
    """The reason for which it is refused; what is allowed sees the factors that are missing."""
    rng = np.random.default_rng(0)
    factors = rng.integers(0, [3, 6, 8], (2000, 3))
    one, every = np.where(np.arange(3) == 1, factors, 0.0), factors.astype(float)
    poor, good = (disentanglement_metrics(codes, factors, seed=0) for codes in (one, every))
    assert poor["dci_disentanglement"] == pytest.approx(1)
    allowed = [name for name in EVALUATED if evaluated_by(f"val/{name}") == "disentanglement" and name in poor]
    assert [name for name in allowed if not poor[name] < good[name] - 0.1] == []


def test_evaluated_metrics_rank_when_all_trials_have_ended() -> None:
    chosen = settings_of(metric=MIG, num_trials=4, repeats=2)
    assert (chosen.scheduler, chosen.metrics, chosen.to_dict()["metrics"]) == ("none", (MIG,), [MIG])
    for scheduler in ("asha", "pbt"):
        with pytest.raises(
            UserError, match=rf"scheduler: got '{scheduler}', but {MIG} is known only .* --scheduler none"
        ):
            settings_of(metric=MIG, scheduler=scheduler)
    with pytest.raises(UserError, match=r"searcher: got 'optuna', but .* use --searcher random or grid"):
        settings_of(metric=MIG, searcher="optuna")


def test_images_that_do_not_allow_the_metric_are_refused_before_anything_starts() -> None:
    digits = Experiment.preset("digits").with_overrides({"data.num_validation": 100})
    splits = Splits.open(digits)
    check_ranking("val/linear_probe[label]", digits, splits)
    check_ranking(NLL, digits, splits)
    with pytest.raises(UserError, match=r"metric: got 'val/sap', but disentanglement needs images with two known fac"):
        check_ranking("val/sap", digits, splits)
    with pytest.raises(UserError, match=r"\[lable\]', but these images have no such label; use one of label$"):
        check_ranking("val/linear_probe[lable]", digits, splits)
    conditional = digits.with_overrides({"model.condition": "label", "model.num_classes": 10})
    with pytest.raises(
        UserError, match=r"but representation needs images with labels, these have none besides 'label'"
    ):
        check_ranking("val/linear_probe[label]", conditional, splits)


def test_a_validation_split_with_too_few_images_for_the_factors_is_refused() -> None:
    sprites = Experiment.preset("sprites").with_overrides(
        {"data.stride": [1, 3, 40, 2, 8], "data.num_validation": 159, "data.image_size": 32}
    )
    with pytest.raises(UserError, match=rf"metric: got '{MIG}', but images: got 159, should be 160 or more for the 16"):
        check_ranking(MIG, sprites, Splits.open(sprites))
    enough = sprites.with_overrides({"data.num_validation": 160})
    check_ranking(MIG, enough, Splits.open(enough))


# --- the order ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [f"val/{value}" for value in EVALUATED])
@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), max_size=6))
def test_trials_are_ranked_in_the_direction_of_the_metric_and_ties_by_name(metric: str, values: list[float]) -> None:
    records = [trial(f"{number:04d}", metric, value) for number, value in enumerate(values)]
    sign = 1 if metric == NLL else -1
    order = sorted((sign * value, f"{number:04d}") for number, value in enumerate(values))
    assert names(ranked(records, [metric])) == [name for _, name in order]


def test_trials_that_failed_or_were_not_evaluated_have_no_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed = [trial(f"{number:04d}", MIG, 0.9, state=state) for number, state in enumerate(FAILURES)]
    records = [*failed, trial("0007", MIG, None), trial("0008", MIG, 0.2), trial("0009", MIG, 0.4)]
    assert names(best_trials(records, [MIG], 1, 5)) == ["0009", "0008"]
    table = rows(records, [MIG], SweepDirectory(Path()))
    assert [(row["trial"], row["rank"]) for row in table[:3]] == [("0009", 1), ("0008", 2), ("0000", None)]
    (row,) = (row for row in table if row["trial"] == "0007")
    assert (row["rank"], row[MIG], row["reason"]) == (None, None, f"not evaluated by {MIG}; --resume tries it again")


def test_configurations_are_ranked_by_the_means_of_evaluations_and_those_that_miss_one_come_last() -> None:
    values = {"0000": (0.1, 0.3), "0001": (0.5, 0.4), "0002": (0.9, None), "0003": (None, None)}
    records = [
        trial(f"{name}-{seed}" if seed else name, MIG, value, seed=seed)
        for name, both in values.items()
        for seed, value in enumerate(both)
    ]
    order = ranked_configurations(records, [MIG], 2)
    assert names(order) == ["0001", "0000", "0002", "0003"]
    assert [each.state for each in order] == ["complete", "complete", "1 of 2 seeds", "0 of 2 seeds"]
    assert [each.reason for each in order[2:]] == ["seed 1 not evaluated", "seed 0 not evaluated; seed 1 not evaluated"]
    assert names(order[0].measured) == ["0001", "0001-1"], "the best seed is the one of the largest value"
    assert names(order[1].measured) == ["0000-1", "0000"]
    assert verdict(order, [MIG])[0].startswith(f"{MIG} of 0001 is 0.25 higher than that of 0000 (mean of 2 seeds")


def test_values_are_read_with_their_own_digits_and_units() -> None:
    assert [value_text(MIG, 0.41234), value_text("val/nelbo", 1234.56), value_text(NLL, 99.5)] == [
        "0.412",
        "1234.6",
        "99.50",
    ]
    assert value_text(MIG, None) == "–"
    assert value_text("val/bits_per_dim", 3.14159) == "3.142"
    assert curve_metrics([MIG]) == ["val/nelbo"]
    assert curve_metrics(["val/rate", "val/distortion"]) == ["val/rate", "val/distortion"]
    columns = [MIG, "val/sap", NLL, "val/active_units"]
    assert without_siblings(columns, [MIG]) == [MIG, NLL, "val/active_units"]
    assert without_siblings(columns, ["val/nelbo"]) == columns
