"""Codes by real Ray actors: who encodes does not change a byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from vae_ray import TrainedVAE, TrainResult
from vae_ray.distributed.evaluation import on_ray
from vae_ray.evaluation import codes

pytestmark = pytest.mark.ray


def test_any_number_of_workers_writes_the_same_file(
    trained_by: Callable[[int], TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,797 images of three splits, in 115 pieces and 40 parts."""
    monkeypatch.setattr(codes, "MOST_ROWS", 48)
    model = TrainedVAE.load(trained_by(0).run_dir)
    model.experiment = model.experiment.with_overrides({"training.evaluation_batch_size": 16})
    model.write_codes(tmp_path / "here.parquet", what="all")
    here = (tmp_path / "here.parquet").read_bytes()
    assert pq.ParquetFile(tmp_path / "here.parquet").metadata.num_rows == 1797
    for num_workers in (1, 2):
        out, seen = tmp_path / f"{num_workers}.parquet", list[tuple[int, int]]()
        report = lambda *numbers, seen=seen: seen.append(numbers)  # noqa: E731
        model.write_codes(out, what="all", run=on_ray(num_workers), progress=report)
        assert out.read_bytes() == here
        assert seen[-1] == (1797, 1797)


def test_workers_evaluate_under_a_fitted_prior(trained_by: Callable[[int], TrainResult]) -> None:
    model = TrainedVAE.load(trained_by(0).run_dir)
    model.fit_prior("mixture", components=3)
    model = model.with_prior("mixture")
    here, there = (model.evaluate("test", "elbo", run=on_ray(num)) for num in (0, 1))
    assert there.metrics == pytest.approx(here.metrics, rel=1e-6)
    assert there.labels == here.labels
