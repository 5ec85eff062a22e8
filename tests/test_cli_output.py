"""System: output of a real process in any encoding, into a pipe that nobody reads, and onto a disk that is full."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vae_ray import TrainResult

VAE_RAY = [sys.executable, "-m", "vae_ray"]
IN_THE_TREE = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0"}


def run(*arguments: str | bytes, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*VAE_RAY, *arguments], env=os.environ | environment, capture_output=True, timeout=120)


@pytest.mark.parametrize("environment", [ASCII, {"PYTHONIOENCODING": "latin-1"}])
def test_a_run_in_a_directory_of_any_name(environment: dict[str, str], tmp_path: Path) -> None:
    """In ASCII as well: its files have the name that was given, and what is printed is escaped if need be."""
    storage = os.fsencode(tmp_path / "Läufe-μ")
    here = (b"--storage", storage, "--workers.num=0", "--training.epochs=1")
    done = run("train", "digits", "--name=x", *here, **environment)
    assert done.returncode == 0, done.stderr
    assert os.path.isfile(storage + b"/x/summary.json")
    path = json.loads(run("evaluate", storage + b"/x", "--json", **environment).stdout)["checkpoint"]
    assert path.startswith(str(tmp_path / "Läufe-μ/x"))
    assert run("train", "digits", "--dry-run", *here, **environment).returncode == 0
    again = run("train", "digits", "--name=x", *here, **environment)
    assert again.returncode == 2
    assert again.stderr.startswith(b"vae-ray: run.name: 'x' is already used in ")
    assert again.stderr.count(b"\n") == 1


@pytest.mark.parametrize("environment", [ASCII, {}])
def test_a_name_that_is_no_text_is_one_line(environment: dict[str, str], tmp_path: Path) -> None:
    done = run(
        "train", "digits", "--workers.num=0", b"--storage=" + os.fsencode(tmp_path) + b"/L\xe4ufe", **environment
    )
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert b"run.storage: got" in done.stderr
    assert b"printable" in done.stderr


@pytest.mark.parametrize("command", ["--help", "train --help", "presets", "presets --json", "evaluate RUN"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_is_gone_ends_the_command_as_a_shell_expects(
    command: str, unbuffered: str, trained_run: TrainResult
) -> None:
    arguments = command.replace("RUN", str(trained_run.run_dir)).split()
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*VAE_RAY, *arguments], stdout=writer, stderr=subprocess.PIPE, env=environment, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["presets"]])
def test_an_answer_that_cannot_be_written_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*VAE_RAY, *arguments], stdout=full, stderr=subprocess.PIPE, timeout=120)
    assert (done.returncode, done.stderr) == (1, b"vae-ray: stdout: No space left on device\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_run_whose_streams_are_closed_ends_as_any_other(closed: str, tmp_path: Path) -> None:
    command = (
        f"{sys.executable} -m vae_ray train digits --workers.num=0 --training.epochs=1 --name=x --storage=s {closed}"
    )
    assert subprocess.run(["sh", "-c", command], cwd=tmp_path, env=IN_THE_TREE, timeout=120).returncode == 0
    assert (tmp_path / "s" / "x" / "summary.json").is_file()


def test_a_reader_of_progress_that_is_gone_does_not_end_the_run(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    arguments = ["train", "digits", "--workers.num=0", "--training.epochs=2", "--name=x", f"--storage={tmp_path}"]
    done = subprocess.run([*VAE_RAY, *arguments], stdout=subprocess.PIPE, stderr=writer, timeout=120)
    os.close(writer)
    assert done.returncode == 0
    assert b"best checkpoint" in done.stdout
    assert (tmp_path / "x" / "summary.json").is_file()


@pytest.mark.parametrize("command", ["train digits", "evaluate RUN", "doctor"])
def test_a_working_directory_that_was_deleted_is_one_line(
    command: str, trained_run: TrainResult, tmp_path: Path
) -> None:
    arguments = command.replace("RUN", str(trained_run.run_dir))
    script = f"mkdir gone && cd gone && rmdir ../gone && exec {sys.executable} -m vae_ray {arguments}"
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, env=IN_THE_TREE, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (2, b"vae-ray: the working directory was deleted; cd to another one\n")
