"""A user's own network, prior, likelihood, objective, data and callback on Ray: the code travels with the run.

The workers cannot import it by themselves: Ray was started before the module existed, from another directory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.config.test_user_code import MODULE, importable
from tests.distributed.conftest import digits
from tests.distributed.heads import Head
from tests.distributed.test_submit import submit
from vae_ray import SweepResult, TrainedVAE, UserError, sweep, train
from vae_ray.run_files.run_records import RunRecords

pytestmark = pytest.mark.ray

OWN: dict[str, Any] = {
    "data": {"source": "own_code:stripes", "num": 300, "num_validation": 60},
    "model": {
        "latent_dim": 5,
        "network": {"name": "own_code:tiny", "width": 24},
        "prior": {"name": "own_code:Moving", "start": 0.5},
    },
    "likelihood": {"name": "own_code:Weighted", "factor": 0.5},
    "objective": "own_code:Reporting",
    "run.callbacks": "own_code:Diary",
    "training.epochs": 2,
    "optim.lr": 1e-3,
}
"""One of every kind, with settings of its own."""
FLAGS = [
    *("--data.source", "own_code:stripes", "--data.num", "300", "--data.num-validation", "60"),
    *("--model.latent-dim", "5", "--model.network", "own_code:tiny", "--model.network.width", "24"),
    *("--model.prior", "own_code:Moving", "--model.prior.start", "0.5", "--likelihood", "own_code:Weighted"),
    *("--likelihood.factor", "0.5", "--objective", "own_code:Reporting", "--run.callbacks", "own_code:Diary"),
    *("--training.epochs", "2", "--optim.lr", "1e-3"),
]
DIARY = ["began 2", "epoch 1 (2, 1, 6, 8)", "epoch 2 (2, 1, 6, 8)", "ended"]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importable(tmp_path, monkeypatch)


def diary(run_dir: Path | str) -> list[str]:
    return (Path(run_dir) / "diary.txt").read_text().splitlines()


@pytest.mark.usefixtures("cluster", "module")
def test_every_kind_of_code_on_two_workers_computes_what_one_process_does(tmp_path: Path) -> None:
    alone, on_ray = (train(digits(tmp_path, num, name=f"w{num}").with_overrides(OWN)) for num in (0, 2))
    assert on_ray.num_workers == 2
    assert diary(alone.run_dir) == diary(on_ray.run_dir) == DIARY
    for metric in ("train/half_rate", "train/loss", "val/nelbo", "test/nelbo"):
        assert on_ray.metrics[metric] == pytest.approx(alone.metrics[metric], rel=1e-4), metric


@pytest.mark.usefixtures("cluster", "module")
def test_every_kind_of_code_in_a_sweep(tmp_path: Path) -> None:
    """Also where a trial trains on a nested group of two workers, with the numbers of one that trains alone."""

    def swept(name: str, *widths: int, num_workers: int) -> tuple[SweepResult, dict[int, Path]]:
        experiment = digits(tmp_path, 1, name=name).with_overrides(OWN)
        space = {"model.network.width": {"grid": list(widths)}}
        result = sweep(
            experiment,
            search=space,
            num_trials=len(widths),
            searcher="grid",
            scheduler="none",
            workers_per_trial=num_workers,
        )
        assert (result.states, result.num_failed) == ({"finished": len(widths)}, 0)
        trials = sorted(Path(result.sweep_dir, "trials").iterdir())
        assert [diary(trial) for trial in trials] == [DIARY] * len(widths)
        experiments = [TrainedVAE.load(trial, trust_code=True).experiment for trial in trials]
        return result, {e.model.network.settings["width"]: trial for e, trial in zip(experiments, trials, strict=True)}

    result, alone = swept("own", 8, 24, num_workers=1)
    assert sorted(alone) == [8, 24]
    with pytest.raises(UserError, match="trust_code=True"):
        TrainedVAE.load(result.sweep_dir)
    _, nested = swept("nested", 8, num_workers=2)
    assert RunRecords(nested[8]).attempts()[-1]["num_workers"] == 2
    for one, other in zip(RunRecords(alone[8]).history(), RunRecords(nested[8]).history(), strict=True):
        assert other["val/nelbo"] == pytest.approx(one["val/nelbo"], rel=1e-4)
    assert not (nested[8] / ".ray").exists()


def test_every_kind_of_code_travels_with_a_submitted_job(head: Head, tmp_path: Path) -> None:
    """To the job itself, which checks the code before workers start, and to its two workers."""
    mine, storage = tmp_path / "mine", tmp_path / "storage"
    mine.mkdir()
    (mine / "own_code.py").write_text(MODULE)
    options = ["--workers.num", "2", "--storage", str(storage), "--name", "sent", "--json"]
    done = submit(head, "train", "digits", *FLAGS, *options, cwd=mine)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "SUCCEEDED"
    assert diary(storage / "sent") == DIARY
    summary = json.loads((storage / "sent" / "summary.json").read_text())
    assert summary["num_workers"] == 2
    assert summary["metrics"]["train/half_rate"] == pytest.approx(summary["metrics"]["train/rate"] / 2, rel=1e-9)
