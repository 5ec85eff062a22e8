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
    blocks = re.findall(r"^```\n(.*?)^```", README, flags=re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines() if "vae-ray train" in line and "|" not in line]
    return [shlex.split(line.partition("vae-ray ")[2].partition("#")[0]) for line in lines]


def test_every_key_in_the_readme_is_one_of_the_experiment() -> None:
    known = {doc.key for doc in field_docs()}
    mentioned = {key.replace("-", "_") for key in re.findall(r"--([a-z]+\.[a-z][a-z-]*)", README)}
    assert len(mentioned) > 5
    assert mentioned <= known


@pytest.mark.mnist
def test_the_readmes_train_commands_are_accepted(
    mnist_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checked = 0
    for arguments in commands():
        if arguments[1] not in preset_names():  # a file that only a finished run has
            continue
        # one worker: a machine of one core must accept the commands too
        given = [argument for argument in arguments if argument != "--resume"]
        answer = main(
            [*given, "--data.root", str(mnist_root), "--storage", str(tmp_path), "--workers.num=1", "--dry-run"]
        )
        assert answer == 0, capsys.readouterr().err
        checked += 1
    assert checked >= 3


def test_the_files_that_a_run_leaves_are_those_in_the_readme(trained_run: TrainResult) -> None:
    tree = re.search(r"^runs/NAME/\n(.*?)^```", README, flags=re.M | re.S)
    assert tree is not None
    names = [line.split()[0] for line in tree.group(1).splitlines()]
    names.remove("warnings.jsonl")  # this run has warned of nothing
    checkpoint = [name for name in names if not (trained_run.run_dir / _at_epoch(name)).exists()]
    assert [name for name in checkpoint if not (trained_run.last_checkpoint / name).exists()] == []
    shown = {_at_epoch(name).split("/")[0] for name in names if name not in checkpoint}
    found = {path.name for path in trained_run.run_dir.iterdir() if not path.name.startswith(".")}
    assert found == shown


def _at_epoch(name: str) -> str:
    return re.sub(r"epoch=\d+", "epoch=0003", name)


def test_the_pictures_of_the_readme_are_there() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert len(pictures) >= 2
    assert [name for name in pictures if not (REPOSITORY / name).read_bytes().startswith(b"\x89PNG")] == []
