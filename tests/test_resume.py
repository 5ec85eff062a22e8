"""System: a run that was stopped anywhere goes on to the same bits as one that never stopped."""

import itertools
import json
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from tests.checkpoints.written import change_manifest
from tests.runs import computed, fitted, run_of
from tests.thread_workers import ThreadWorkers
from vae_ray import Experiment, TrainingFailed, TrainResult, UserError, train
from vae_ray.cli.main import main
from vae_ray.data.splits import Splits
from vae_ray.runs.train import resume as resume_run


def last_weights(result: TrainResult) -> bytes:
    return (result.last_checkpoint / "weights.safetensors").read_bytes()


def pictures(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in run.glob("images/*/*.png")}


@pytest.fixture(scope="module")
def whole(module_quick: Experiment) -> TrainResult:
    """Four epochs without a stop, every checkpoint kept."""
    return train(module_quick.with_overrides({"training.epochs": 4, "run.checkpoints_kept": 9}))


@pytest.fixture
def stopped(whole: TrainResult, tmp_path: Path) -> Path:
    """A copy of the whole run, for tests to take pieces from; without its summary it has not finished."""
    run = tmp_path / whole.run_dir.name
    shutil.copytree(whole.run_dir, run)
    (run / "summary.json").unlink()
    return run


def resume(run: Path, **overrides: Any) -> TrainResult:
    experiment = Experiment.from_file(run / "experiment.yaml")
    place = {"run.storage": str(run.parent), "run.name": run.name}
    return train(experiment.with_overrides({**place, **overrides}), resume=True)


def remove_checkpoints(run: Path, *epochs: int) -> None:
    for epoch in epochs:
        shutil.rmtree(run / "checkpoints" / f"epoch={epoch:04d}")


def half_of_the_last_line(run: Path) -> None:
    file = run / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-200])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "the last checkpoint is gone": lambda run: remove_checkpoints(run, 4),
    "three checkpoints are gone": lambda run: remove_checkpoints(run, 2, 3, 4),
    "all checkpoints are gone": lambda run: remove_checkpoints(run, 1, 2, 3, 4),
    "an older checkpoint is gone": lambda run: remove_checkpoints(run, 1, 4),
    "the manifest was never written": lambda run: (run / "checkpoints/epoch=0004/manifest.json").unlink(),
    "the last line is torn": lambda run: (remove_checkpoints(run, 4), half_of_the_last_line(run))[0],
    "pictures are gone": lambda run: (remove_checkpoints(run, 4), shutil.rmtree(run / "images/samples"))[0],
    "nothing is gone but the summary": lambda run: None,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_stopped_run_ends_with_the_weights_and_metrics_of_a_whole_one(
    whole: TrainResult, stopped: Path, damage: str
) -> None:
    DAMAGES[damage](stopped)
    result = resume(stopped)
    assert last_weights(result) == last_weights(whole)
    assert computed(stopped) == computed(whole.run_dir)
    assert result.best_epoch == whole.best_epoch
    assert result.metrics == pytest.approx(whole.metrics, rel=1e-9)
    assert (stopped / "summary.json").exists()
    remade = pictures(stopped)
    assert remade.items() <= pictures(whole.run_dir).items()
    assert "images/samples/epoch=0004.png" in remade


@pytest.mark.parametrize("left", [pytest.param(0), 1, 3], ids=lambda n: f"{n} lines left")
def test_lost_lines_of_metrics_do_not_keep_a_run_from_finishing(whole: TrainResult, stopped: Path, left: int) -> None:
    """The last checkpoint is there, so nothing is computed again and the lines stay lost."""
    file = stopped / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:left]))
    result = resume(stopped)
    assert last_weights(result) == last_weights(whole)
    assert result.metrics == pytest.approx(whole.metrics, rel=1e-9)


def test_resuming_a_finished_run_returns_its_result_and_touches_nothing(whole: TrainResult) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.run_dir.rglob("*") if path.is_file()}
    assert resume(whole.run_dir) == whole
    after = {path: path.stat().st_mtime_ns for path in whole.run_dir.rglob("*") if path.is_file()}
    assert {p: t for p, t in after.items() if not p.name.endswith(".lock")} == {
        p: t for p, t in before.items() if not p.name.endswith(".lock")
    }


