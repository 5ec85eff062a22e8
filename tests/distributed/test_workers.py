"""Real Ray Train workers: who computes does not change what is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.conftest import digits
from vae_ray import TrainedVAE, TrainingFailed, TrainResult, UserError, train
from vae_ray.distributed.evaluation import on_ray
from vae_ray.evaluation.table import ALL
from vae_ray.run_files.run_directory import RunDirectory

pytestmark = pytest.mark.ray

TERMS = ("nelbo", "distortion", "rate")


def weights(result: TrainResult) -> bytes:
    return (result.last_checkpoint / "weights.safetensors").read_bytes()


def test_one_ray_worker_computes_the_same_bits_as_no_ray(trained_by: Callable[[int], TrainResult]) -> None:
    assert weights(trained_by(1)) == weights(trained_by(0))
    assert trained_by(1).metrics == trained_by(0).metrics


def test_two_workers_give_the_curve_of_one(trained_by: Callable[[int], TrainResult]) -> None:
    """Gradients of other numbers of shards: tests/training/test_loop.py; sums of three: test_shared_memory.py."""
    # Only the order of float32 additions differs; 63 Adam steps of it stay far below 0.01 nats of about 30.
    for alone, together in zip(trained_by(0).history, trained_by(2).history, strict=True):
        for split in ("train", "val", "test"):
            for term in TERMS:
                key = f"{split}/{term}"
                assert together[key] == pytest.approx(alone[key], abs=0.01), (together["epoch"], key)


def test_a_checkpoint_of_ray_workers_evaluates_to_its_recorded_metrics(
    trained_by: Callable[[int], TrainResult],
) -> None:
    result = trained_by(2)
    trained = TrainedVAE.load(result.run_dir)
    again = trained.evaluate("test", ALL, num_samples=70)
    # the same noise and images, summed in another order
    assert again["test/nelbo"] == pytest.approx(result.metrics["test/nelbo"], rel=1e-6)
    for num_workers in (1, 2, 3):
        seen: list[tuple[int, int]] = []
        options = {"run": on_ray(num_workers), "progress": lambda *numbers, seen=seen: seen.append(numbers)}
        found = trained.evaluate("test", ALL, num_samples=70, **options)
        assert found.metrics == pytest.approx(again.metrics, rel=1e-6)
        assert found.labels == again.labels
        assert seen[-1] == (359 + 1281, 359 + 1281)  # and training images, for what is fitted to them


def test_a_run_directory_is_the_same_with_and_without_ray(trained_by: Callable[[int], TrainResult]) -> None:
    def files(result: TrainResult) -> set[str]:
        names = {str(path.relative_to(result.run_dir)) for path in result.run_dir.rglob("*") if path.is_file()}
        events = {name for name in names if "tfevents" in name}
        assert len(events) == 2, "scalars and images; hparams"
        return names - events

    assert files(trained_by(2)) == files(trained_by(0))


def test_the_result_says_how_many_workers_computed_it(trained_by: Callable[[int], TrainResult]) -> None:
    assert [trained_by(n).num_workers for n in (0, 2)] == [0, 2]


@pytest.mark.usefixtures("cluster")
def test_a_loss_that_is_not_finite_is_warned_of_and_fails_at_last_and_keeps_no_checkpoint_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = {"optim.lr": 1e30, "training.nonfinite": "skip", "training.nonfinite.limit": 1}
    with pytest.raises(TrainingFailed, match=r"epoch 1, step \d+ of 21: the \w+ is not finite.*--optim\.lr"):
        train(digits(tmp_path, 2, name="diverges", **policy), quiet=False)
    assert list((tmp_path / "diverges" / "checkpoints").glob("epoch=*")) == []
    # what a worker warns of, people see in the driver's terminal
    warnings = [line for line in capsys.readouterr().err.splitlines() if "skipped (1 of at most 1 times)" in line]
    assert warnings == RunDirectory(tmp_path / "diverges").records.warnings()
    assert len(warnings) == 1


@pytest.mark.usefixtures("cluster")
@pytest.mark.timeout(30)  # Ray itself would wait indefinitely
def test_more_workers_than_the_cluster_has_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"workers\.num: got 5 with 1 CPU each.*\(4 CPUs\).*--workers\.num 4"):
        train(digits(tmp_path, 5, name="too-many"))
    assert not (tmp_path / "too-many" / "experiment.yaml").exists()


@pytest.mark.usefixtures("cluster")
@pytest.mark.timeout(30)
def test_gpus_that_the_cluster_does_not_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"workers\.num: got 2 with .*1 GPU each.* 0 GPUs\).*--workers\.device cpu"):
        train(digits(tmp_path, 2, name="no-gpu", **{"workers.device": "cuda"}))
