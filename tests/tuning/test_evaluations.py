"""System: the best trials are evaluated once, beside themselves, and their metrics are columns of the leaderboard."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

from tests.report.pages import Page
from tests.tuning.test_sweep_mistakes import own_images
from tests.tuning.trials import end, propose, small_sweep, train_trial
from vae_ray import Experiment, TrainedVAE, UserError
from vae_ray.data.splits import Splits
from vae_ray.errors import CorruptFile
from vae_ray.tuning.directory import SweepDirectory
from vae_ray.tuning.evaluations import evaluate_trials, metric_names, possible_metrics, with_evaluations
from vae_ray.tuning.leaderboard import best_trials
from vae_ray.tuning.records import read_trials
from vae_ray.tuning.summary import summarize_sweep

CPU = torch.device("cpu")
METRICS = ["elbo", "active-units"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, isolated_cache: Path) -> SweepDirectory:
    """Two trials and one that failed."""
    directory = small_sweep(tmp_path_factory.mktemp("evaluated") / "sweep")
    for name, beta, epochs in (("0000", 1.0, 2), ("0001", 0.25, 2), ("0002", 0.5, 1)):
        propose(directory, name, **{"objective.beta": beta})
        train_trial(directory, name, epochs=epochs, **{"objective.beta": beta})
    end(directory, "0002", "failed", "a reason", epoch=1)
    return directory


@pytest.fixture
def directory(built: SweepDirectory, tmp_path: Path) -> SweepDirectory:
    """A copy that a test may change."""
    shutil.copytree(built.path, tmp_path / "sweep")
    return SweepDirectory(tmp_path / "sweep")


def evaluated(directory: SweepDirectory) -> dict[str, dict[str, float]]:
    """What the sweep's files hold of evaluated trials."""
    records = with_evaluations(directory, read_trials(directory))
    return {record.name: dict(record.evaluated) for record in records if record.evaluated}


def evaluate(directory: SweepDirectory, names: list[str] = METRICS, *, num: int = 5) -> list[str]:
    """Evaluate the best trials; the lines that are shown."""
    said: list[str] = []
    records = best_trials(read_trials(directory), ["val/nelbo"], 1, num)
    options: dict[str, Any] = {"split": "val", "device": CPU, "trust_code": False, "say": said.append}
    assert evaluate_trials(directory, records, names, **options) == bool(said)
    return said


def test_the_best_trials_are_evaluated_and_the_others_columns_are_empty(directory: SweepDirectory) -> None:
    best = best_trials(read_trials(directory), ["val/nelbo"], 1, 1)[0]
    assert evaluate(directory, num=1) == [f"trial {best.name}  evaluating elbo, active-units (1 of 1)"]
    expected = TrainedVAE.load(best.run.path).evaluate("val", METRICS)
    assert evaluated(directory) == {best.name: dict(expected)}
    result = summarize_sweep(directory, started_at=0.0, trust_code=True)
    table = pyarrow.parquet.read_table(directory.leaderboard_parquet).to_pylist()
    assert [row["val/active_units"] for row in table] == [expected["val/active_units"], None, None]
    assert table[0]["val/nelbo"] == best.value("val/nelbo"), "what ranks is what training recorded"
    assert result.evaluations == {best.name: {"val/active_units": expected["val/active_units"]}}
    assert result.to_dict()["evaluations"] == result.evaluations
    assert "active_units" in Page(directory.report.read_text()).text("th")


def test_without_evaluations_a_result_has_no_such_key(directory: SweepDirectory) -> None:
    content = summarize_sweep(directory, started_at=0.0, trust_code=True).to_dict()
    assert {"evaluations", "configurations", "verdict"} & content.keys() == set()


def test_what_is_kept_and_unchanged_is_not_evaluated_again(directory: SweepDirectory) -> None:
    assert len(evaluate(directory)) == 2, "the one that failed is left out"
    assert evaluate(directory) == evaluate(directory, ["active-units"]) == []
    assert [line.partition("evaluating ")[2][:6] for line in evaluate(directory, ["rates", *METRICS])] == ["rates "] * 2
    before = evaluated(directory)
    files = [
        entry["file"] for entry in directory.journal() if (entry["trial"], entry.get("metrics")) == ("0000", METRICS)
    ]
    file = directory.trial("0000").path / "evaluations" / files[0]
    file.write_text(file.read_text()[:100])
    assert [line[:10] for line in evaluate(directory)] == ["trial 0000"]
    file.unlink()
    assert [line[:10] for line in evaluate(directory)] == ["trial 0000"]
    assert evaluated(directory) == before