def test_resuming_what_never_started_starts_it(quick: Experiment) -> None:
    result = train(quick.with_overrides({"training.epochs": 1}), resume=True)
    assert [line["epoch"] for line in computed(result.run_dir)] == [1]


def scalars(run: Path) -> list[tuple[int, float]]:
    """The steps and values of the training nelbo that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/nelbo")]


def test_tensorboard_of_a_resumed_run_shows_every_epoch_once(stopped: Path) -> None:
    remove_checkpoints(stopped, 3, 4)
    resume(stopped)
    assert scalars(stopped) == [(line["epoch"], np.float32(line["train/nelbo"])) for line in computed(stopped)]


@pytest.mark.parametrize("seconds", [-3600, 3600])
def test_tensorboard_shows_the_epochs_after_the_clock_was_set(
    quick: Experiment, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(quick.with_overrides({"training.epochs": 2})).run_dir
    now, now_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: now() + seconds)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + seconds * 10**9)
    resume_run(run, {"training.epochs": 4})
    assert scalars(run) == [(line["epoch"], np.float32(line["train/nelbo"])) for line in computed(run)]
    assert len(scalars(run)) == 4


# --- from the directory alone ---------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], run: Path, *arguments: str) -> dict[str, Any]:
    """The answer of `vae-ray resume`."""
    assert main(["resume", str(run), *arguments, "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_resume_needs_nothing_but_the_directory(
    whole: TrainResult, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remove_checkpoints(stopped, 3, 4)
    cache = tmp_path / "cache"
    answer = command(capsys, stopped, "--workers.cpus=1", f"--data.cache-dir={cache}")
    assert (Path(answer["last_checkpoint"]) / "weights.safetensors").read_bytes() == last_weights(whole)
    assert computed(stopped) == computed(whole.run_dir)
    assert list(cache.glob("digits-*/train-*.arrow")) != []


@pytest.mark.parametrize("is_finished", [True, False])
def test_resume_refuses_to_change_what_a_run_computes(
    stopped: Path, whole: TrainResult, is_finished: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if is_finished:
        shutil.copy(whole.run_dir / "summary.json", stopped)
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    for override in ("--optim.lr=0.1", "--training.epochs=3", "--model.network=ladder", "--run.seed=4"):
        assert main(["resume", str(stopped), override]) == 2
        err = capsys.readouterr().err
        assert "cannot be resumed with a different experiment: " in err
        assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def raw_files(root: Path, *, seed: int, height: int = 8) -> Path:
    """Raw files of MNIST's layout with 40 training and 9 test images."""
    raw, chance = root / "MNIST" / "raw", np.random.default_rng(seed)
    raw.mkdir(parents=True)
    for prefix, n in (("train", 40), ("t10k", 9)):
        for kind, shape in (("images-idx3", (n, height, 8)), ("labels-idx1", (n,))):
            header = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
            (raw / f"{prefix}-{kind}-ubyte").write_bytes(header + chance.bytes(int(np.prod(shape))))
    return root


@pytest.fixture
def on_files(quick: Experiment, tmp_path: Path) -> Experiment:
    """Two epochs on raw files."""
    data = {"source": "mnist", "root": str(raw_files(tmp_path / "first", seed=1)), "download": False}
    small = {"data.num_validation": 8, "training.epochs": 2, "optim.schedule": "constant"}
    return quick.with_overrides({"data": data, **small})


@pytest.mark.parametrize("epochs", [2, 3])
def test_a_run_is_not_continued_on_other_images(on_files: Experiment, tmp_path: Path, epochs: int) -> None:
    run = train(on_files).run_dir
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    other, small = raw_files(tmp_path / "other", seed=2), raw_files(tmp_path / "small", seed=1, height=7)
    more = {"training.epochs": epochs}
    with pytest.raises(UserError, match=r"data\.source: mnist has other train and test images than the run had; use"):
        resume_run(run, {"data.root": str(other), **more})
    size = r"mnist has images of shape \(1, 7, 8\), where the run's had \(1, 8, 8\)"
    with pytest.raises(UserError, match=size):
        resume_run(run, {"data.root": str(small), **more})
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_continues_on_the_same_images_in_another_place(on_files: Experiment, tmp_path: Path) -> None:
    run = train(on_files).run_dir
    moved = raw_files(tmp_path / "moved", seed=1)
    shutil.rmtree(tmp_path / "first")
    assert resume_run(run, {"data.root": str(moved), "training.epochs": 3}).epochs == 3


