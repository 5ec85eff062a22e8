"""Checkpoints of other versions: those of released ones are read as they were, newer ones are refused by name."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from tests.faults.conftest import Count
from vae_ray import Experiment, TrainedVAE, UserError, train
from vae_ray.checkpoints.loading import FORMAT_VERSION, MANIFEST, read_checkpoint, sealed
from vae_ray.cli.main import main
from vae_ray.training.optimization import build_optimizer

pytestmark = pytest.mark.faults

GOLDEN = sorted((Path(__file__).parents[1] / "data").glob("golden-checkpoint-v*"))
"""Five epochs of the digits, written by the release that introduced each format; never to be written again."""


def test_there_is_a_golden_checkpoint_of_every_format() -> None:
    assert [path.name for path in GOLDEN] == [f"golden-checkpoint-v{n}" for n in range(1, FORMAT_VERSION + 1)]
    for number, path in enumerate(GOLDEN, start=1):
        assert json.loads((path / MANIFEST).read_text())["format_version"] == number
        assert sum(file.stat().st_size for file in path.iterdir()) < 100_000


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_a_golden_checkpoint_has_the_metrics_that_were_recorded_when_it_was_written(
    path: Path, fault_counts: Count
) -> None:
    """Evaluation has no chance in it: only the order of float32 sums differs between processors and versions of torch.

    Each of 359 images sums 64 pixels of some 0.4 nats; errors of 6e-8 a term stay below 1e-5 of the sum.
    """
    model = TrainedVAE.load(path)
    recorded = model.checkpoint.metrics
    for split in ("val", "test"):
        for key, value in model.evaluate(split).items():  # type: ignore[arg-type]
            assert math.isclose(value, recorded[key], rel_tol=1e-5), key
    assert torch.isfinite(model.generate(3)).all()
    fault_counts("versions", tried=1, survived=1, note="golden checkpoints load")


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_training_goes_on_from_a_golden_checkpoint(path: Path, tmp_path: Path, fault_counts: Count) -> None:
    model = TrainedVAE.load(path)
    optimizer = build_optimizer(model.experiment.optim, list(model.model.parameters()))
    read_checkpoint(path).load_into(model.model, optimizer)
    assert len(optimizer.state_dict()["state"]) == len(list(model.model.parameters()))
    experiment = model.experiment.with_overrides({"training.epochs": 6, "run.storage": str(tmp_path), "run.name": "on"})
    run = tmp_path / "on"
    shutil.copytree(path, run / "checkpoints" / "epoch=0005")
    (run / "experiment.yaml").write_text(experiment.to_yaml())
    result = train(experiment, resume=True)
    assert result.epochs == 6
    assert result.metrics["val/nelbo"] < model.checkpoint.metrics["val/nelbo"]
    fault_counts("versions", tried=1, survived=1, note="and training goes on from them")


def test_a_newer_format_is_refused_with_what_to_install_and_nothing_of_its_run_is_touched(
    tmp_path: Path, fault_counts: Count, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "newer"
    path = run / "checkpoints" / "epoch=0005"
    shutil.copytree(GOLDEN[-1], path)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest.update(format_version=FORMAT_VERSION + 1, written_by="vae_ray 7.3.0", unheard_of=[{}])
    (path / MANIFEST).write_text(json.dumps(sealed(manifest)))
    said = rf"format {FORMAT_VERSION + 1} is newer .* install .*vae_ray 7\.3\.0"
    with pytest.raises(UserError, match=said):
        TrainedVAE.load(path)
    experiment = Experiment.from_dict(json.loads((path / "experiment.json").read_text()))
    experiment = experiment.with_overrides({"run.storage": str(tmp_path), "run.name": "newer"})
    (run / "experiment.yaml").write_text(experiment.to_yaml())
    before = sorted(str(file) for file in run.rglob("*") if not file.name.startswith("."))
    assert main(["train", str(run / "experiment.yaml"), "--resume", "--name=newer", f"--storage={tmp_path}"]) == 2
    assert "install" in capsys.readouterr().err
    assert sorted(str(file) for file in run.rglob("*") if not file.name.startswith(".")) == before
    fault_counts("versions", tried=2, survived=2, note="newer ones are refused")
