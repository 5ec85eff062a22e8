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
from vae_ray import TrainedVAE, UserError, sweep, train

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
@pytest.mark.parametrize("num_workers", [1, 2])
def test_every_kind_of_code_in_a_sweep(num_workers: int, tmp_path: Path) -> None:
    experiment = digits(tmp_path, num_workers, name="own").with_overrides(OWN)
    space = {"model.network.width": {"grid": [8, 24]}}
    result = sweep(experiment, search=space, num_trials=2, searcher="grid", scheduler="none")
    assert (result.states, result.num_failed) == ({"finished": 2}, 0)
    trials = sorted(Path(result.sweep_dir, "trials").iterdir())
    assert [diary(trial) for trial in trials] == [DIARY] * 2
    widths = [TrainedVAE.load(trial, trust_code=True).experiment.model.network.settings["width"] for trial in trials]
    assert sorted(widths) == [8, 24]
    with pytest.raises(UserError, match="trust_code=True"):
        TrainedVAE.load(result.sweep_dir)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_kind_of_code_travels_with_a_submitted_job(num_workers: int, head: Head, tmp_path: Path) -> None:
    mine, storage = tmp_path / "mine", tmp_path / "storage"
    mine.mkdir()
    (mine / "own_code.py").write_text(MODULE)
    options = ["--workers.num", str(num_workers), "--storage", str(storage), "--name", "sent", "--json"]
    done = submit(head, "train", "digits", *FLAGS, *options, cwd=mine)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "SUCCEEDED"
    assert diary(storage / "sent") == DIARY
    summary = json.loads((storage / "sent" / "summary.json").read_text())
    assert summary["num_workers"] == num_workers
    assert summary["metrics"]["train/half_rate"] == pytest.approx(summary["metrics"]["train/rate"] / 2, rel=1e-9)
