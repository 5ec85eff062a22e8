"""Runs whose storage is an object store, against a real S3 API server: the same numbers, files and promises."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import digits_in_this_process
from tests.data_layer.stored import open_split
from tests.storage.servers import ObjectStore, filesystem
from vae_ray import Experiment, TrainedVAE, TrainResult, UserError, train
from vae_ray.cli.main import main
from vae_ray.config.sections.data import PublishedData
from vae_ray.errors import Stopped
from vae_ray.run_files.run_directory import RunDirectory

PACKAGE = {"manifest.json", "experiment.json", "weights.safetensors", "training_state.safetensors"}


def at(store: ObjectStore, name: str, **overrides: object) -> Experiment:
    return digits_in_this_process(Path("unused")).with_overrides(
        {"run.storage": store.uri, "run.name": name, **overrides}
    )


def weights(location: Path | str) -> list[object]:
    return [value.tolist() for value in TrainedVAE.load(location).model.state_dict().values()]


@pytest.fixture(scope="module")
def stored(store: ObjectStore) -> TrainResult:
    return train(at(store, "stored"))


def test_a_run_at_a_uri_has_the_numbers_and_the_files_of_one_in_a_directory(
    store: ObjectStore, stored: TrainResult, trained_run: TrainResult
) -> None:
    assert stored.metrics == trained_run.metrics
    directory = Path(trained_run.run_dir)
    here = {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}
    there = store.names("stored")
    visible = {name for name in here if not any(part.startswith(".") for part in name.split("/"))}
    own = re.compile("tfevents|^evaluations/")  # a name of its own, and of other tests
    assert {n for n in there if not own.search(n)} == {n for n in visible if not own.search(n)}
    assert any("tfevents" in name for name in there)


def test_a_trained_model_is_loaded_from_the_uri_of_its_run_or_checkpoint(
    stored: TrainResult, trained_run: TrainResult
) -> None:
    assert stored.run_dir == f"{stored.experiment['run']['storage']}/stored"
    assert str(stored.best_checkpoint).startswith(f"{stored.run_dir}/checkpoints/epoch=")
    assert weights(stored.run_dir) == weights(stored.best_checkpoint) == weights(trained_run.run_dir)
    evaluated = TrainedVAE.load(stored.run_dir).evaluate("test")
    assert evaluated["test/nelbo"] == pytest.approx(stored.metrics["test/nelbo"], rel=1e-6)  # sums in another order


def test_commands_take_a_uri(
    store: ObjectStore, stored: TrainResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(stored.run_dir), "--out", str(tmp_path / "new.png")]) == 0
    assert (tmp_path / "new.png").stat().st_size > 1000
    assert main(["evaluate", str(stored.run_dir), "--metrics", "elbo"]) == 0
    assert len([name for name in store.names("stored") if re.fullmatch(r"evaluations/.*\.json", name)]) == 1
    capsys.readouterr()
    assert main(["generate", f"{stored.run_dir}-not", "--out", str(tmp_path / "no.png")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_finished_run_at_a_uri_is_refused_again_and_returned_with_resume(
    store: ObjectStore, stored: TrainResult
) -> None:
    with pytest.raises(UserError, match=r"run\.name: 'stored' is already used in s3://models/runs by this experiment"):
        train(at(store, "stored"))
    with pytest.raises(UserError, match=r"a different experiment \(optim\.lr: 0\.005 -> 0\.1\)"):
        train(at(store, "stored", **{"optim.lr": 0.1}))
    assert train(at(store, "stored"), resume=True).metrics == stored.metrics


def test_a_killed_run_at_a_uri_goes_on_to_the_same_weights(store: ObjectStore, tmp_path: Path) -> None:
    experiment = at(store, "killed", **{"training.epochs": 14})
    file = tmp_path / "experiment.yaml"
    file.write_text(experiment.to_yaml())
    process = subprocess.Popen([sys.executable, "-m", "vae_ray", "train", str(file)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len({name for name in store.names("killed") if name.startswith("images/samples/")}) < 3:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not store.names("killed") & {"summary.json"}
    result = train(experiment, resume=True)
    assert [line["epoch"] for line in result.history] == list(range(1, 15))
    undisturbed = train(experiment.with_overrides({"run.name": "undisturbed", "run.storage": str(tmp_path)}))
    assert weights(result.last_checkpoint) == weights(undisturbed.last_checkpoint)
    kept = {name.split("/")[1] for name in store.names("killed") if name.startswith("checkpoints/")}
    assert {str(result.last_checkpoint).rpartition("/")[2]} <= kept
    for name in kept:
        assert {n.rpartition("/")[2] for n in store.names("killed") if f"/{name}/" in n} == PACKAGE


def test_a_store_that_does_not_answer_for_a_while_costs_nothing(store: ObjectStore, stored: TrainResult) -> None:
    experiment = at(store, "patient", **{"training.epochs": 20})
    result: list[TrainResult] = []
    training = threading.Thread(target=lambda: result.append(train(experiment)))
    training.start()
    deadline = time.monotonic() + 60
    while "metrics.jsonl" not in store.names("patient"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    store.pause()
    time.sleep(8)
    store.resume()
    training.join(timeout=120)
    assert not training.is_alive()
    assert [line["epoch"] for line in result[0].history] == list(range(1, 21))
    assert TrainedVAE.load(result[0].last_checkpoint).checkpoint.epoch == 20


def test_a_run_at_a_uri_is_stopped_and_goes_on(store: ObjectStore, tmp_path: Path) -> None:
    experiment = at(store, "stopped", **{"training.epochs": 4000})
    file = tmp_path / "experiment.yaml"
    file.write_text(experiment.to_yaml())
    process = subprocess.Popen([sys.executable, "-m", "vae_ray", "train", str(file)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while "attempts.jsonl" not in store.names("stopped") or "metrics.jsonl" not in store.names("stopped"):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=30)[1]
    assert process.returncode == 130, stderr
    assert "vae-ray resume s3://models/runs/stopped" in stderr
    last = max(name for name in store.names("stopped") if name.endswith("/manifest.json"))
    assert last.startswith("checkpoints/epoch=")


def test_events_at_a_uri_stay_in_order_when_the_clock_is_set_back(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = at(store, "clock", **{"training.epochs": 1})
    train(experiment)
    first = {name for name in store.names("clock") if "tfevents" in name}
    now_ns = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() - 3600 * 10**9)
    train(experiment.with_overrides({"training.epochs": 2}), resume=True)
    events = {name for name in store.names("clock") if "tfevents" in name}
    for directory in ("tensorboard", "tensorboard/hparams"):
        before, after = (
            {name for name in names if name.rpartition("/")[0] == directory} for names in (first, events - first)
        )
        assert before
        assert after
        assert max(before) < min(after)


@pytest.mark.timeout(60)
def test_a_store_that_is_not_there_is_refused_within_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    started = time.monotonic()
    assert main(["train", "digits", "--storage", "s3://models/runs", "--workers.num", "0"]) == 2
    assert time.monotonic() - started < 15  # 10 s for the store, the rest for imports on a busy machine
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert "run.storage: got 's3://models/runs', cannot be written" in stderr


def test_raw_data_at_a_uri_are_copied_once_to_this_node(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mnist_root: Path
) -> None:
    raw = mnist_root / "MNIST" / "raw"
    for file in raw.glob("*-ubyte"):
        with filesystem().open_output_stream(f"models/data/MNIST/raw/{file.name}") as stream:
            stream.write(file.read_bytes())
    monkeypatch.setenv("VAE_RAY_CACHE", str(tmp_path))
    config = PublishedData(root="s3://models/data")
    assert len(open_split(config, "test")) == 10_000
    copies = {p: p.stat().st_ino for p in tmp_path.rglob("*-ubyte")}
    assert len(copies) == 4
    assert len(open_split(config, "train")) == 60_000
    assert {p: p.stat().st_ino for p in tmp_path.rglob("*-ubyte")} == copies
    with pytest.raises(UserError, match=r"data\.root: got 's3://models/none', which lacks MNIST/raw/"):
        open_split(PublishedData(root="s3://models/none"), "test")


def test_two_drivers_of_one_run_at_a_uri_exclude_each_other(store: ObjectStore) -> None:
    experiment = at(store, "shared", **{"training.epochs": 400})
    errors: list[BaseException] = []

    def drive() -> None:
        try:
            train(experiment)
        except Stopped as error:
            errors.append(error)

    first = threading.Thread(target=drive)
    first.start()
    while "attempts.jsonl" not in store.names("shared"):
        time.sleep(0.05)
    with pytest.raises(UserError, match="'shared' is running right now by process"):
        train(experiment, resume=True)
    RunDirectory.at(f"{store.uri}/shared", role="test").request_stop()
    first.join(timeout=60)
    assert not first.is_alive()
    assert len(errors) == 1
