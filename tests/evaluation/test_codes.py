"""System: the codes of all images as Parquet, whatever was killed on the way."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.storage.servers import ObjectStore, filesystem
from vae_ray import Experiment, TrainedVAE, UserError, train
from vae_ray.cli.main import main
from vae_ray.data.splits import Splits
from vae_ray.evaluation import codes
from vae_ray.evaluation.codes import MANIFEST
from vae_ray.evaluation.observations import Arrays, EvaluationBatch, Observation, observe_here

SIZES = {"train": 1338, "val": 100, "test": 359}


@pytest.fixture(scope="module")
def run(module_quick: Experiment) -> Path:
    """A run whose images are evaluated 16 at a time."""
    small = {"training.evaluation_batch_size": 16, "training.epochs": 1}
    return Path(train(module_quick.with_overrides(small)).run_dir)


@pytest.fixture
def model(run: Path, monkeypatch: pytest.MonkeyPatch) -> TrainedVAE:
    """Its model, and parts of 48 images."""
    monkeypatch.setattr(codes, "MOST_ROWS", 48)
    return TrainedVAE.load(run)


def arrays_of(location: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(location)
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def assert_whole(found: dict[str, np.ndarray]) -> None:
    """Every image of every split is there once, in order."""
    assert found["split"].tolist() == [split for split, num in SIZES.items() for _ in range(num)]
    assert found["number"].tolist() == [number for num in SIZES.values() for number in range(num)]


@pytest.mark.parametrize("name", ["codes.parquet", "directory"])
def test_codes_are_those_of_encode_and_labels_those_of_the_images(model: TrainedVAE, tmp_path: Path, name: str) -> None:
    written = model.write_codes(tmp_path / name, what="all")
    found = arrays_of(tmp_path / name)
    assert written.columns == [*found] == ["split", "number", "label", "code", "logvar", "z", "rate"]
    assert (written.num_images, written.num_found) == (SIZES, 0)
    assert_whole(found)
    splits = Splits.open(model.experiment)
    for split in SIZES:
        images, indices = splits.select(split)
        posterior = model.posterior(images.gather(indices))
        rows = found["split"] == split
        # products of batches of another size
        assert found["code"][rows] == pytest.approx(posterior.mean.numpy(), abs=1e-5)
        assert found["logvar"][rows] == pytest.approx(posterior.logvar.numpy(), abs=1e-5)  # type: ignore[attr-defined]
        assert found["label"][rows].tolist() == model.targets(split)["label"].tolist()
    terms = model.evaluate("test", "elbo").arrays
    assert found["rate"][found["split"] == "test"] == pytest.approx(terms["rate"], abs=1e-5)
    # z ~ q(z|x): its mean square distance is that of 8,985 standard normal numbers, whose own has deviation 0.015
    eps = (found["z"] - found["code"]) * np.exp(-0.5 * found["logvar"])
    assert np.square(eps).mean() == pytest.approx(1, abs=0.06)


def test_a_sample_is_the_z_of_all_and_one_split_a_part_of_all(model: TrainedVAE, tmp_path: Path) -> None:
    model.write_codes(tmp_path / "all.parquet", what="all")
    model.write_codes(tmp_path / "sample.parquet", what="sample", split="test")
    test, every = pq.read_table(tmp_path / "sample.parquet"), pq.read_table(tmp_path / "all.parquet")
    assert test["code"].to_pylist() == every.slice(len(every) - 359)["z"].to_pylist()
    assert str(test.schema.field("code").type) == "fixed_size_list<element: float>[5]"


def test_a_directory_and_a_file_have_the_same_rows_a_part_a_row_group(model: TrainedVAE, tmp_path: Path) -> None:
    model.write_codes(tmp_path / "directory")
    model.write_codes(tmp_path / "codes.parquet")
    parts = sorted((tmp_path / "directory").glob("part-*.parquet"))
    assert len(parts) == -(-1338 // 48) + -(-100 // 48) + -(-359 // 48)
    assert pq.ParquetFile(tmp_path / "codes.parquet").num_row_groups == len(parts)
    assert pq.read_table(tmp_path / "directory").equals(pq.read_table(tmp_path / "codes.parquet"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codes.parquet", "directory"]


def test_the_images_of_one_piece_are_in_memory_and_codes_of_one_part(
    model: TrainedVAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    unwritten: list[int] = [0]

    def counting(batch: EvaluationBatch) -> dict[str, torch.Tensor]:
        sizes.append(len(batch.x))
        return {"code": torch.zeros(len(batch.x), 5)}

    def run(whole: Observation) -> Iterator[tuple[int, Arrays]]:
        for number, arrays in observe_here(whole):
            unwritten.append(unwritten[-1] + len(arrays["code"]) - 48 * (unwritten[-1] >= 48))
            yield number, arrays

    monkeypatch.setitem(codes.WHAT, "mean", counting)
    model.write_codes(tmp_path / "codes.parquet", split="train", run=run)
    assert max(sizes) == 16
    assert max(unwritten) == 48


def test_pieces_that_arrive_in_any_order_give_the_same_bytes(model: TrainedVAE, tmp_path: Path) -> None:
    def shuffled(whole: Observation) -> Iterator[tuple[int, Arrays]]:
        found = list(observe_here(whole))
        random.Random(2).shuffle(found)
        yield from found

    seen: list[tuple[int, int]] = []
    model.write_codes(tmp_path / "order.parquet")
    model.write_codes(tmp_path / "any.parquet", run=shuffled, progress=lambda *numbers: seen.append(numbers))
    assert (tmp_path / "any.parquet").read_bytes() == (tmp_path / "order.parquet").read_bytes()
    assert seen[-1] == (1797, 1797)


SLOW = """
import sys, time
from vae_ray.evaluation import codes
from vae_ray.cli.main import main
from vae_ray.storage.directory import LocalDirectory
codes.MOST_ROWS = 48
write = LocalDirectory.write
def slowly(*arguments):
    time.sleep(0.02)
    write(*arguments)
