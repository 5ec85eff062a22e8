"""Contract and truth: what the next trial tries, and that it is in the journal before the trial starts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.search import Searcher

from tests.tuning import trials
from tests.tuning.trials import settings_of
from vae_ray import Experiment
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.proposals import OptunaProposals, distributions, propose_all
from vae_ray.tuning.records import FAILURES, TrialRecord
from vae_ray.tuning.settings import SweepSettings
from vae_ray.tuning.space import SearchSpace, Values
from vae_ray.tuning.trial import TRIAL

EVERY_KIND = {
    "optim.lr": {"loguniform": [1e-4, 1e-2]},
    "objective.beta": {"uniform": [0, 4]},
    "model.latent_dim": {"int": [2, 17]},
    "optim.warmup_steps": {"logint": [1, 300]},
    "model.network.hidden": {"choice": [[16], [400, 100]]},
    "optim.grad_clip": {"grid": [None, 1, 2.5]},
}
SPACE = SearchSpace.from_dict(EVERY_KIND).checked(Experiment())
FRONT = ("val/rate", "val/distortion")


def settings_for(num_trials: int = 5, *, searcher: str = "optuna", **arguments: Any) -> SweepSettings:
    defaults = {"search": EVERY_KIND, "scheduler": "none", "num_trials": num_trials, "searcher": searcher}
    settings = settings_of(**{**defaults, **arguments})
    return replace(settings, space=settings.space.checked(Experiment()))


def optuna_proposals(
    directory: SweepDirectory, settings: SweepSettings, records: list[TrialRecord], *, seed: int = 0
) -> OptunaProposals:
    return OptunaProposals(directory, settings, seed=seed, records=records, selection_metric="val/nelbo")


@pytest.fixture
def directory(tmp_path: Path) -> SweepDirectory:
    return SweepDirectory(tmp_path)


def record_of(number: int, state: str, metrics: dict[str, float] | None = None) -> TrialRecord:
    return trials.record_of(f"{number:04d}", metrics, state=state, proposed=SPACE.draw(9, number))


def proposed_in(directory: SweepDirectory) -> dict[str, dict[str, Any]]:
    return {entry["trial"]: entry["overrides"] for entry in directory.journal() if entry["event"] == "proposed"}


def results(proposals: OptunaProposals) -> list[tuple[str, list[float] | None]]:
    """State and values of every trial that Optuna knows of and that has ended."""
    return [(trial.state.name, trial.values) for trial in proposals._study.trials if trial.state.is_finished()]


def result(epoch: int, nelbo: float, **metrics: float) -> dict[str, Any]:
    return {"epoch": epoch, "training_iteration": epoch, "val/nelbo": nelbo, **metrics}


# --- the space as Optuna has it -------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(0, 99))
def test_whatever_is_drawn_lies_in_optuna_s_distributions(seed: int, number: int) -> None:
    params = SPACE.draw(seed, number)
    # refuses values that are outside, and other names
    trial = optuna.trial.create_trial(value=0.0, params=params, distributions=distributions(SPACE))
    assert trial.params == params


def test_distributions_have_the_ends_and_scales_of_the_domains() -> None:
    assert distributions(SPACE) == {
        "optim.lr": optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True),
        "objective.beta": optuna.distributions.FloatDistribution(0, 4),
        "model.latent_dim": optuna.distributions.IntDistribution(2, 17),
        "optim.warmup_steps": optuna.distributions.IntDistribution(1, 300, log=True),
        "model.network.hidden": optuna.distributions.CategoricalDistribution(("[16]", "[400, 100]")),
        "optim.grad_clip": optuna.distributions.CategoricalDistribution((None, 1.0, 2.5)),
    }


def test_whatever_optuna_suggests_is_in_the_space(directory: SweepDirectory) -> None:
    proposals = optuna_proposals(directory, settings_for(30), [])
    for number in range(30):  # the first ten are random, then TPE has models
        overrides = dict(suggested(proposals, str(number)))
        assert overrides.pop(TRIAL) == f"{number:04d}"
        for key, domain in SPACE.domains.items():
            if isinstance(domain, Values):
                assert overrides[key] in domain.values
            else:
                assert domain.low <= overrides[key] <= domain.high
                assert domain.rounded(overrides[key]) == overrides[key]
        Experiment().with_overrides(overrides)
        proposals.on_trial_complete(str(number), result(1, overrides["objective.beta"]))


def suggested(proposals: OptunaProposals, trial_id: str) -> dict[str, Any]:
    config = proposals.suggest(trial_id)
    assert isinstance(config, dict)
    return config


# --- one at a time --------------------------------------------------------------------------------------


def test_what_earlier_drivers_left_comes_first_and_new_trials_after(directory: SweepDirectory) -> None:
    records = [record_of(0, "failed"), record_of(1, "pending"), record_of(2, "pending", {"val/nelbo": 3.0})]
    proposals = optuna_proposals(directory, settings_for(4), records)
    assert [suggested(proposals, "a"), suggested(proposals, "b")] == [
        {TRIAL: record.name, **record.proposed} for record in records[1:]
    ]
    assert proposed_in(directory) == {}  # they stand in the journal already
    assert suggested(proposals, "c")[TRIAL] == "0003"
    assert proposals.suggest("d") == Searcher.FINISHED


def test_every_new_proposal_is_in_the_journal_when_it_is_handed_out(directory: SweepDirectory) -> None:
    proposals = optuna_proposals(directory, settings_for(3), [])
    for number in range(3):
        config = suggested(proposals, str(number))
        name = config.pop(TRIAL)
        assert proposed_in(directory)[name] == config
    assert proposals.suggest("3") == proposals.suggest("4") == Searcher.FINISHED
    assert list(proposed_in(directory)) == ["0000", "0001", "0002"]


def test_optuna_learns_the_best_epoch_and_not_the_last(directory: SweepDirectory) -> None:
    proposals = optuna_proposals(directory, settings_for(), [])
    proposals.suggest("a")
    for epoch, nelbo in enumerate((30.0, 20.0, 25.0), start=1):
        proposals.on_trial_result("a", result(epoch, nelbo))
    proposals.on_trial_complete("a", result(3, 25.0))
    assert results(proposals) == [("COMPLETE", [20.0])]


def test_the_last_epoch_counts_though_tune_reports_it_only_with_the_end(directory: SweepDirectory) -> None:
    """Tune calls `on_trial_result` for no epoch at which a trial is done or stopped."""
    proposals = optuna_proposals(directory, settings_for(), [])
    proposals.suggest("a")
    proposals.on_trial_result("a", result(1, 30.0))
    proposals.on_trial_complete("a", result(2, 20.0))
    proposals.suggest("b")
    proposals.on_trial_complete("b", result(1, 40.0))
    assert results(proposals) == [("COMPLETE", [20.0]), ("COMPLETE", [40.0])]


def test_of_two_metrics_optuna_learns_the_epoch_of_the_smallest_nelbo(directory: SweepDirectory) -> None:
    proposals = optuna_proposals(directory, settings_for(metric=FRONT), [])
    proposals.suggest("a")
    for epoch, (rate, distortion) in enumerate([(1.0, 40.0), (6.0, 20.0), (9.0, 18.0)], start=1):
        line = result(epoch, rate + distortion, **{"val/rate": rate, "val/distortion": distortion})
        proposals.on_trial_result("a", line)
    proposals.on_trial_complete("a", line)
    assert results(proposals) == [("COMPLETE", [6.0, 20.0])]
    assert suggested(proposals, "b")[TRIAL] == "0001"


@pytest.mark.parametrize("metric", ["val/nelbo", FRONT], ids=str)
def test_a_trial_that_failed_teaches_nothing_and_stops_nothing(directory: SweepDirectory, metric: Any) -> None:
    """Its numbers were good until it diverged; on the leaderboard it is last all the same."""
    proposals = optuna_proposals(directory, settings_for(metric=metric), [])
    for name in ("a", "b"):
        proposals.suggest(name)
    proposals.on_trial_result("a", result(1, 1.0, **dict.fromkeys(FRONT, 0.5)))
    proposals.on_trial_complete("a", None, error=True)
    proposals.on_trial_complete("b", None, error=True)
    assert [values for state, values in results(proposals) if state == "COMPLETE"] == []
    assert suggested(proposals, "c")[TRIAL] == "0002"


SMALL = {"model.latent_dim": {"choice": [2, 5, 9]}, "optim.warmup_steps": {"choice": [0, 1, 2]}}
"""Nine configurations."""


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("at_once", [1, 9])
def test_optuna_never_tries_a_configuration_twice(directory: SweepDirectory, seed: int, at_once: int) -> None:
    proposals, running = optuna_proposals(directory, settings_for(9, search=SMALL), [], seed=seed), []
    for number in range(9):
        running.append((str(number), suggested(proposals, str(number))))
        if len(running) == at_once:
            for trial_id, config in running:
                proposals.on_trial_complete(trial_id, result(1, float(config["model.latent_dim"])))
            running = []
    assert len({tuple(overrides.values()) for overrides in proposed_in(directory).values()}) == 9
    known = {tuple(t.params.values()): t.values for t in proposals._study.trials if t.state.name == "COMPLETE"}
    assert all(values == [float(latent_dim)] for (latent_dim, _), values in known.items())


def test_optuna_never_tries_again_what_an_earlier_driver_tried(directory: SweepDirectory) -> None:
    space = SearchSpace.from_dict(SMALL)
    tried = [trials.record_of(f"{n:04d}", {"val/nelbo": 1.0}, proposed=each) for n, each in enumerate(space.grid())]
    last = suggested(optuna_proposals(directory, settings_for(9, search=SMALL), tried[:8]), "a")
    assert last == {TRIAL: "0008", **tried[8].proposed}


# --- several seeds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("searcher", ["random", "grid"])
def test_more_seeds_and_configurations_add_exactly_the_missing_trials(
    directory: SweepDirectory, searcher: str, tmp_path: Path
) -> None:
    first = settings_for(None if searcher == "grid" else 3, searcher=searcher, search=SMALL)  # type: ignore[arg-type]
    grown = replace(first, num_trials=first.num_trials + 2 * (searcher == "random"), repeats=3)
    propose_all(directory, first, seed=0)
    before = proposed_in(directory)
    propose_all(directory, grown, seed=0)
    after = proposed_in(directory)
    assert list(after)[: len(before)] == list(before)
    assert len(after) == grown.num_runs == len(directory.journal())
    assert all(after[f"{name}-{repeat}"] == after[name] for name in after if "-" not in name for repeat in (1, 2))
    (tmp_path / "whole").mkdir()
    whole = SweepDirectory(tmp_path / "whole")
    propose_all(whole, grown, seed=0)
    assert proposed_in(whole) == after


def test_optuna_tries_every_seed_of_a_configuration_and_learns_their_mean(directory: SweepDirectory) -> None:
    proposals = optuna_proposals(directory, settings_for(3, repeats=3), [])
    configs = [suggested(proposals, trial_id) for trial_id in "abcd"]
    assert [config.pop(TRIAL) for config in configs] == ["0000", "0000-1", "0000-2", "0001"]
    assert configs[0] == configs[1] == configs[2] != configs[3]
    assert list(proposed_in(directory)) == [f"{number:04d}{end}" for number in range(2) for end in ("", "-1", "-2")]
    for trial_id, nelbo in (("b", 20.0), ("a", 30.0)):
        proposals.on_trial_complete(trial_id, result(1, nelbo))
        assert results(proposals) == [], "a mean over some of the seeds would not compare"
    proposals.on_trial_complete("c", result(1, 25.0))
    assert results(proposals) == [("COMPLETE", [25.0])]
    assert [suggested(proposals, trial_id)[TRIAL] for trial_id in "efghi"] == [
        *("0001-1", "0001-2", "0002", "0002-1", "0002-2")
    ]
    assert proposals.suggest("j") == Searcher.FINISHED
    proposals.on_trial_complete("d", None, error=True)
    for trial_id in "ef":
        proposals.on_trial_complete(trial_id, result(1, 1.0))
    assert results(proposals)[1:] == [("FAIL", None)], "a seed failed"


def test_optuna_continues_with_the_seeds_that_are_missing(directory: SweepDirectory) -> None:
    one = settings_for(2)
    first = optuna_proposals(directory, one, [])
    for number in range(2):
        suggested(first, str(number))
    three = replace(one, repeats=3, num_trials=3)
    propose_all(directory, three, seed=0)
    proposed = proposed_in(directory)
    assert list(proposed) == ["0000", "0001", "0000-1", "0000-2", "0001-1", "0001-2"]
    nelbo = {"0000": 30.0, "0001": 20.0, "0001-1": 21.0, "0001-2": 22.0}
    records = [
        trials.record_of(
            name,
            {"val/nelbo": nelbo[name]} if name in nelbo else None,
            state="finished" if name in nelbo else "pending",
            proposed=proposed[name],
        )
        for name in sorted(proposed)
    ]
    proposals = optuna_proposals(directory, three, records)
    assert results(proposals) == [("COMPLETE", [21.0])]
    assert [suggested(proposals, trial_id) for trial_id in "ab"] == [
        {TRIAL: name, **proposed["0000"]} for name in ("0000-1", "0000-2")
    ]
    assert suggested(proposals, "c")[TRIAL] == "0002"
    for trial_id, value in (("a", 33.0), ("b", 36.0)):
        proposals.on_trial_complete(trial_id, result(1, value))
    assert results(proposals) == [("COMPLETE", [33.0]), ("COMPLETE", [21.0])]


# --- from what is known ---------------------------------------------------------------------------------


@pytest.mark.parametrize("metrics", [("val/nelbo",), FRONT], ids=str)
def test_optuna_knows_the_results_of_earlier_trials(directory: SweepDirectory, metrics: tuple[str, ...]) -> None:
    values = [{"val/nelbo": 10.0 * n, "val/rate": 3.0 * n, "val/distortion": 7.0 * n} for n in range(1, 4)]
    records = [
        record_of(0, "finished", values[0]),
        record_of(1, "stopped", values[1]),
        record_of(2, "pending", values[2]),
        *(record_of(3 + n, state, values[2]) for n, state in enumerate(FAILURES)),
        record_of(6, "finished"),
    ]
    proposals = optuna_proposals(directory, settings_for(9, metric=metrics), records)
    assert results(proposals) == [("COMPLETE", [metrics_[metric] for metric in metrics]) for metrics_ in values[:2]]
    assert [suggested(proposals, name)[TRIAL] for name in "abc"] == ["0002", "0007", "0008"]


@pytest.mark.parametrize("metrics", [("val/nelbo",), FRONT], ids=str)
def test_a_resumed_trial_is_a_result_when_it_ends(directory: SweepDirectory, metrics: tuple[str, ...]) -> None:
    proposals = optuna_proposals(directory, settings_for(metric=metrics), [record_of(0, "pending")])
    proposals.suggest("a")
    line = result(1, 30.0, **{"val/rate": 10.0, "val/distortion": 20.0})
    proposals.on_trial_result("a", line)
    proposals.on_trial_complete("a", line)
    assert results(proposals) == [("COMPLETE", [line[metric] for metric in metrics])]


def test_what_a_trial_did_before_it_was_resumed_counts(directory: SweepDirectory) -> None:
    """Its best checkpoint may be of an epoch that an earlier driver saw."""
    records = [record_of(0, "pending", {"val/nelbo": 20.0})]
    proposals = optuna_proposals(directory, settings_for(), records)
    proposals.suggest("a")
    proposals.on_trial_result("a", result(3, 30.0))
    proposals.on_trial_complete("a", result(4, 25.0))
    assert results(proposals) == [("COMPLETE", [20.0])]


def test_from_one_seed_and_the_same_records_comes_the_same_suggestion(tmp_path: Path) -> None:
    records = [record_of(0, "pending"), record_of(1, "failed")]
    seen = []
    for attempt, (seed, known) in enumerate([(3, records), (3, records), (4, records), (3, records[:1])]):
        (tmp_path / str(attempt)).mkdir()
        proposals = optuna_proposals(SweepDirectory(tmp_path / str(attempt)), settings_for(9), known, seed=seed)
        new = [suggested(proposals, str(n)) for n in range(3)][1:]
        seen.append([{key: value for key, value in config.items() if key != TRIAL} for config in new])
    assert seen[0] == seen[1]
    # another seed goes another way, and so does a later start: it must not repeat suggestions
    assert seen[0] != seen[2]
    assert seen[0][0] not in seen[3]


# --- all at once ----------------------------------------------------------------------------------------


@hypothesis.settings(max_examples=30)  # each waits for the disk
@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 2**32))
def test_more_trials_only_extend_what_was_proposed(
    tmp_path_factory: pytest.TempPathFactory, first: int, more: int, seed: int
) -> None:
    whole, grown = (SweepDirectory(tmp_path_factory.mktemp("proposals")) for _ in range(2))
    propose_all(whole, replace(settings_for(searcher="random"), num_trials=first + more), seed=seed)
    propose_all(grown, replace(settings_for(searcher="random"), num_trials=first), seed=seed)
    before = grown.journal()
    propose_all(grown, replace(settings_for(searcher="random"), num_trials=first + more), seed=seed)
    assert grown.journal()[:first] == before
    assert grown.journal() == whole.journal()
    assert list(proposed_in(whole)) == [f"{number:04d}" for number in range(first + more)]


@pytest.mark.parametrize("seed", range(5))
def test_a_random_search_proposes_every_configuration_once(directory: SweepDirectory, seed: int) -> None:
    search = {"model.latent_dim": {"int": [2, 4]}, "optim.grad_clip": {"grid": [1, 2]}, "optim.lr": {"choice": [0.1]}}
    propose_all(directory, settings_for(6, searcher="random", search=search), seed=seed)
    proposed = [tuple(overrides.values()) for overrides in proposed_in(directory).values()]
    assert len(set(proposed)) == len(proposed) == 6


def test_numbers_that_are_rounded_alike_are_repeated_at_last_and_not_sought_for_ever(directory: SweepDirectory) -> None:
    search = {"optim.lr": {"uniform": [0.1, 0.10001]}}
    propose_all(directory, settings_for(5, searcher="random", search=search), seed=0)
    assert len(proposed_in(directory)) == 5


def test_a_grid_is_proposed_whole_and_in_order(directory: SweepDirectory) -> None:
    search = {"model.latent_dim": {"grid": [2, 5]}, "model.network.hidden": {"choice": [[16], [8, 4], [32]]}}
    grid = settings_for(None, searcher="grid", search=search)  # type: ignore[arg-type]
    propose_all(directory, grid, seed=0)
    assert list(proposed_in(directory).values()) == grid.space.grid()
    propose_all(directory, grid, seed=0)
    assert len(directory.journal()) == 6
