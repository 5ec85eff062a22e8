"""Checkpoints of other versions: those of releases load as they were written, newer ones are refused by name."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.checkpoints.written import change_manifest
from tests.faults.conftest import Count
from vae_ray import Experiment, TrainedVAE, UserError, train
from vae_ray.checkpoints.loading import FORMAT_VERSION, MANIFEST, WEIGHTS, read_checkpoint
from vae_ray.cli.main import main

pytestmark = pytest.mark.faults

GOLDEN = sorted((Path(__file__).parents[1] / "data").glob("golden-checkpoint-v*"))
"""Five epochs of the digits, written by the release that introduced each format; never to be written again."""
OF_VAE_RAY_0_1 = GOLDEN[:2]
NOISE = {"val": 0.4, "test": 0.23}
"""Five standard errors of the mean distortion over one sample an image, in nats; 0.1 drew other noise than 0.2."""


def run_of(golden: Path, storage: Path, **overrides: object) -> tuple[Path, Experiment]:
    """A run in `storage` whose newest checkpoint is a golden one."""
    run = storage / "old"
    shutil.copytree(golden, run / "checkpoints" / "epoch=0005")
    experiment = Experiment.from_dict(json.loads((golden / "experiment.json").read_text()))
    experiment = experiment.with_overrides({"run.storage": str(storage), "run.name": "old"})
    (run / "experiment.yaml").write_text(experiment.to_yaml())
    return run, experiment.with_overrides(overrides)


def files(directory: Path) -> dict[str, bytes]:
    """Everything but locks."""
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file() and not file.name.startswith(".")
    }


def test_there_is_a_golden_checkpoint_of_every_format() -> None:
    assert [path.name for path in GOLDEN] == [f"golden-checkpoint-v{n}" for n in range(1, FORMAT_VERSION + 1)]
    for number, path in enumerate(GOLDEN, start=1):
        assert json.loads((path / MANIFEST).read_text())["format_version"] == number
        assert sum(file.stat().st_size for file in path.iterdir()) < 100_000


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_a_golden_checkpoint_has_the_metrics_that_were_recorded_when_it_was_written(
    path: Path, fault_counts: Count
) -> None:
    """Only the order of float32 sums differs between processors and versions of torch: relative errors below 1e-5."""
    model = TrainedVAE.load(path)
    recorded = model.checkpoint.metrics
    for split in ("val", "test"):
        found = model.evaluate(split)  # type: ignore[arg-type]
        assert math.isclose(found[f"{split}/rate"], recorded[f"{split}/rate"], rel_tol=1e-5)
        noise = NOISE[split] if path in OF_VAE_RAY_0_1 else 0.0
        for key in (f"{split}/distortion", f"{split}/nelbo"):
            assert math.isclose(found[key], recorded[key], rel_tol=1e-5, abs_tol=noise), key
    assert torch.isfinite(model.generate(3)).all()
    fault_counts("versions", tried=1, survived=1, note="golden checkpoints load")


@pytest.mark.parametrize("path", OF_VAE_RAY_0_1, ids=lambda path: path.name)
def test_weights_of_vae_ray_0_1_are_those_of_the_network(path: Path) -> None:
    stored, model = safetensors.torch.load((path / WEIGHTS).read_bytes()), TrainedVAE.load(path).model
    assert {f"network.{name}" for name in stored} == model.state_dict().keys()
    assert all(torch.equal(model.state_dict()[f"network.{name}"], tensor) for name, tensor in stored.items())


def test_training_continues_from_a_golden_checkpoint_of_the_current_format(tmp_path: Path, fault_counts: Count) -> None:
    run, experiment = run_of(GOLDEN[-1], tmp_path, **{"training.epochs": 6})
    result = train(experiment, resume=True)
    assert result.epochs == 6
    assert [json.loads(line)["epochs_done"] for line in (run / "attempts.jsonl").read_text().splitlines()] == [5]
    assert result.metrics["val/nelbo"] < read_checkpoint(GOLDEN[-1]).metrics["val/nelbo"]
    fault_counts("versions", tried=1, survived=1, note="training continues from the current format")


@pytest.mark.parametrize("path", OF_VAE_RAY_0_1, ids=lambda path: path.name)
def test_training_does_not_continue_from_vae_ray_0_1_but_starts_from_its_weights(
    path: Path, tmp_path: Path, fault_counts: Count
) -> None:
    with pytest.raises(UserError, match=r"written by vae_ray 0\.1: .*--run\.initial-weights"):
        read_checkpoint(path).training_state()
    run, experiment = run_of(path, tmp_path, **{"training.epochs": 6})
    before = files(run / "checkpoints")
    with pytest.raises(UserError, match=r"epoch=0005: written by vae_ray 0\.1"):
        train(experiment, resume=True)
    assert files(run / "checkpoints") == before
    new = {"run.name": "new", "run.initial_weights": str(run), "training.epochs": 1, "optim.lr": 1e-6}
    result = train(experiment.with_overrides(new))
    assert abs(result.metrics["val/nelbo"] - read_checkpoint(path).metrics["val/nelbo"]) < NOISE["val"]
    fault_counts("versions", tried=2, survived=2, note="0.1 gives weights, and is not continued")


def test_a_newer_format_is_refused_with_what_to_install_and_nothing_of_its_run_is_touched(
    tmp_path: Path, fault_counts: Count, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = run_of(GOLDEN[-1], tmp_path)
    path = run / "checkpoints" / "epoch=0005"
    newer = {"format_version": FORMAT_VERSION + 1, "written_by": "vae_ray 7.3.0", "unheard_of": [{}]}
    change_manifest(path, lambda manifest: manifest.update(newer))
    message = rf"format {FORMAT_VERSION + 1} is newer .* install .*vae_ray 7\.3\.0"
    with pytest.raises(UserError, match=message):
        TrainedVAE.load(path)
    before = files(run)
    assert main(["resume", str(run)]) == 2
    assert "install" in capsys.readouterr().err
    assert files(run) == before
    fault_counts("versions", tried=2, survived=2, note="newer ones are refused")
