"""The directory of a Ray that starts here: each reason why Ray could not use it is named before anything starts."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vae_ray.cli.main import main
from vae_ray.distributed import ray_temp_dir
from vae_ray.distributed.ray_temp_dir import MAX_SOCKET_BYTES, SOCKET, temp_dir_problem

TRAIN = ["train", "digits", "--workers.num=1", "--workers.cpus=1", "--dry-run"]


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)


def refused(variable: str, directory: str, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of `train`, of which `doctor` has the cause too."""
    patch.setenv(variable, directory)
    assert main(TRAIN) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"vae-ray: {variable}: Ray's directory {directory}/ray ")
    assert line.count("\n") == 1
    main(["doctor"])
    (finding,) = (found for found in capsys.readouterr().out.splitlines() if found.split()[1] == "disk")
    assert finding.startswith("error ")
    assert line.partition(";")[0].partition("Ray's")[2] in finding
    return line


def test_a_path_too_long_for_sockets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    longest = MAX_SOCKET_BYTES - len(SOCKET) - len("/ray/")
    assert temp_dir_problem(Path("/" + (longest - 1) * "x", "ray")) == ""
    line = refused("RAY_TMPDIR", "/" + (longest + 1) * "x", monkeypatch, capsys)
    assert "is 2 bytes too long for the paths of Ray's sockets; set RAY_TMPDIR to a short path" in line


def test_a_relative_path(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not an absolute path" in refused("RAY_TMPDIR", "here", monkeypatch, capsys)


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_file(variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    directory = os.path.realpath("/dev/null")  # the paths of tests are too long
    assert "cannot be used (Not a directory)" in refused(variable, directory, monkeypatch, capsys)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_what_cannot_be_written(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk, a quota, a read-only file system, another user's directory."""

    def fail(dir: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(ray_temp_dir.tempfile, "TemporaryFile", fail)
    line = refused("RAY_TMPDIR", "/tmp", monkeypatch, capsys)
    assert f"cannot be used ({os.strerror(number)})" in line


def test_a_check_leaves_nothing(tmp_path: Path) -> None:
    temp_dir_problem(tmp_path)
    assert list(tmp_path.iterdir()) == []
