"""A sweep whose storage is an object store; runs on Ray workers there are in test_driver_ends.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.conftest import digits
from tests.storage.servers import ObjectStore
from vae_ray import TrainedVAE, sweep

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

SPACE = {"optim.lr": {"loguniform": [1e-3, 1e-2]}}


def test_a_sweep_at_a_uri_leaves_its_best_model_and_report_there(store: ObjectStore, tmp_path: Path) -> None:
    experiment = digits(tmp_path, 1, name="sweep", **{"training.epochs": 2, "run.storage": store.uri})
    result = sweep(experiment, search=SPACE, num_trials=2, scheduler="none")
    assert result.states == {"finished": 2}
    assert str(result.report) == f"{store.uri}/sweep/report.html"
    assert {"sweep.yaml", "trials.jsonl", "leaderboard.csv", "summary.json", "report.html"} <= store.names("sweep")
    best = TrainedVAE.load(f"{store.uri}/sweep")
    assert best.evaluate("test")["test/nelbo"] == pytest.approx(result.best["metrics"]["test/nelbo"], abs=1e-4)
    assert TrainedVAE.load(f"{store.uri}/sweep/trials/0001").checkpoint.epoch in (1, 2)
    grown = sweep(experiment, search=SPACE, num_trials=3, scheduler="none", evaluate="active-units", resume=True)
    assert grown.evaluations.keys() == {"0000", "0001", "0002"}
    assert sum("/evaluations/epoch=" in name and name.endswith(".json") for name in store.names("sweep")) == 3
    assert grown.states == {"finished": 3}
