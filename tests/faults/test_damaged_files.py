"""Hundreds of damaged files: never a silent load; the file is named, and what is good is used instead."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data_layer.stored import labels_of, open_split, pixels_of
from tests.faults.conftest import Count
from tests.faults.damage import damages, fresh_copy
from tests.faults.test_kills_at_every_operation import outcome, tiny
from vae_ray import Experiment, TrainedVAE, UserError, train
from vae_ray.checkpoints.listing import complete_checkpoints
from vae_ray.checkpoints.loading import read_checkpoint
from vae_ray.config.sections.data import DigitsData, PublishedData
from vae_ray.data.cache import open_dataset
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.runs.train import resume
from vae_ray.tuning.directory import SweepDirectory

pytestmark = pytest.mark.faults

CHECKPOINT_FILES = (
    "manifest.json",
    "experiment.json",
    "weights.safetensors",
    "averaged.safetensors",
    "training_state.safetensors",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three epochs; its first two are the best, so that all checkpoints are kept."""
    result = train(tiny(tmp_path_factory.mktemp("damaged")).with_overrides({"run.checkpoints_kept": 3}))
    assert len(complete_checkpoints(result.run_dir / "checkpoints")) == 3
    return result.run_dir


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_a_damaged_checkpoint_is_refused_by_name_and_skipped_by_the_run(
    run: Path, name: str, tmp_path: Path, fault_counts: Count, caplog: pytest.LogCaptureFixture
) -> None:
    """Given itself it is refused in one line; given its run, the best of the others is loaded, with a warning."""
    best = TrainedVAE.load(run).checkpoint.path
    content = (best / name).read_bytes()
    tried = 0
    for what, damage in damages(content, seed=1, num_cuts=20, num_flips=30):
        copy = fresh_copy(run, tmp_path / "run")
        checkpoint = copy / "checkpoints" / best.name
        damage(checkpoint / name)
        with pytest.raises(UserError, match=rf"{name}|has no manifest") as refusal:
            read_checkpoint(checkpoint).in_memory()
        assert "\n" not in str(refusal.value)
        caplog.clear()
        loaded = TrainedVAE.load(copy).checkpoint.path
        is_needed = name not in ("manifest.json", "training_state.safetensors")
        assert loaded != checkpoint or name == "training_state.safetensors", what
        assert not is_needed or str(checkpoint / name) in caplog.text, what
        tried += 1
    fault_counts("damaged file", tried=tried, survived=tried, note="checkpoints")


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_a_run_whose_newest_checkpoint_is_damaged_continues_from_the_one_before_to_the_same_bits(
    run: Path, name: str, tmp_path: Path, fault_counts: Count, caplog: pytest.LogCaptureFixture
) -> None:
    expected, tried = outcome(run), 0
    content = (run / "checkpoints" / "epoch=0003" / name).read_bytes()
    for what, damage in damages(content, seed=2, num_cuts=0, num_flips=1):
        copy = fresh_copy(run, tmp_path / "run")
        (copy / "summary.json").unlink()
        damage(copy / "checkpoints" / "epoch=0003" / name)
        caplog.clear()
        resume(copy)
        assert "renamed to .damaged-epoch=0003" in caplog.text, what
        assert (copy / "checkpoints" / ".damaged-epoch=0003").is_dir()
        found = outcome(copy)
        found["checkpoints"].remove(".damaged-epoch=0003")
        assert found == expected, what
        tried += 1
    fault_counts("damaged file", tried=tried, survived=tried, note="newest checkpoints of runs that continue")


@pytest.mark.parametrize("name", ["dataset.json", "sums.npz", "test-00000.arrow", "test.rows"])
@pytest.mark.parametrize("was_verified", [True, False], ids=["verified before", "not verified before"])
def test_a_damaged_cache_is_prepared_again(
    name: str, was_verified: bool, tmp_path: Path, fault_counts: Count, caplog: pytest.LogCaptureFixture
) -> None:
    """Also by a node whose note says that it has verified the file: what was damaged has another time or inode."""
    whole, copied_cache = tmp_path / "whole", DigitsData(cache_dir=tmp_path / "copy")
    pixels = pixels_of(open_split(DigitsData(cache_dir=whole), "test")).copy()
    (relative,) = (file.relative_to(whole) for file in whole.rglob(name))
    content, tried = (whole / relative).read_bytes(), 0
    for what, damage in damages(content, seed=3, num_cuts=10, num_flips=15):
        file = fresh_copy(whole, tmp_path / "copy") / relative
        if was_verified:
            open_dataset(copied_cache)
        damage(file)
        caplog.clear()
        dataset = open_dataset(copied_cache)
        assert (what, name) == ("gone", "dataset.json") or str(file) in caplog.text, what
        assert (pixels_of(dataset.splits["test"]) == pixels).all(), what
        assert file.read_bytes() == content, what
        caplog.clear()
        open_dataset(copied_cache)
        assert caplog.text == "", what
        tried += 1
    fault_counts("damaged file", tried=tried, survived=tried, note="data cache")


