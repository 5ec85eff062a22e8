"""System: `vae-ray reproduce` with entries of its own, a few epochs of the digits: costs first, nothing done twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from vae_ray import TrainedVAE
from vae_ray.cli.main import main
from vae_ray.reproduction import measurement, registry
from vae_ray.reproduction.outcome import Obtained
from vae_ray.storage.records import verify

COMMON = """
source: this test
protocol: digits, grey levels, Bernoulli, nats
preset: digits
overrides:
  model: {network: {name: mlp, hidden: [16]}, latent_dim: 3, prior: standard}
  likelihood: bernoulli
  training.global_batch_size: 128
"""
TINY = f"""
title: A tiny VAE
{COMMON}
  optim.schedule: constant
stages:
  - what: one epoch
    overrides: {{training.epochs: 1}}
    evaluations: [{{metrics: "elbo,nll", num_samples: 20, num_images: 100}}]
    minutes: 0.1
    cost: measured
    targets: [{{metric: test/nll}}, {{metric: train/nelbo, epoch: 1, reference: 40, tolerance: 30}}]
  - what: two epochs
    overrides: {{training.epochs: 2}}
    evaluations: [{{metrics: elbo}}]
    minutes: 200
    cost: estimated
    targets: [{{metric: test/nelbo, reference: 1000, tolerance: 1, why: wrong on purpose}}]
"""
PAIR = f"""
title: Two and five dimensions
{COMMON}
runs:
  two: {{model.latent_dim: 2}}
  five: {{model.latent_dim: 5}}
stages:
  - what: three epochs
    overrides: {{training.epochs: 3, optim.lr: 5.0e-3}}
    evaluations: [{{metrics: "elbo,active-units"}}]
    minutes: 0.1
    cost: measured
    targets:
      - {{metric: test/nelbo, run: five}}
      - {{metric: test/nelbo, run: five, minus: two, reference: 1000, side: below}}