def test_a_metric_of_evaluations_ranks_the_trials_that_have_it(directory: SweepDirectory) -> None:
    metric = "val/linear_probe[label]"
    directory.write_description({**directory.description(), "metrics": [metric]})
    before = summarize_sweep(directory, started_at=0.0, trust_code=True)
    assert (before.best, before.pareto_front) == ({}, ["0000", "0001"]), "nothing is said to be the best"
    assert not directory.best.exists()
    assert "not evaluated by" in "".join(Page(directory.report.read_text()).text("td"))
    assert len(evaluate(directory, ["representation"])) == 2
    assert evaluate(directory, ["representation"]) == []
    result = summarize_sweep(directory, started_at=0.0, trust_code=True)
    accuracy = {name: found[metric] for name, found in evaluated(directory).items()}
    assert accuracy["0000"] != accuracy["0001"]
    order = sorted(accuracy, key=lambda name: -accuracy[name])
    table = pyarrow.parquet.read_table(directory.leaderboard_parquet).to_pylist()
    ranks = [(row["trial"], row["rank"], row[metric]) for row in table]
    assert ranks == [(order[0], 1, accuracy[order[0]]), (order[1], 2, accuracy[order[1]]), ("0002", None, None)]
    assert (result.best["trial"], result.best["metrics"][metric]) == (order[0], accuracy[order[0]])
    best = TrainedVAE.load(directory.best)
    assert best.evaluate("val", "representation")[metric] == accuracy[order[0]]
    page = Page(directory.report.read_text())
    assert f"Trials are ranked by {metric} of their best checkpoint, that of the smallest val/nelbo" in page.html
    assert "; higher is better." in page.html
    assert {point["trial"] for point in page.charts["curves-0"]["data"]["values"]} == {"0000", "0001", "0002"}
    assert page.charts["curves-0"]["layer"][0]["encoding"]["y"]["title"] == "val/nelbo (nats per image)"
    color = page.charts["parallel"]["layer"][0]["encoding"]["color"]
    assert (color["title"], color["scale"]["reverse"]) == (metric, True)
    assert "val/neighbours[label]" not in page.text("th"), "what comes with it is in the files only"


def test_an_evaluation_of_another_checkpoint_does_not_count(directory: SweepDirectory) -> None:
    evaluate(directory)
    record = read_trials(directory)[0]
    assert record.best is not None
    other = {"trial": "0000", "event": "evaluated", "epoch": record.best.epoch + 1, "metrics": ["rates"]}
    (entry,) = (e for e in directory.journal() if e["event"] == "evaluated" and e["trial"] == "0000")
    directory.append_to_journal({**other, "file": entry["file"]})
    assert [line[:10] for line in evaluate(directory, ["rates"])] == ["trial 0000", "trial 0001"]


def test_a_trial_that_cannot_be_evaluated_is_a_warning_and_the_others_go_on(
    directory: SweepDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    record = read_trials(directory)[0]
    assert record.best is not None
    weights = record.best.path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with caplog.at_level(logging.WARNING):
        evaluate(directory)
    assert any(line.startswith("trial 0000: not evaluated (") for line in caplog.messages)
    assert list(evaluated(directory)) == ["0001"]


@pytest.mark.parametrize("file", ["../../../../etc/passwd.json", "/etc/passwd.json", ".hidden.json", "a/b.json", 3])
def test_a_journal_cannot_name_a_file_elsewhere(directory: SweepDirectory, file: object) -> None:
    entry = {"trial": "0000", "event": "evaluated", "epoch": 2, "metrics": ["nll"], "file": file}
    directory.append_to_journal(entry)
    with pytest.raises(CorruptFile, match=r"trials\.jsonl: damaged"):
        read_trials(directory)


# --- before anything starts -----------------------------------------------------------------------------


def test_an_unknown_metric_is_refused() -> None:
    assert metric_names("active-units,nll") == ["nll", "active-units"]
    with pytest.raises(UserError, match="evaluate: got 'nlll', should be among elbo, nll,"):
        metric_names("nlll")


def test_metrics_that_the_images_do_not_allow_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = Experiment.preset("digits")
    splits = Splits.open(digits)
    assert possible_metrics("fid,nll", digits, splits, "train") == ["nll", "fid"]
    with pytest.raises(UserError, match="evaluate: disentanglement needs images with two known factors"):
        possible_metrics(["nll", "disentanglement"], digits, splits, "train")
    every = possible_metrics("all", digits, splits, "train")
    assert "disentanglement" not in every
    assert {"nll", "fid", "precision-recall"} <= {*every}
    unlabelled = own_images(20, tmp_path, monkeypatch)
    with pytest.raises(UserError, match="evaluate: fid, kid and precision-recall need a classifier, but the train"):
        possible_metrics("kid", unlabelled, Splits.open(unlabelled), "train")
