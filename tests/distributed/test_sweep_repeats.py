"""A sweep with several seeds on real Ray: extended, killed and resumed, always on the same images."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.conftest import digits
from vae_ray import Experiment, TrainedVAE, sweep
from vae_ray.data.batches import Shards
from vae_ray.data.splits import Splits
from vae_ray.tuning.directory import SweepDirectory

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

ARGUMENTS: dict[str, Any] = {
    "search": {"optim.lr": {"grid": [1e-6, 2e-3]}},
    "searcher": "grid",
    "scheduler": "none",
    "max_concurrent": 2,
}
NAMES = ["0000", "0000-1", "0001", "0001-1"]


def leaderboard(directory: SweepDirectory) -> list[dict[str, str]]:
    """Its rows without the time that they took."""
    with directory.leaderboard_csv.open(encoding="utf-8") as stream:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(stream)]


def test_more_seeds_extend_a_sweep_and_whatever_a_kill_leaves_resumes_to_the_same(tmp_path: Path) -> None:
    experiment = digits(tmp_path, 1, name="seeds", **{"data.binarize": "fixed"})
    directory = SweepDirectory(tmp_path / "seeds")
    sweep(experiment, **ARGUMENTS)
    before = {file: file.stat().st_mtime_ns for file in (directory.path / "trials").rglob("*") if file.is_file()}

    result = sweep(experiment, **ARGUMENTS, repeats=2, evaluate="active-units", evaluate_best=1, resume=True)

    assert {file: file.stat().st_mtime_ns for file in before} == before, "what had ended was not run again"
    assert sorted(path.name for path in (directory.path / "trials").iterdir()) == NAMES
    assert (result.num_trials, result.states) == (4, {"finished": 4})
    runs = [directory.trial(name) for name in NAMES]
    experiments = [run.experiment() for run in runs]
    assert [each.run.seed for each in experiments] == [11, 12, 11, 12]

    def images_of(experiment: Experiment) -> list[torch.Tensor]:
        """Those of validation and of training, as a trial sees them."""
        splits, alone = Splits.open(experiment), Shards(0, 1, torch.device("cpu"))
        loaders = [splits.loader(split, experiment, alone) for split in ("val", "train")]
        return [loader.images(loader.indices, epoch=1) for loader in loaders]

    first, *others = map(images_of, experiments)
    assert first[0].shape == (157, 1, 8, 8)
    assert all(torch.equal(a, b) for each in others for a, b in zip(first, each, strict=True))
    nelbo = [min(line["val/nelbo"] for line in run.records.history()) for run in runs]
    assert len(set(nelbo)) == 4

    rows = leaderboard(directory)
    assert [(row["configuration"], row["state"]) for row in rows] == [("0001", "complete"), ("0000", "complete")]
    assert [float(rows[0][f"val/nelbo_seed_{seed}"]) for seed in (11, 12)] == nelbo[2:]
    assert float(rows[0]["val/nelbo"]) == pytest.approx(sum(nelbo[2:]) / 2, rel=1e-12)
    assert result.best["trial"] == min(NAMES[2:], key=lambda name: nelbo[NAMES.index(name)])
    assert TrainedVAE.load(result.sweep_dir).experiment.run.seed == result.best["seed"]
    units = [TrainedVAE.load(run.path).evaluate("val", "active-units")["val/active_units"] for run in runs[2:]]
    assert [row["val/active_units"] for row in rows] == [str(sum(units) / 2).removesuffix(".0"), ""]

    # a kill before the last two trials had ended, one of them begun
    lines = directory.journal_file.read_bytes().splitlines(keepends=True)
    lost = ('"ended"', '"evaluated"')
    kept = [
        line
        for line in lines
        if not (json.loads(line)["trial"] in NAMES[1::2] and any(word.encode() in line for word in lost))
    ]
    directory.journal_file.write_bytes(b"".join(kept))
    shutil.rmtree(runs[1].path)
    shutil.rmtree(runs[3].checkpoints / "epoch=0003")
    again = sweep(experiment, **ARGUMENTS, repeats=2, evaluate="active-units", evaluate_best=1, resume=True)
    assert leaderboard(directory) == rows
    assert again.configurations[0]["val/nelbo"] == result.configurations[0]["val/nelbo"]
    written = directory.journal_file.read_bytes()
    sweep(experiment, **ARGUMENTS, repeats=2, evaluate="active-units", evaluate_best=1, resume=True)
    assert directory.journal_file.read_bytes() == written, "neither run nor evaluated again"


def test_a_metric_of_evaluations_ranks_by_means_over_seeds_and_only_what_is_missing_is_evaluated(
    tmp_path: Path,
) -> None:
    metric, directory = "val/linear_probe[label]", SweepDirectory(tmp_path / "probed")
    arguments = {**ARGUMENTS, "metric": metric, "repeats": 2, "scheduler": None}
    experiment = digits(tmp_path, 1, name="probed")
    result = sweep(experiment, **arguments)
    models = {name: TrainedVAE.load(directory.trial(name).path) for name in NAMES}
    accuracy = {name: model.evaluate("val", "representation")[metric] for name, model in models.items()}
    means = {name: (accuracy[name] + accuracy[f"{name}-1"]) / 2 for name in ("0000", "0001")}
    order = sorted(means, key=lambda name: -means[name])
    rows = leaderboard(directory)
    assert [(row["configuration"], float(row[metric])) for row in rows] == [(name, means[name]) for name in order]
    winner = max((order[0], f"{order[0]}-1"), key=lambda name: accuracy[name])
    assert (result.best["trial"], result.best["metrics"][metric]) == (winner, accuracy[winner])

    # a kill before the last two evaluations
    lines = directory.journal_file.read_bytes().splitlines(keepends=True)
    directory.journal_file.write_bytes(b"".join(lines[:-2]))
    assert [json.loads(line)["event"] for line in lines[-3:]] == ["evaluated"] * 3
    sweep(experiment, **arguments, resume=True)
    assert leaderboard(directory) == rows
    assert directory.journal_file.read_bytes().splitlines(keepends=True)[:-2] == lines[:-2]
