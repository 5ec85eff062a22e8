"""Truth: what a location means, as a user may write it; refused is what would be written somewhere else."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pyarrow.fs
import pytest

from vae_ray import Experiment, TrainResult
from vae_ray.cli.main import main
from vae_ray.errors import UserError
from vae_ray.storage.locations import absolute, cache_root, local_path, parse_location

MEANINGS = {
    "runs": "runs",
    "/x/a#b": "/x/a#b",
    "~/runs": "~/runs",
    "file:///x/a": "/x/a",
    "file:/x/a": "/x/a",
    "FILE://localhost/x/a": "/x/a",
    "file:///x/a%20b%23c%25": "/x/a b#c%",
    "file:///x/L%C3%A4ufe": "/x/Läufe",
    "s3://bucket/a%20b?region=x": "s3://bucket/a%20b?region=x",
    "S3://bucket/a": "s3://bucket/a",
    "c:/runs": "c:/runs",
}


@pytest.mark.parametrize("text", MEANINGS)
def test_a_location_is_a_path_or_the_uri_of_an_object_store(text: str) -> None:
    assert parse_location(text) == MEANINGS[text]
    assert Experiment().with_overrides({"run.storage": text}).run.storage == MEANINGS[text]


@pytest.mark.parametrize("text", [text for text in MEANINGS if text.startswith("file://") and "local" not in text])
def test_a_file_uri_means_what_pyarrow_takes_it_for(text: str) -> None:
    assert parse_location(text) == pyarrow.fs.FileSystem.from_uri(text)[1]


REFUSED = {
    "file:///x/a#b": "'#', which is written %23",
    "s3://bucket/a#b": "'#', which is written %23",
    "file:///x/a?b": "'?' is written %3F",
    "file:///x/100%": "'%' is written %25",
    "file://host/x/a": "file:///PATH, which is a path of this machine",
    "file://runs": "file:///PATH, which is a path of this machine",
    "file:///x/%00": "file:///PATH, which is a path of this machine",
    "s3:/bucket/a": "should begin with s3:// if it is a URI, or with ./ if it is a path",
}


@pytest.mark.parametrize("text", REFUSED)
@pytest.mark.parametrize("key", ["run.storage", "data.root", "run.initial_weights", "data.cache_dir"])
def test_a_uri_that_means_something_else_is_refused(text: str, key: str) -> None:
    with pytest.raises(UserError, match=f"^{key}: got ") as error:
        Experiment.preset("mnist").with_overrides({key: text})
    assert REFUSED[text] in str(error.value)


@pytest.mark.parametrize("command", ["evaluate", "resume", "report", "train", "doctor --json --storage"])
def test_every_command_refuses_it_in_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main([*command.split(), "file://host/x"])
    out, err = capsys.readouterr()
    assert code == (1 if command.startswith("doctor") else 2)
    assert "got 'file://host/x', should be file:///PATH, which is a path of this machine" in out + err


@pytest.mark.parametrize("text", ["s3://bucket/cache", "gs://bucket/cache"])
def test_what_must_be_a_path_of_this_machine_is_no_uri(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"data.cache_dir: got .* should be a path of this machine"):
        Experiment().with_overrides({"data.cache_dir": text})
    monkeypatch.setenv("VAE_RAY_CACHE", text)
    with pytest.raises(UserError, match=r"VAE_RAY_CACHE: got .* should be a path of this machine"):
        cache_root()


def test_a_run_is_found_by_its_file_uri(trained_run: TrainResult, capsys: pytest.CaptureFixture[str]) -> None:
    uri = Path(trained_run.run_dir).as_uri()
    assert main(["evaluate", uri]) == 0
    assert "nats" in capsys.readouterr().out


COMMANDS = (
    "train digits --dry-run --storage TILDE",
    "train digits --workers.num 0 --storage TILDE",
    "train digits --workers.num 0 --data.cache-dir TILDE",
    "train mnist --workers.num 0 --data.root TILDE",
    "train digits --workers.num 0 --run.initial-weights TILDE",
    "train TILDE",
    "sweep digits --storage TILDE",
    "sweep digits --search TILDE",
    "resume TILDE",
    "report TILDE",
    "evaluate TILDE",
    "generate RUN --out TILDE",
    "submit train digits --storage /shared --working-dir TILDE",
)


def without_home(patch: pytest.MonkeyPatch) -> None:
    def no_entry(uid: int) -> None:
        raise KeyError(uid)

    patch.delenv("HOME", raising=False)
    patch.setattr(pwd, "getpwuid", no_entry)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("tilde", ["~nosuchuser/x", "~/x"])
def test_a_home_that_does_not_exist_is_one_line_and_exit_code_2(
    command: str,
    tilde: str,
    trained_run: TrainResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("VAE_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    without_home(monkeypatch)
    words = {"TILDE": tilde, "RUN": str(trained_run.run_dir)}
    assert main([words.get(word, word) for word in command.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    reason = "there is no user 'nosuchuser' here" if "nosuch" in tilde else "this process has no home directory"
    assert f"got {tilde!r}, but {reason}" in err
    assert not any(path.name.startswith("~") for path in tmp_path.rglob("*"))


def test_a_cache_without_a_home_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("VAE_RAY_CACHE", raising=False)
    without_home(monkeypatch)
    assert main(["train", "digits", "--workers.num", "0", "--storage", str(tmp_path / "runs")]) == 2
    assert "VAE_RAY_CACHE: not set, and this user has no home directory" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train digits --workers.num 1", "sweep digits", "doctor"])
def test_ray_without_a_home_is_one_line(command: str, tmp_path: Path) -> None:
    """Importing ray.train without one is a RuntimeError."""
    without = "import os, pwd; os.environ.pop('HOME', None); pwd.getpwuid = {}.__getitem__"
    arguments = [*command.split(), *(["--storage", "runs"] if command.split()[0] in ("train", "sweep") else [])]
    script = f"{without}; from vae_ray.cli.main import run; run({arguments!r})"
    environment = os.environ | {"VAE_RAY_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, "")
    *progress, line = done.stderr.splitlines()
    assert line.startswith("vae-ray: HOME: not set, and this user has no home directory, which Ray needs")
    assert [each for each in progress if not each.startswith("preparing images: ")] == []  # on a busy machine
    assert list(tmp_path.glob("runs/*")) == []


def test_a_home_is_the_same_for_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("VAE_RAY_CACHE", "~/cache")
    assert cache_root() == tmp_path / "cache"
    assert local_path("~/x.png", key="--out") == tmp_path / "x.png"
    assert absolute("~/runs", key="run.storage") == str(tmp_path / "runs")


def test_a_deleted_working_directory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    os.rmdir(tmp_path / "gone")
    with pytest.raises(UserError, match=r"run.storage: got 'runs', but the working directory was deleted"):
        absolute("runs", key="run.storage")