"""
Run = Callable[..., tuple[int, Any, str]]


@pytest.fixture(autouse=True)
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "entries"
    directory.mkdir()
    (directory / "tiny.yaml").write_text(TINY)
    (directory / "pair.yaml").write_text(PAIR)
    monkeypatch.setattr(registry, "ENTRY_DIR", directory)
    monkeypatch.chdir(tmp_path)
    return directory


@pytest.fixture
def reproduce(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command; its exit code, its answer and what it wrote to stderr."""

    def run(*arguments: str) -> tuple[int, Any, str]:
        on_workers = ["--workers.num", "0"] if arguments and not arguments[0].startswith("--") else []
        code = main(["reproduce", *arguments, *on_workers, "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else None, err

    return run


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the runs that `train` is called for, and "NAME SPLIT" of evaluations."""
    calls: list[str] = []
    train, evaluate = measurement.train, TrainedVAE.evaluate

    def recorded_train(experiment: Any, **options: Any) -> Any:
        calls.append(f"train {experiment.run.name} {experiment.training.epochs}")
        return train(experiment, **options)

    def recorded_evaluate(self: TrainedVAE, split: Any = "test", metrics: Any = "elbo", **options: Any) -> Any:
        if options:  # not of `train` itself
            calls.append(f"evaluate {metrics}")
        return evaluate(self, split, metrics, **options)

    monkeypatch.setattr(measurement, "train", recorded_train)
    monkeypatch.setattr(TrainedVAE, "evaluate", recorded_evaluate)
    return calls


def test_the_list_says_what_it_costs_and_what_is_kept(reproduce: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce"]) == 0
    text = capsys.readouterr().out
    assert "tiny: A tiny VAE" in text
    assert "about 3 hours (estimated)" in text
    assert "kept result" not in text
    reproduce("tiny", "--stages", "1")
    code, answer, _ = reproduce()
    assert code == 0
    kept = {entry["name"]: len(entry["outcomes"]) for entry in answer["entries"]}
    assert kept == {"pair": 0, "tiny": 1}


def test_the_cost_is_said_first_and_the_values_are_those_of_the_run(reproduce: Run) -> None:
    code, answer, err = reproduce("tiny", "--stages", "1")
    assert code == 0
    assert err.splitlines()[0] == "vae-ray: tiny, stage 1 of 2: about 1 minute on two CPU cores"
    run = Path("runs/reproductions/tiny/seed-0")
    (outcome,) = answer["outcomes"]
    nll, nelbo = outcome["obtained"]
    table = pq.read_table(next((run / "evaluations").glob("*.parquet")))
    assert nll["value"] == pytest.approx(np.mean(table["nll"]), rel=1e-12)
    assert nll["half_width"] == pytest.approx(np.std(table["nll"], ddof=1) / 10, rel=1e-9)
    assert (nll["over"], nll["is_reproduced"]) == ("images", None)
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert nelbo["value"] == record["train/nelbo"]
    assert nelbo["is_reproduced"] is True
    assert outcome["training_seconds"] == pytest.approx(record["seconds"])
    assert outcome["command"] == "vae-ray reproduce tiny --stages 1"
    kept = verify(json.loads(Path("runs/reproductions/tiny-stage-1.json").read_text()))
    assert kept == outcome


def test_outside_of_the_tolerance_is_exit_code_1_and_said(reproduce: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "tiny", "--workers.num", "0"]) == 1
    text = capsys.readouterr().out
    assert "reference 1,000.00 nats, ± 1; obtained" in text
    assert "below the reference, outside of the tolerance of 1" in text


def test_nothing_is_done_twice_and_a_later_stage_continues(reproduce: Run, trained: list[str]) -> None:
    reproduce("tiny", "--stages", "1")
    assert trained == ["train seed-0 1", "evaluate elbo,nll"]
    _, first, _ = reproduce("tiny", "--stages", "1")
    assert trained == ["train seed-0 1", "evaluate elbo,nll"]
    reproduce("tiny", "--stages", "1..2")
    assert trained[2:] == ["train seed-0 2", "evaluate elbo"]
    assert len(Path("runs/reproductions/tiny/seed-0/metrics.jsonl").read_text().splitlines()) == 2
    _, again, err = reproduce("tiny", "--stages", "1")  # of which the evaluation is kept, although the run goes beyond
    assert len(trained) == 4
    assert again == first
    assert "1 of 1 runs are already trained and evaluated" in err


def test_an_earlier_stage_of_a_longer_run_is_refused_before_anything_starts(reproduce: Run) -> None:
    reproduce("tiny", "--stages", "2")
    code, _, err = reproduce("tiny", "--stages", "1")
    assert code == 2
    assert "--stages: " in err.splitlines()[-1]
    assert "already has 2 epochs, and no evaluation after 1 was kept; choose a later stage" in err


def test_a_command_interrupted_between_training_and_evaluation_trains_no_finished_run_again(
    reproduce: Run, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(measurement, "keep", _interrupt)
        code, _, err = reproduce("pair")
    assert code == 130
    assert "continue with: the same command, which trains no finished run again" in err
    assert not Path("runs/reproductions/pair.json").exists()
    _, answer, _ = reproduce("pair")
    assert answer["outcomes"][0]["obtained"][1]["is_reproduced"] is True
    # the call for the run that had finished finds it finished
    assert trained == ["train stage-1-two-seed-0 3", "evaluate elbo,active-units"] * 2 + [
        "train stage-1-five-seed-0 3",
        "evaluate elbo,active-units",
    ]


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


class Interrupt:
    """A callback that sends Ctrl-C at the end of the third epoch."""

    def epoch_ended(self, record: dict[str, Any], decode: Any) -> None:
        if record["epoch"] == 3:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_training_that_was_interrupted_is_continued_by_the_same_command(
    reproduce: Run, entries: Path, trained: list[str]
) -> None:
    (entries / "tiny.yaml").write_text(TINY.replace("training.epochs: 1}", "training.epochs: 8}"))
    callback = f"{__name__}:{Interrupt.__name__}"
    code, _, err = reproduce("tiny", "--stages", "1", "--run.callbacks", callback)
    assert code == 130
    assert "vae-ray: stopped after" in err
    assert err.splitlines()[-1].endswith("; continue with the same command")
    assert 3 <= len(Path("runs/reproductions/tiny/seed-0/metrics.jsonl").read_text().splitlines()) < 8
    _, continued, _ = reproduce("tiny", "--stages", "1")
    assert trained == ["train seed-0 8", "train seed-0 8", "evaluate elbo,nll"]
    shutil.rmtree("runs")
    _, whole, _ = reproduce("tiny", "--stages", "1", "--run.callbacks", callback.replace("Interrupt", "Silent"))
    assert continued["outcomes"][0]["obtained"] == whole["outcomes"][0]["obtained"]


class Silent:
    """A callback that does nothing: a command may name code of its own."""


def test_the_difference_of_two_runs_has_the_standard_error_of_the_same_images(reproduce: Run) -> None:
    code, answer, _ = reproduce("pair")
    assert code == 0
    runs = Path("runs/reproductions/pair")
    columns = [
        pq.read_table(next((runs / f"stage-1-{name}-seed-0" / "evaluations").glob("*.parquet")))
        for name in ("five", "two")
    ]
    five, two = (np.asarray(each["distortion"], float) + np.asarray(each["rate"], float) for each in columns)
    difference = answer["outcomes"][0]["obtained"][1]
    assert difference["value"] == pytest.approx(np.mean(five - two), rel=1e-9)
    assert difference["half_width"] == pytest.approx(np.std(five - two, ddof=1) / len(two) ** 0.5, rel=1e-9)
    assert difference["half_width"] < np.std(five, ddof=1) / len(two) ** 0.5  # that of unpaired runs would be larger
    assert set(answer["outcomes"][0]["labels"]) == {"two test", "five test"}


def test_over_seeds_there_is_an_interval_of_the_mean(reproduce: Run) -> None:
    _, answer, _ = reproduce("pair", "--seeds", "3")
    _, difference = answer["outcomes"][0]["obtained"]
    assert answer["outcomes"][0]["seeds"] == [0, 1, 2]
    assert len(set(difference["by_seed"])) == 3
    assert difference["value"] == pytest.approx(np.mean(difference["by_seed"]))
    # Student's t of two degrees of freedom has 97.5 % below 4.3027
    assert difference["half_width"] == pytest.approx(4.302653 * np.std(difference["by_seed"], ddof=1) / 3**0.5)
    assert difference["over"] == "seeds"


@pytest.mark.parametrize(
    ("value", "half_width", "over", "side", "expected"),
    [
        (-3.0, 2.9, "seeds", "below", True),
        (-3.0, 3.1, "seeds", "below", None),
        (3.0, 2.9, "seeds", "below", False),
        (3.0, 1.5, "images", "above", True),  # 1.96 standard errors are a 95 % interval
        (3.0, 1.6, "images", "above", None),
        (3.0, None, "", "above", True),
    ],
)
def test_on_which_side_a_value_is_is_decided_by_its_interval(
    value: float, half_width: float | None, over: Any, side: Any, expected: bool | None
) -> None:
    target = registry.Target(metric="test/nelbo", reference=0, side=side)
    obtained = Obtained(target, value, half_width, over, [value])
    assert obtained.is_reproduced is expected
    assert obtained.verdict.startswith({True: "is ", False: "is not ", None: "not decided"}[expected])


def test_a_dry_run_starts_nothing(reproduce: Run) -> None:
    code, answer, err = reproduce("pair", "--seeds", "2", "--dry-run")
    assert code == 0
    assert answer["unfinished"] == 4
    assert answer["minutes"] > 0
    assert [each["model"]["latent_dim"] for each in answer["experiments"]] == [2, 5, 2, 5]
    assert [each["run"]["seed"] for each in answer["experiments"]] == [0, 0, 1, 1]
    assert "about 1 minute" in err
    assert not Path("runs").exists()


def test_the_page_has_every_entry_also_those_that_were_not_run(reproduce: Run) -> None:
    reproduce("tiny", "--stages", "1", "--results", "kept", "--page", "docs/results.md")
    page = Path("docs/results.md").read_text()
    pair = "| [pair](#pair) | Two and five dimensions | test/nelbo of five − two: below 1,000.00 nats | – | not run |"
    assert pair in page
    assert "`vae-ray reproduce tiny --stages 1`, seed 0, 20" in page
    not_run = "two epochs. Not run (about 3 hours (estimated) a seed). Reference: test/nelbo 1,000.00 nats, ± 1."
    assert f"Stage 2 of 2: {not_run}" in page
    Path("docs/results.md").unlink()
    assert reproduce("--results", "kept", "--page", "docs/results.md")[0] == 0
    assert Path("docs/results.md").read_text() == page


MISTAKES = [
    (["tinny"], "entry 'tinny' does not exist; did you mean 'tiny'?"),
    (["tiny", "--stages", "3"], "--stages: got '3', tiny has the stages 1 to 2; for example --stages 2"),
    (["tiny", "--stages", "2..9"], "--stages: got '2..9'"),
    (["tiny", "--stages", "2..1"], "--stages: got '2..1'"),
    (["tiny", "--stages", "first"], "--stages: got 'first'"),
    (["tiny", "--seeds", "0"], "--seeds: got '0'"),
    (["tiny", "--optim.lr", "1"], "--optim.lr: reproduce takes the keys that say where and by whom"),
    (["tiny", "--run.name", "x"], "--run.name: reproduce takes"),
    (["tiny", "--workers.num", "several"], "workers.num: got 'several'"),
    (["tiny", "--page", "results.html"], "--page: got 'results.html', should end in .md"),
    (["--stages", "1"], "--stages: needs the NAME of an entry"),
    (["--seeds", "2"], "--seeds: needs the NAME"),
    (["tiny", "--data.root", "x"], "data.root"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err.splitlines()[-1]
    assert not Path("runs").exists()


def test_a_run_of_another_experiment_is_refused(reproduce: Run, entries: Path) -> None:
    reproduce("tiny", "--stages", "1")
    (entries / "tiny.yaml").write_text(TINY.replace("latent_dim: 3", "latent_dim: 4"))
    code, _, err = reproduce("tiny", "--stages", "1")
    assert code == 2
    assert "is a run of another experiment (model.latent_dim: 4 -> 3); choose another --storage" in err


def test_a_damaged_evaluation_is_made_again(reproduce: Run, trained: list[str]) -> None:
    _, first, _ = reproduce("tiny", "--stages", "1")
    for file in Path("runs/reproductions/tiny/seed-0/evaluations").iterdir():
        file.write_bytes(file.read_bytes()[:-9])
    _, again, _ = reproduce("tiny", "--stages", "1")
    assert trained[2:] == ["train seed-0 1", "evaluate elbo,nll"]
    assert again == first


def test_a_metric_without_values_by_image_has_no_standard_error(reproduce: Run, entries: Path) -> None:
    text = TINY.replace('"elbo,nll", num_samples: 20', "active-units").replace("test/nll", "test/active_units")
    (entries / "tiny.yaml").write_text(text)
    code, answer, _ = reproduce("tiny", "--stages", "1")
    obtained = answer["outcomes"][0]["obtained"][0]
    assert (code, obtained["half_width"], obtained["over"]) == (0, None, "")


def test_a_damaged_result_is_named(reproduce: Run) -> None:
    reproduce("tiny", "--stages", "1")
    file = Path("runs/reproductions/tiny-stage-1.json")
    file.write_text(file.read_text().replace('"seeds": [', '"seeds": [7,'))
    code, _, err = reproduce()
    assert code == 2
    assert f"{file}: damaged" in err.replace(f"{Path.cwd()}/", "")
