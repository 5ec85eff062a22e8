"""Contract: every entry of the registry can be run and says what it needs to; docs/results.md is what was kept."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from tests.linear_gaussian import Moments, principal_components
from vae_ray.data.splits import Splits
from vae_ray.evaluation.table import METRICS, chosen
from vae_ray.reproduction.outcome import kept_outcomes
from vae_ray.reproduction.page import page
from vae_ray.reproduction.registry import EPOCHS, Entry, Stage, Target, all_entries, entry_names, load_entry
from vae_ray.storage.reading import parse_yaml

DOCS = Path(__file__).parents[2] / "docs"
VALUES = {
    "elbo": ("nelbo", "distortion", "rate"),
    "nll": ("nll",),
    "aggregated-posterior": ("mutual_information", "marginal_kl", "total_correlation", "prior_overlap"),
    "disentanglement": ("mig_chen", "mig_locatello", "sap"),
}
"""Some values of metrics, by the names that targets may use."""
STAGES = [(entry, stage) for entry in all_entries() for stage in entry.stages]
EVERY_STAGE = pytest.mark.parametrize(
    ("entry", "stage"), STAGES, ids=[f"{entry.name}-{entry.stages.index(stage) + 1}" for entry, stage in STAGES]
)


def test_the_registry_has_what_the_issue_asks_for() -> None:
    asked_for = {"notebook", "pytorch-example", "probabilistic-pca", "vampprior", "beta-tc"}
    assert asked_for | {f"iwae-k{k}" for k in (1, 5, 50)} <= set(entry_names())


@EVERY_STAGE
def test_every_stage_builds_its_experiments_with_names_of_their_own(entry: Entry, stage: Stage) -> None:
    experiments = [entry.experiment(stage, run, seed) for run in entry.runs for seed in (0, 1)]
    assert len({each.run.name for each in experiments}) == 2 * len(entry.runs)
    assert {each.run.seed for each in experiments} == {0, 1}
    # at the last epoch the values are those of the last checkpoint: a run that stops early has other ones
    assert all(each.training.patience_epochs is None and each.training.ema_decay is None for each in experiments)


@EVERY_STAGE
def test_every_target_is_measured(entry: Entry, stage: Stage) -> None:
    splits = [evaluation.split for evaluation in stage.evaluations]
    assert len(set(splits)) == len(splits)
    by_split = {
        evaluation.split: {value for name in chosen(evaluation.metrics) for value in VALUES[name]}
        for evaluation in stage.evaluations
    }
    assert VALUES.keys() <= METRICS.keys()
    for target in stage.targets:
        assert {target.run, target.minus} - {None} <= entry.runs.keys()
        split, _, value = target.metric.partition("/")
        if target.epoch is None:
            assert value in by_split[split]
        else:
            assert target.metric == "train/nelbo"
            assert target.epoch <= entry.experiment(stage, target.run, 0).training.epochs


@EVERY_STAGE
def test_stages_that_continue_each_other_do_not_change_what_was_trained(entry: Entry, stage: Stage) -> None:
    """A schedule over all epochs of a run is another one if there are more."""
    if len(entry.stages) > 1 and stage.continues:
        schedules = {entry.experiment(stage, run, 0).optim.schedule.name for run in entry.runs}
        assert schedules <= {"constant", "step"}
        epochs = [each.overrides[EPOCHS] for each in entry.stages if each.continues]
        assert epochs == sorted(set(epochs))


@pytest.mark.parametrize("entry", all_entries(), ids=lambda entry: entry.name)
def test_the_published_stage_has_references_with_their_reasons(entry: Entry) -> None:
    assert all(len(text) > 20 for text in (entry.title, entry.source, entry.protocol))
    assert not any("://" in text for text in (entry.source, entry.protocol, entry.notes))
    references = [target for stage in entry.stages for target in stage.targets if target.reference is not None]
    assert any(target in entry.stages[-1].targets for target in references)
    assert all(target.why for target in references)


def test_minutes_of_stages_are_those_of_the_longest_that_is_continued_and_of_the_others() -> None:
    iwae = load_entry("iwae-k1")
    assert iwae.minutes(iwae.chosen_stages("5,6")) == iwae.stages[5].minutes
    vamp = load_entry("vampprior")
    assert vamp.minutes(list(vamp.stages)) == sum(stage.minutes for stage in vamp.stages)


def test_the_page_is_what_the_kept_results_say_and_has_every_entry() -> None:
    outcomes = {entry.name: kept_outcomes(entry, str(DOCS / "results")) for entry in all_entries()}
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    again = "vae-ray reproduce --results docs/results --page docs/results.md"
    assert text == page(all_entries(), outcomes), f"render it with: {again}"
    assert [entry.name for entry in all_entries() if f"\n## {entry.name}\n" not in text] == []
    stages = {name: {outcome.stage for outcome in found} for name, found in outcomes.items()}
    for entry in all_entries():
        last = entry.stages[-1]
        assert len(entry.stages) in stages[entry.name] or last.not_run, f"{entry.name}: why was it not run?"


def test_the_example_of_the_docs_is_an_entry() -> None:
    (example,) = re.findall(r"^```yaml\n(.*?)^```", (DOCS / "reproduce.md").read_text(encoding="utf-8"), re.M | re.S)
    entry = Entry.model_validate({"name": "example", **parse_yaml(example.encode())})
    assert entry.experiment(entry.stages[0], "vamp", 3).model.prior.name == "vamp"
    written = set(re.findall(r"(\w+):", example))
    assert (Entry.model_fields.keys() | Stage.model_fields.keys() | Target.model_fields.keys()) - written == {"name"}


@pytest.mark.mnist
def test_the_references_of_probabilistic_pca_are_the_closed_form(mnist_root: Path) -> None:
    entry = load_entry("probabilistic-pca")
    experiment = entry.experiment(entry.stages[0], "", 0).with_overrides({"data.root": str(mnist_root)})
    splits = Splits.open(experiment).dataset.splits
    moments = {name: Moments.of(split.first(len(split)).flatten(1).double() / 255) for name, split in splits.items()}
    optimum = principal_components(moments["train"], experiment.model.latent_dim)
    assert math.sqrt(optimum.variance) == pytest.approx(0.18673, abs=1e-5)
    exact = {name: optimum.mean_log_evidence(each) for name, each in moments.items()}
    for target in entry.stages[0].targets:
        assert target.reference == pytest.approx(-exact[target.metric.partition("/")[0]], abs=6e-4)
