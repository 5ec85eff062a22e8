"""What the README says exists: keys, commands, files of a run, pictures. (Its Python runs in tests/distributed.)"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from vae_ray import TrainResult
from vae_ray.cli.main import main
from vae_ray.config.experiment import field_docs, preset_names

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """The `vae-ray train ...` lines of the README's code blocks, as arguments; the synopsis is not one."""
    without_python = re.sub(r"^```python\n.*?^```\n", "", README, flags=re.M | re.S)
    blocks = re.findall(r"^```\n(.*?)^```", without_python, flags=re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("vae-ray train")]
    return [shlex.split(line.partition("vae-ray ")[2].partition("#")[0]) for line in lines]


def test_every_key_in_the_readme_is_one_of_the_experiment() -> None:
    known = {doc.key for doc in field_docs()}
    mentioned = {key.replace("-", "_") for key in re.findall(r"--([a-z]+\.[a-z][a-z-]*)", README)}
    assert len(mentioned) > 5
    assert mentioned <= known


@pytest.mark.parametrize("arguments", [words for words in commands() if words[1] == "digits"], ids=" ".join)
def test_a_train_command_of_the_readme_is_accepted(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--storage", str(tmp_path), "--dry-run"]) == 0, capsys.readouterr().err


@pytest.mark.mnist
@pytest.mark.parametrize("arguments", [words for words in commands() if words[1] == "mnist"], ids=" ".join)
def test_a_train_command_with_mnist_is_accepted(
    arguments: list[str], mnist_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # in this process: a machine of one core must accept the commands too
    options = ["--data.root", str(mnist_root), "--storage", str(tmp_path), "--workers.num=0", "--dry-run"]
    assert main([*arguments, *options]) == 0, capsys.readouterr().err


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 3
    assert {words[1] for words in commands()} <= set(preset_names())


def test_the_readme_fits_a_screen() -> None:
    assert len(README.splitlines()) <= 100


def test_the_files_that_a_run_leaves_are_those_in_the_readme(trained_run: TrainResult) -> None:
    tree = re.search(r"^runs/NAME/\n(.*?)^```", README, flags=re.M | re.S)
    assert tree is not None
    names = [line.split()[0] for line in tree.group(1).splitlines()]
    assert [name for name in names if not (Path(trained_run.run_dir) / _at_epoch(name)).exists()] == []
    found = {path.name for path in Path(trained_run.run_dir).iterdir() if not path.name.startswith(".")}
    assert found - {"evaluations"} == {name.partition("/")[0] for name in names}  # of other tests


def _at_epoch(name: str) -> str:
    return re.sub(r"epoch=\d+", "epoch=0003", name)


def test_the_pictures_of_the_readme_are_there() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert len(pictures) >= 2
    assert [name for name in pictures if not (REPOSITORY / name).read_bytes().startswith(b"\x89PNG")] == []