LocalDirectory.write = slowly
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("name", ["codes.parquet", "directory"])
def test_an_encoding_that_was_killed_is_continued_no_row_twice_none_missing(
    model: TrainedVAE, run: Path, tmp_path: Path, name: str
) -> None:
    out, expected = tmp_path / name, tmp_path / f"never-killed-{name}"
    parts = tmp_path / f"{name}.parts" if name.endswith(".parquet") else out
    command = [sys.executable, "-c", SLOW, "encode", str(run), "--what", "all", "--out", str(out)]
    # as many threads as here: sums of products over others may differ in their last bits
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment)
    wanted = random.randint(1, 30)
    while len(list(parts.glob("part-*"))) < wanted:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    there = {path: path.stat().st_mtime_ns for path in parts.glob("part-*")}
    assert wanted <= len(there) < 40
    with pytest.raises(UserError, match=r"--out: .* has codes that differ from these in what; delete it"):
        model.write_codes(out, what="mean")
    model.write_codes(expected, what="all")
    written = model.write_codes(out, what="all")
    assert 16 <= written.num_found <= 48 * len(there)
    assert_whole(arrays_of(out))
    if out.is_dir():
        assert {path: path.stat().st_mtime_ns for path in there} == there  # not written again
        names = [path.name for path in sorted(out.iterdir()) if not path.name.startswith(".partial-")]
        assert [(out / each).read_bytes() for each in names] == [(expected / each).read_bytes() for each in names]
    else:
        assert out.read_bytes() == expected.read_bytes()
        assert not parts.exists()


def test_what_is_complete_is_not_encoded_again(model: TrainedVAE, tmp_path: Path) -> None:
    def nobody(whole: Observation) -> Iterator[tuple[int, Arrays]]:
        raise AssertionError

    for name in ("codes.parquet", "directory"):
        model.write_codes(tmp_path / name)
        assert model.write_codes(tmp_path / name, run=nobody).num_found == 1797