@pytest.mark.parametrize("prefix", ["t10k-images-idx3", "t10k-labels-idx1"])
def test_damaged_raw_files_are_refused_by_name_or_are_other_data(
    prefix: str, tmp_path: Path, fault_counts: Count, mnist_raw: Callable[[Path], None]
) -> None:
    """A pixel of a raw file that nobody has published is as good as any other: it is read as it stands, never cached
    under the name of what it was before."""
    raw = tmp_path / "whole" / "MNIST" / "raw"
    mnist_raw(raw)
    name, tried = f"{prefix}-ubyte", 0
    cache = tmp_path / "cache"
    for what, damage in damages((raw / name).read_bytes(), seed=4, num_cuts=15, num_flips=15):
        copy = fresh_copy(tmp_path / "whole", tmp_path / "copy")
        file = copy / "MNIST" / "raw" / name
        damage(file)
        config = PublishedData(root=str(copy), download=False, cache_dir=cache)
        try:
            opened = open_split(config, "test")
        except UserError as error:
            assert "MNIST" in str(error), what
            assert "\n" not in str(error)
        else:
            content = (pixels_of(opened) if "images" in prefix else labels_of(opened).astype(np.uint8)).tobytes()
            assert content == file.read_bytes()[-len(content) :], what
        tried += 1
    fault_counts("damaged file", tried=tried, survived=tried, note="raw files")


@pytest.mark.mnist
def test_a_changed_pixel_of_the_published_mnist_is_named(
    mnist_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault_counts: Count
) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in (mnist_root / "MNIST" / "raw").glob("*-ubyte"):
        (raw / file.name).symlink_to(file)
    images = raw / "t10k-images-idx3-ubyte"
    content = bytearray(images.read_bytes())
    content[5000] ^= 1
    images.unlink()
    images.write_bytes(content)
    open_split(PublishedData(root=str(tmp_path), download=False, cache_dir=tmp_path / "cache"), "test")
    assert f"{images}: is not the published file" in caplog.text
    fault_counts("damaged file", tried=1, survived=1, note="published MNIST")


def test_a_damaged_experiment_is_refused_or_says_the_same(run: Path, tmp_path: Path, fault_counts: Count) -> None:
    """Resuming compares it with the experiment given: a change of meaning is a refusal, one of a comment is none."""
    given = Experiment.from_file(run / "experiment.yaml").with_overrides(
        {"run.storage": str(tmp_path), "run.name": "run"}
    )
    tried = 0
    expected = outcome(run)
    for what, damage in damages((run / "experiment.yaml").read_bytes(), seed=5, num_cuts=20, num_flips=40):
        copy = fresh_copy(run, tmp_path / "run")
        damage(copy / "experiment.yaml")
        try:
            train(given, resume=True)
        except UserError as error:
            assert "\n" not in str(error), what
            assert "experiment.yaml: " in str(error) or "run" in str(error), what
        assert outcome(copy) == expected, what
        tried += 1
    fault_counts("damaged file", tried=tried, survived=tried, note="experiment.yaml")


def test_a_damaged_summary_is_refused_by_name(run: Path, tmp_path: Path, fault_counts: Count) -> None:
    whole, tried = RunDirectory(run).records.summary(), 0
    for what, damage in damages((run / "summary.json").read_bytes(), seed=6, num_cuts=20, num_flips=40):
        copy = RunDirectory(fresh_copy(run, tmp_path / "run"))
        damage(copy.records.summary_file)
        try:
            found = copy.records.summary()
        except UserError as error:
            assert "summary.json" in str(error), what
        else:
            assert found == ({} if what == "gone" else whole), what  # the last line end says nothing
        tried += 1
    assert whole["best_epoch"]
    fault_counts("damaged file", tried=tried, survived=tried, note="summary.json")


