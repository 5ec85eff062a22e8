"""docs/data.md: every command and example is run as it is printed, on a few small images; every key is explained."""

from __future__ import annotations

import re
import shlex
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from vae_ray.cli.main import main
from vae_ray.config.sections.data import DataConfig, ImagesData
from vae_ray.data.sources.sprites import Sprites

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, flags=re.M | re.S)
LINES = [line for language, block in BLOCKS if not language for line in block.splitlines()]
COMMANDS = [line.partition("  #")[0] for line in LINES if line.startswith("vae-ray")]
HERE = [command for command in COMMANDS if " submit " not in command and "--data.source" not in command]
PYTHON = [block for language, block in BLOCKS if language == "python"]
TINY = [
    *("--training.epochs", "1", "--training.global-batch-size", "8", "--model.network.hidden", "8,8"),
    *("--workers.num", "0", "--json"),
]
NUM = 40


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the page's commands, with everything that they name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VAE_RAY_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(3)
    images = random.integers(0, 256, (NUM, 20, 24, 3), dtype=np.uint8)
    labels = np.arange(NUM) % 2
    for number, image in enumerate(images):
        folder = tmp_path / "photos" / ("cat" if labels[number] else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:02d}.png")
    with zipfile.ZipFile("photos.zip", "w") as archive, tarfile.open("photos.tar", "w") as tar:
        for file in sorted(Path("photos").rglob("*.png")):
            archive.write(file)
            tar.add(file)
    np.savez("arrays.npz", images=images, labels=labels)
    np.save("cells.npy", random.integers(0, 4096, (NUM, 64, 64), dtype=np.uint16))
    with h5py.File("scans.h5", "w") as file:
        file["slices"], file["organ"] = images, labels
    structs = [{"bytes": file.read_bytes(), "path": file.name} for file in sorted(Path("photos").rglob("*.png"))]
    table = pa.table({"image": structs, "animal": [["dog", "cat"][label] for label in labels]})
    Path("parquet").mkdir()
    for target in ("data.parquet", "parquet/part.parquet"):
        pyarrow.parquet.write_table(table, target)
    return tmp_path


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    "command", [each for each in COMMANDS if " submit " not in each and "--data.source" not in each]
)
def test_a_command_of_the_page_works(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command)[1:]
    assert main([*words, *(TINY if words[0] == "train" else [])]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("source", ["cifar10", "svhn"])
def test_a_command_for_a_published_set_names_the_file_that_it_needs(
    source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (command,) = (each for each in COMMANDS if f"--data.source {source} " in each)
    assert main([*shlex.split(command)[1:], *TINY]) == 2
    assert f"data.source {source}: file" in capsys.readouterr().err


@pytest.mark.usefixtures("place")
def test_the_command_for_sprites_works(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    parts = Sprites.parts
    monkeypatch.setattr(Sprites, "parts", lambda source, num_rows: iter([next(parts(source, 300))]))
    (command,) = (each for each in COMMANDS if "--data.source sprites" in each)
    assert main([*shlex.split(command)[1:], *TINY]) == 0, capsys.readouterr().err


@pytest.mark.usefixtures("place")
def test_the_python_example_works() -> None:
    (example,) = PYTHON
    small = '"training.epochs": 1, "training.global_batch_size": 8, "run.name": "x"'
    images = np.random.default_rng(0).random((NUM, 12, 12))
    exec(example.replace('"training.epochs": 1', small), {"images": images, "labels": ["a", "b"] * (NUM // 2)})
    assert Path("runs/x/summary.json").exists()


def test_every_kind_of_source_has_at_least_three_commands() -> None:
    text = "\n".join(COMMANDS)
    for names in (("photos",), ("arrays.npz", "cells.npy", "scans.h5"), ("parquet",), ("cifar10", "svhn", "sprites")):
        assert sum(text.count(name) for name in names) >= 3, names


def test_every_key_of_a_user_s_own_images_has_its_meaning() -> None:
    for key in {*ImagesData.model_fields, *DataConfig.model_fields}:
        assert f"`data.{key}`" in PAGE, key