def test_codes_of_something_else_and_other_files_are_never_mixed_with(model: TrainedVAE, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    (tmp_path / "mine.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"--out: .*mine has other files, 'notes.txt' is one; choose a new directory"):
        model.write_codes(tmp_path / "mine")
    with pytest.raises(UserError, match=r"--out: .*mine.parquet is a file that encode has not written; choose another"):
        model.write_codes(tmp_path / "mine.parquet")
    model.write_codes(tmp_path / "directory")
    other = TrainedVAE(model.model, model.experiment.with_overrides({"run.seed": 5}), model.checkpoint)
    with pytest.raises(UserError, match=r"directory has codes that differ from these in images; delete it"):
        other.write_codes(tmp_path / "directory")
    (tmp_path / "directory" / "_manifest.json").write_bytes(b"{}")
    with pytest.raises(UserError, match=r"differ from these in weights"):
        model.write_codes(tmp_path / "directory")


def test_a_damaged_part_is_named_and_is_encoded_again_when_deleted(model: TrainedVAE, tmp_path: Path) -> None:
    model.write_codes(tmp_path / "expected.parquet")
    model.write_codes(tmp_path / "codes.parquet.parts")
    part = tmp_path / "codes.parquet.parts" / "part-00007.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(
        UserError, match=r"part-00007.parquet: damaged \(.*\); delete it and run the same command again"
    ):
        model.write_codes(tmp_path / "codes.parquet")
    part.unlink()
    assert model.write_codes(tmp_path / "codes.parquet").num_found == 1797 - 48
    assert (tmp_path / "codes.parquet").read_bytes() == (tmp_path / "expected.parquet").read_bytes()


def test_other_images_of_the_same_shape_are_encoded_all(tmp_path: Path, quick: Experiment) -> None:
    """Also where they are fewer than the run sets aside for validation."""
    pixels = np.random.default_rng(4).integers(0, 256, (70, 6, 7), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", images=np.concatenate([pixels, 255 - pixels]), labels=np.arange(140) % 4)
    np.savez(tmp_path / "others.npz", images=pixels[:20], labels=np.arange(20) % 3)
    np.savez(tmp_path / "larger.npz", images=np.zeros((9, 7, 7), np.uint8))
    own = {"data": {"source": "arrays", "root": str(tmp_path / "mine.npz"), "num_validation": 30}}
    run = train(Experiment.from_dict({**quick.to_dict(), **own, "training": {"epochs": 1}})).run_dir
    others = TrainedVAE.load(run, data={"data.root": str(tmp_path / "others.npz")})
    written = others.write_codes(tmp_path / "codes.parquet")
    assert set(written.num_images) == {"train", "test"}
    assert sum(written.num_images.values()) == 20
    found = arrays_of(tmp_path / "codes.parquet")
    images = [
        others.encode(
            Splits.open(others.experiment.with_overrides({"data.num_validation": 0})).select(split)[0].first(20)
        )
        for split in ("train", "test")
    ]
    assert found["code"] == pytest.approx(torch.cat(images).numpy(), abs=1e-5)
    assert sorted(found["label"]) == sorted(np.arange(20) % 3)
    with pytest.raises(UserError, match="these images have no validation split; try test, train or all"):
        others.write_codes(tmp_path / "no.parquet", split="val")
    larger = TrainedVAE.load(run, data={"data.root": str(tmp_path / "larger.npz")})
    with pytest.raises(UserError, match=r"images of shape \(1, 7, 7\), where the run's had \(1, 6, 7\)"):
        larger.write_codes(tmp_path / "no.parquet")


def test_from_and_to_a_uri(store: ObjectStore, model: TrainedVAE, tmp_path: Path) -> None:
    model.write_codes(tmp_path / "codes.parquet", split="test")
    for _ in range(2):  # written, and found complete
        model.write_codes(f"{store.uri}/encoded/codes.parquet", split="test")
        model.write_codes(f"{store.uri}/encoded/directory", split="test")
    assert {name for name in store.names("encoded") if "part-" not in name} == {
        "codes.parquet",
        f"directory/{MANIFEST}",
    }
    with filesystem().open_input_file(f"{store.uri.removeprefix('s3://')}/encoded/codes.parquet") as file:
        assert file.read() == (tmp_path / "codes.parquet").read_bytes()


def test_the_command_answers_with_numbers_and_columns(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["encode", str(run), "--out", str(tmp_path / "codes.parquet"), "--split", "test"]
    assert main([*command, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["num_images"], answer["columns"]) == ({"test": 359}, ["split", "number", "label", "code"])
    assert main(command) == 0
    assert "359 test; 359 of them by an earlier call" in capsys.readouterr().out
    assert main([*command, "--what", "mode"]) == 2
    assert main(["encode", str(run)]) == 2