def test_damaged_lines_of_metrics_are_left_out_with_a_warning_and_no_other(
    run: Path, tmp_path: Path, fault_counts: Count, caplog: pytest.LogCaptureFixture
) -> None:
    whole, tried = RunDirectory(run).records.history(), 0
    for what, damage in damages((run / "metrics.jsonl").read_bytes(), seed=7, num_cuts=20, num_flips=40):
        copy = RunDirectory(fresh_copy(run, tmp_path / "run"))
        damage(copy.records.metrics_file)
        caplog.clear()
        try:
            found = copy.records.history()
        except UserError as error:
            assert "metrics.jsonl" in str(error)
        else:
            assert all(line in whole for line in found), what
            if "flipped" in what:
                assert len(found) >= len(whole) - 2, what  # a flipped line end takes two lines with it
            copy.records.truncate_to_epoch(len(whole))  # what a resumed run does
            assert found == whole or "metrics.jsonl" in caplog.text, what
        tried += 1
    fault_counts("damaged file", tried=tried, survived=tried, note="metrics.jsonl")


def sweep_in(path: Path) -> SweepDirectory:
    path.mkdir()
    directory = SweepDirectory(path)
    keys = {"search": {"optim.lr": {"uniform": [0.1, 0.2]}}, "metrics": ["val/nelbo"], "num_trials": 6}
    directory.write_description(
        {"experiment": Experiment().to_dict(), **keys, "scheduler": "none", "searcher": "random"}
    )
    for number in range(6):
        proposal = {"trial": f"{number:04d}", "event": "proposed", "overrides": {"optim.lr": 0.1 + 0.01 * number}}
        directory.append_to_journal(proposal)
    return directory


@pytest.mark.parametrize("name", ["sweep.yaml", "trials.jsonl"])
def test_a_damaged_sweep_is_named_and_never_another_sweep(
    name: str, tmp_path: Path, fault_counts: Count, caplog: pytest.LogCaptureFixture
) -> None:
    whole = sweep_in(tmp_path / "whole")
    description, journal, tried = whole.description(), whole.journal(), 0
    for what, damage in damages((whole.path / name).read_bytes(), seed=8, num_cuts=20, num_flips=40):
        copy = SweepDirectory(fresh_copy(whole.path, tmp_path / "copy"))
        damage(copy.path / name)
        caplog.clear()
        try:
            assert copy.description() == description, what
            found = copy.journal()
        except UserError as error:
            assert name in str(error), what
            assert "\n" not in str(error), what
        else:
            assert all(entry in journal for entry in found), what
            is_cut = what.startswith("cut") or what in ("gone", "empty")  # as a kill leaves it
            assert found == journal or is_cut or name in caplog.text, what
        tried += 1
    fault_counts("damaged file", tried=tried, survived=tried, note=name)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_any_byte_of_a_checkpoint_is_found(run: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(CHECKPOINT_FILES))
    file = run / "checkpoints" / "epoch=0001" / name
    content = file.read_bytes()
    start = data.draw(st.integers(0, len(content) - 1))
    end = data.draw(st.integers(start, min(len(content), start + 64)))
    changed = content[:start] + data.draw(st.binary(max_size=64)) + content[end:]
    try:
        file.write_bytes(changed)
        if changed == content:
            read_checkpoint(file.parent).in_memory()
        else:
            with pytest.raises(UserError):
                checkpoint = read_checkpoint(file.parent)
                checkpoint.in_memory()
                # the manifest is JSON: other spaces or escapes say the same
                assert name == "manifest.json"
                assert json.loads(changed) == json.loads(content)
                raise UserError("the same")
    finally:
        file.write_bytes(content)


def test_a_checkpoint_that_cannot_be_read_now_is_not_renamed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault_counts: Count
) -> None:
    """A storage that is away for a while is no damage."""
    copy = fresh_copy(run, tmp_path / "run")
    (copy / "summary.json").unlink()

    def away(file: Any, *args: Any, **kwargs: Any) -> int:
        if str(file).endswith(("weights.safetensors", "manifest.json")):
            raise OSError(5, "Input/output error")
        return opened(file, *args, **kwargs)

    opened = os.open
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", away)
        with pytest.raises(UserError, match="Input/output error"):
            resume(copy)
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == [f"epoch=000{n}" for n in (1, 2, 3)]
    fault_counts("damaged file", tried=1, survived=1)
