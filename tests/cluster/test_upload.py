"""Contract: which files a job uploads, and that the uploaded package runs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vae_ray.cluster import upload
from vae_ray.cluster.upload import collect
from vae_ray.errors import UserError


def files_in(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)


def test_the_whole_package_is_uploaded_and_is_small() -> None:
    tracked = {
        path.relative_to(upload.PACKAGE.parent).as_posix()
        for pattern in ("*.py", "*.yaml", "*.j2", "py.typed")
        for path in upload.PACKAGE.rglob(pattern)
    }
    upload_of_all = collect()
    assert set(upload_of_all.files) == tracked
    assert "vae_ray/data/sources.py" in upload_of_all.files  # code, though it is called data
    assert upload_of_all.num_bytes < 2 * 2**20


def test_the_upload_runs_where_the_package_is_not_installed(tmp_path: Path) -> None:
    collect().write(tmp_path / "upload.zip")
    zipfile.ZipFile(tmp_path / "upload.zip").extractall(tmp_path / "job")
    code = (
        "import vae_ray, sys; print(vae_ray.__file__); from vae_ray.cli.main import main; sys.exit(main(['presets']))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "job", env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "job"))
    assert "notebook" in done.stdout


def test_the_same_content_is_the_same_archive(tmp_path: Path) -> None:
    files_in(tmp_path / "mine", "b.txt", "a.txt")
    archives = []
    for number in range(2):
        os.utime(tmp_path / "mine" / "a.txt", (number, number))
        collect(working_dir=tmp_path / "mine").write(tmp_path / f"{number}.zip")
        archives.append((tmp_path / f"{number}.zip").read_bytes())
    assert archives[0] == archives[1]


def test_data_results_and_environments_are_not_uploaded(tmp_path: Path) -> None:
    kept = ["mine.py", "package/data/code.py", "package/runs/code.py", "notes/results.txt"]
    left = [
        *("data/train.bin", "datasets/x", "runs/a/weights", "results/x.csv", "build/x", "dist/x"),
        *(".git/config", ".venv/bin/python", "package/.venv/x", "package/__pycache__/mine.pyc", "x.pyc"),
    ]
    files_in(tmp_path, *kept, *left)
    assert {name for name in collect(working_dir=tmp_path).files if not name.startswith("vae_ray/")} == set(kept)


def test_ignore_files_apply_to_their_own_directory(tmp_path: Path) -> None:
    files_in(tmp_path, "a.log", "keep.log", "sub/b.log", "sub/c.txt", "sub/deep/c.txt", "other/c.txt", "big/x")
    (tmp_path / ".gitignore").write_text("*.log\n!keep.log\n")
    (tmp_path / ".rayignore").write_text("/big/\n")
    (tmp_path / "sub" / ".gitignore").write_text("c.txt\n")
    names = {name for name in collect(working_dir=tmp_path).files if not name.startswith("vae_ray/")}
    assert names == {".gitignore", ".rayignore", "keep.log", "sub/.gitignore", "other/c.txt"}


def test_the_package_that_checked_the_arguments_replaces_one_in_the_working_directory(tmp_path: Path) -> None:
    files_in(tmp_path, "vae_ray/__init__.py", "vae_ray/old.py")
    upload_of_all = collect(working_dir=tmp_path)
    assert upload_of_all.files["vae_ray/__init__.py"] == upload.PACKAGE / "__init__.py"
    assert "vae_ray/old.py" not in upload_of_all.files


def test_too_large_an_upload_is_refused_with_its_largest_entries(tmp_path: Path) -> None:
    files_in(tmp_path, "small.txt")
    for name, megabytes in {"checkpoints/a": 300, "checkpoints/b": 200, "movie.mp4": 100}.items():
        files_in(tmp_path, name)
        os.truncate(tmp_path / name, megabytes * 2**20)  # sparse: no bytes on the disk
    with pytest.raises(UserError, match=r"512\.0 MiB; the largest are checkpoints/ 500\.0 MiB, movie\.mp4 100\.0 MiB"):
        collect(working_dir=tmp_path).check_size()
    collect(working_dir=tmp_path / "checkpoints").check_size()  # 500 MiB are allowed


def test_a_working_directory_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--working-dir: got '.*nowhere', which is not a directory"):
        collect(working_dir=tmp_path / "nowhere")


def test_named_files_are_uploaded_under_their_names(tmp_path: Path) -> None:
    files_in(tmp_path, "elsewhere/my_nets.py")
    named = {"my_nets.py": tmp_path / "elsewhere" / "my_nets.py"}
    assert collect(named=named).files["my_nets.py"] == named["my_nets.py"]