def test_a_checkpoint_that_does_not_know_its_images_is_continued_on_any(on_files: Experiment, tmp_path: Path) -> None:
    """As those of earlier versions."""
    run = train(on_files).run_dir
    for checkpoint in (run / "checkpoints").iterdir():
        change_manifest(checkpoint, lambda manifest: manifest.pop("fingerprints"))
    other = raw_files(tmp_path / "other", seed=2)
    assert resume_run(run, {"data.root": str(other), "training.epochs": 3}).epochs == 3


def test_workers_on_nodes_with_different_images_do_not_begin(
    quick: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = itertools.count()
    monkeypatch.setattr(Splits, "fingerprints", property(lambda splits: {"train": str(next(number))}))
    monkeypatch.setattr(ThreadWorkers, "node", property(lambda group: f"node-{group.rank}"))
    errors = fitted(quick, run_of(quick), 2)
    assert [type(error) for error in errors] == [UserError, UserError]
    assert str(errors[0]) == "data.root: nodes node-0 and node-1 have different images; should be the same files"


@pytest.mark.parametrize("content", [b"", b"run: {seed: 1}\n", b"model: {latent_dim: 11}\n"])
def test_an_experiment_that_is_not_that_of_the_checkpoints_is_refused(stopped: Path, content: bytes) -> None:
    """What computed the checkpoints is in each of them, with a checksum."""
    (stopped / "experiment.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"experiment\.yaml: damaged or changed since epoch=\d+ was written \(.* -> "):
        resume(stopped)


@pytest.mark.parametrize(
    "name", ["manifest.json", "experiment.json", "weights.safetensors", "training_state.safetensors"]
)
def test_a_finished_run_whose_best_checkpoint_is_damaged_is_trained_again(
    name: str, whole: TrainResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(whole.run_dir, tmp_path / "damaged"))
    file = run / "checkpoints" / Path(whole.best_checkpoint).name / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    resume(run)
    assert "training again from the newest intact checkpoint" in caplog.text
    assert computed(run) == computed(whole.run_dir)
    assert last_weights(resume(run)) == last_weights(whole)


def test_a_finished_run_that_was_moved_is_returned_with_its_new_paths(
    whole: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "elsewhere" / "another-name"
    shutil.copytree(whole.run_dir, moved)
    answer = command(capsys, moved)
    assert answer["run_dir"] == str(moved)
    assert answer["best_checkpoint"] == str(moved / "checkpoints" / whole.best_checkpoint.name)
    assert answer["metrics"] == whole.metrics


def test_more_epochs_extend_a_run_to_that_of_so_many_epochs(
    quick: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    constant = quick.with_overrides({"optim.schedule": "constant", "training.epochs": 2})
    run = train(constant).run_dir
    extended = command(capsys, run, "--training.epochs", "4")
    at_once = train(constant.with_overrides({"training.epochs": 4, "run.name": "at-once"}))
    assert extended["epochs"] == 4
    assert (Path(extended["last_checkpoint"]) / "weights.safetensors").read_bytes() == last_weights(at_once)
    assert computed(run) == computed(at_once.run_dir)
    assert Experiment.from_file(run / "experiment.yaml").training.epochs == 4
    assert command(capsys, run) == extended


def test_an_extended_run_that_was_stopped_is_continued(quick: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    constant = quick.with_overrides({"optim.schedule": "constant", "training.epochs": 2})
    run = train(constant).run_dir
    with monkeypatch.context() as full_disk:
        full_disk.setattr("vae_ray.runs.train._fit_here", Mock(side_effect=TrainingFailed("no space is left")))
        with pytest.raises(TrainingFailed):
            resume_run(run, {"training.epochs": 4})
    assert not (run / "summary.json").exists()
    continued = resume_run(run)
    at_once = train(constant.with_overrides({"training.epochs": 4, "run.name": "at-once"}))
    assert continued.epochs == 4
    assert computed(run) == computed(at_once.run_dir)


def test_extending_a_decaying_schedule_is_warned_of(quick: Experiment, caplog: pytest.LogCaptureFixture) -> None:
    run = train(quick.with_overrides({"training.epochs": 1})).run_dir
    resume_run(run, {"training.epochs": 2})
    assert "optim.schedule: cosine is computed over training.epochs (2)" in caplog.text


# --- version 0.1 ----------------------------------------------------------------------------------------

OLD_RUN = Path(__file__).parent / "data" / "run-v0.1"


def test_a_run_of_version_0_1_is_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(OLD_RUN, tmp_path / "old")
    assert main(["evaluate", str(tmp_path / "old"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    recorded = json.loads((OLD_RUN / "summary.json").read_text())["metrics"]
    # 0.2 draws other noise
    assert found["test/nelbo"] == pytest.approx(recorded["test/nelbo"], abs=0.05)


def test_a_finished_run_of_version_0_1_is_returned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "old"
    shutil.copytree(OLD_RUN, run)
    answer = command(capsys, run)
    assert (answer["run_dir"], answer["best_epoch"], answer["stopped_early"]) == (str(run), 32, False)


def test_an_unfinished_run_of_version_0_1_is_not_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "old"
    shutil.copytree(OLD_RUN, run)
    (run / "summary.json").unlink()
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert main(["resume", str(run)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "written by vae_ray 0.1: it can be evaluated and used as --run.initial-weights, not continued" in err
    after = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert {file: content for file, content in after.items() if file.suffix != ".lock"} == before


# --- kill -9 --------------------------------------------------------------------------------------------


def start(experiment: Experiment, file: Path) -> subprocess.Popen[bytes]:
    file.write_text(experiment.to_yaml())
    command = [sys.executable, "-m", "vae_ray", "train", str(file), "--resume"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for_lines(run: Path, num_lines: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < num_lines:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_run_killed_twice_at_random_moments_ends_as_if_it_had_not_been(quick: Experiment, tmp_path: Path) -> None:
    experiment = quick.with_overrides({"training.epochs": 9})
    run = Path(experiment.run.storage) / str(experiment.run.name)
    chance, done = random.Random(17), 0
    for _ in range(2):
        process = start(experiment, tmp_path / "experiment.yaml")
        wait_for_lines(run, done + 2, process)
        time.sleep(chance.uniform(0, 0.2))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        done = len((run / "metrics.jsonl").read_text().splitlines())
    result = resume_run(run)
    uninterrupted = train(experiment.with_overrides({"run.name": "uninterrupted"}))
    assert last_weights(result) == last_weights(uninterrupted)
    assert computed(result.run_dir) == computed(uninterrupted.run_dir)
    assert pictures(result.run_dir) == pictures(uninterrupted.run_dir)
    names = [sorted(path.name for path in (r.run_dir / "checkpoints").iterdir()) for r in (result, uninterrupted)]
    assert names[0] == names[1]


def test_resume_by_name_needs_a_preset_of_the_same_data_and_says_what_differs(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--resume", "--name", stopped.name, "--storage", str(stopped.parent)]
    assert main(["train", "mnist", *place]) == 2
    assert f"is a run of digits, not of mnist; continue it with: vae-ray resume {stopped}" in capsys.readouterr().err
    assert main(["train", "digitz", *place]) == 2
    assert "did you mean 'digits'?" in capsys.readouterr().err
    assert main(["train", "digits", *place]) == 0
    assert (
        f"vae-ray: {stopped.name} continues as it began, unlike digits: data.num_validation: "
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("flag", ["--run.name=other", "--run.storage=elsewhere"])
def test_resume_does_not_start_another_run(
    stopped: Path, flag: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["resume", str(stopped), flag]) == 2
    assert f"run.name, run.storage: the run is {stopped}; move that directory" in capsys.readouterr().err
    assert not (stopped.parent / "other").exists()
    assert not (tmp_path / "elsewhere").exists()


def test_resume_names_sweeps_trials_and_impossible_names(stopped: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    (sweep / "trials").mkdir(parents=True)
    (sweep / "sweep.yaml").touch()
    shutil.copytree(stopped, sweep / "trials" / "0000")
    with pytest.raises(UserError, match="is a sweep; continue it with its vae-ray sweep command and --resume"):
        resume_run(sweep)
    with pytest.raises(UserError, match=f"is a trial of the sweep {sweep}; continue the sweep"):
        resume_run(sweep / "trials" / "0000")
    shutil.copytree(stopped, tmp_path / "bad name")
    with pytest.raises(UserError, match="'bad name' cannot be the name of a run; rename the directory"):
        resume_run(tmp_path / "bad name")
