"""System: an evaluation is kept beside its run, with the values of each image."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from vae_ray import TrainResult
from vae_ray.cli.main import main
from vae_ray.evaluation.store import kept_evaluations, owner_of
from vae_ray.storage.records import verify


@pytest.fixture
def run(trained_run: TrainResult, tmp_path: Path) -> Path:
    copy = tmp_path / "run"
    shutil.copytree(trained_run.run_dir, copy, ignore=shutil.ignore_patterns("evaluations"))
    return copy


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, object]:
    assert main(["evaluate", "--json", *map(str, arguments)]) == 0
    answer: dict[str, object] = json.loads(capsys.readouterr().out)
    return answer


def test_the_answer_is_kept_with_the_values_of_each_image(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = evaluate(capsys, run, "--metrics", "elbo,nll", "--num-samples", "30")
    file = Path(str(answer["file"]))
    assert file.parent == run / "evaluations"
    assert verify(json.loads(file.read_text())) == {k: v for k, v in answer.items() if k not in ("checkpoint", "file")}
    table = pq.read_table(file.with_suffix(".parquet"))
    assert set(table.column_names) == {"distortion", "rate", "nll", "effective_samples"}
    metrics = answer["metrics"]
    assert isinstance(metrics, dict)
    for name in table.column_names:
        assert table[name].to_numpy().astype(float).mean() == pytest.approx(metrics[f"test/{name}"], rel=1e-12)


def test_the_same_evaluation_again_replaces_and_another_stands_beside(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = evaluate(capsys, run)
    assert evaluate(capsys, run) == first
    assert len(list((run / "evaluations").glob("*.json"))) == 1
    evaluate(capsys, run, "--num-images", "70")
    assert len(list((run / "evaluations").glob("*.json"))) == 2


def test_damaged_values_of_images_do_not_lose_the_numbers(
    run: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    file = Path(str(evaluate(capsys, run)["file"]))
    (whole,) = kept_evaluations(run)
    assert whole.by_image("test/nelbo") is not None
    file.with_suffix(".parquet").write_bytes(b"PAR1")
    (damaged,) = kept_evaluations(run)
    assert (damaged.metrics, damaged.by_image("test/nelbo")) == (whole.metrics, None)
    assert f"{file.with_suffix('.parquet')}: damaged and left out" in caplog.text
    file.write_text("{}")
    assert kept_evaluations(run) == []
    assert "evaluate again to replace it" in caplog.text


def test_the_owner_of_a_checkpoint(run: Path, tmp_path: Path) -> None:
    (checkpoint,) = list((run / "checkpoints").glob("epoch=0003"))
    assert owner_of(str(run)) == owner_of(str(checkpoint)) == str(run)
    sweep = tmp_path / "sweep"
    shutil.copytree(checkpoint, sweep / "best")
    assert owner_of(str(sweep / "best")) is None  # a copy of a checkpoint
    (sweep / "sweep.yaml").touch()
    assert owner_of(str(sweep / "best")) == owner_of(str(sweep)) == str(sweep)


def test_a_checkpoint_without_a_run_is_evaluated_too(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint,) = list((run / "checkpoints").glob("epoch=0003"))
    alone = tmp_path / "alone"
    shutil.copytree(checkpoint, alone)
    assert evaluate(capsys, alone)["file"] is None
    assert not list(alone.glob("eval*"))


def test_a_run_that_cannot_be_written_is_evaluated_with_a_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "evaluations").touch()  # a file where the directory should be
    assert main(["evaluate", str(run)]) == 0
    captured = capsys.readouterr()
    assert "test/nelbo" in captured.out
    assert f"vae-ray: {run}: the evaluation could not be written there (" in captured.err
