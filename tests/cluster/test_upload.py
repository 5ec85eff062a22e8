"""Contract: which files a job's submission uploads to the cluster, and that the uploaded package runs."""

from __future__ import annotations

import http.server
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobSubmissionClient

from vae_ray.cluster.submission import send

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "vae_ray"


class Dashboard(http.server.BaseHTTPRequestHandler):
    """The job API of a cluster that keeps the packages and runs nothing."""

    packages: dict[str, zipfile.ZipFile]
    num_uploads: int

    def do_GET(self) -> None:
        self.answer(404 if "packages" in self.path and self.path not in self.packages else 200, ray_version="2.60.0")

    def do_PUT(self) -> None:
        type(self).num_uploads += 1
        self.packages[self.path] = zipfile.ZipFile(io.BytesIO(self.rfile.read(int(self.headers["Content-Length"]))))
        self.answer(200)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, job_id="job", submission_id="job")

    def answer(self, code: int, **content: str) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Not to stderr."""


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobSubmissionClient]:
    Dashboard.packages, Dashboard.num_uploads = {}, 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", url)
        yield JobSubmissionClient(url)
        server.shutdown()


def uploaded() -> set[str]:
    """The files of the working directory, beside those of the package."""
    names = {name for package in Dashboard.packages.values() for name in package.namelist()}
    return {name for name in names if not name.startswith("vae_ray/") and not name.endswith("/")}


def write_files(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)


def test_the_package_is_uploaded_whole_and_runs_where_it_is_not_installed(
    client: JobSubmissionClient, tmp_path: Path
) -> None:
    assert send(client, ["true"]) == "job"
    (names,) = [
        package.namelist() for package in Dashboard.packages.values() if "vae_ray/py.typed" in package.namelist()
    ]
    sources = [path for pattern in ("*.py", "*.yaml", "*.j2", "py.typed") for path in PACKAGE.rglob(pattern)]
    assert set(names) == {str(path.relative_to(PACKAGE.parent)) for path in sources}
    for package in Dashboard.packages.values():
        package.extractall(tmp_path)
    code = (
        "import vae_ray, sys; print(vae_ray.__file__); from vae_ray.cli.main import main; sys.exit(main(['presets']))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
    assert "notebook" in done.stdout


def test_the_same_content_is_uploaded_once(client: JobSubmissionClient, tmp_path: Path) -> None:
    write_files(tmp_path, "b.txt", "a.txt")
    for number in range(2):
        os.utime(tmp_path / "a.txt", (number, number))
        send(client, ["true"], working_dir=tmp_path)
    assert Dashboard.num_uploads == 2  # the package and the working directory


def test_data_results_environments_and_ignored_files_are_not_uploaded(
    client: JobSubmissionClient, tmp_path: Path
) -> None:
    files = ["mine.py", "package/data/code.py", "package/runs/code.py", "notes/results.txt", "other/c.txt"]
    not_uploaded = [
        *("data/train.bin", "datasets/x", "runs/a/weights", "results/x.csv", "build/x", "dist/x", "vae_ray/old.py"),
        *(".git/config", ".venv/bin/python", "package/__pycache__/mine.pyc", ".mypy_cache/x", "x.pyc"),
        *("a.log", "notes/b.log", "big/x", "sub/c.txt", "sub/deep/c.txt"),
    ]
    write_files(tmp_path, *files, *not_uploaded)
    (tmp_path / ".gitignore").write_text("*.log\n")
    (tmp_path / ".rayignore").write_text("/big/\n")
    (tmp_path / "sub" / ".gitignore").write_text("c.txt\n")
    send(client, ["true"], working_dir=tmp_path)
    assert uploaded() == {*files, ".gitignore", ".rayignore", "sub/.gitignore"}


def test_files_and_packages_of_a_user_are_uploaded_under_their_names(
    client: JobSubmissionClient, tmp_path: Path
) -> None:
    write_files(tmp_path, "elsewhere/mine.yaml", "elsewhere/nets/small.py", "here/nets/old.py", "here/a.txt")
    files = {"submitted-mine.yaml": tmp_path / "elsewhere" / "mine.yaml", "nets": tmp_path / "elsewhere" / "nets"}
    send(client, ["true"], working_dir=tmp_path / "here", files=files)
    assert uploaded() == {"submitted-mine.yaml", "nets/small.py", "a.txt"}
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["a.txt", "nets"]


def test_linked_files_and_directories_are_uploaded(
    client: JobSubmissionClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(tmp_path, "elsewhere/nets/deep/small.py", "here/package/Läufe.txt")
    for link in ("here/nets", "here/package/nets"):
        (tmp_path / link).symlink_to(tmp_path / "elsewhere" / "nets")
    (tmp_path / "here" / "package" / "broken").symlink_to("/nowhere")
    send(client, ["true"], working_dir=tmp_path / "here")
    assert uploaded() == {"nets/deep/small.py", "package/nets/deep/small.py", "package/Läufe.txt"}
    assert f"warning: '{tmp_path}/here/package/broken' is a link to nothing" in capsys.readouterr().err


UNSENDABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a name in latin-1": (
        lambda where: open(os.fsencode(where) + b"/caf\xe9.txt", "w").close(),
        r"/caf\\udce9\.txt' has a name that is not printable UTF-8",
    ),
    "a pipe": (lambda where: os.mkfifo(where / "pi pe"), r"/pi pe' is a pipe, a socket or a device"),
    "a link upwards": (
        lambda where: (where / "up").symlink_to(".."),
        r"/up' is a link to a directory that contains it",
    ),
    "a link to itself": (lambda where: (where / "[me]").symlink_to("."), r"is a link to a directory that contains it"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("place", ["", "package"])
@pytest.mark.parametrize("what", UNSENDABLE)
def test_what_ray_cannot_upload_is_named_and_left_out(
    client: JobSubmissionClient, tmp_path: Path, what: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    here, (make, message) = tmp_path / "here", UNSENDABLE[what]
    write_files(here, "mine.py", "package/code.py")
    make(here / place)
    send(client, ["true"], working_dir=here)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"vae-ray: warning: '{tmp_path}/.*{message}; it is not uploaded$", line)
    assert uploaded() == {"mine.py", "package/code.py"}


def test_ray_job_submit_from_a_checkout_uploads_the_whole_package_and_neither_data_nor_results(
    client: JobSubmissionClient, tmp_path: Path
) -> None:
    """`ray job submit --working-dir .`: .rayignore decides."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    tracked = {name for name in listing.stdout.split("\0") if (REPOSITORY / name).is_file()}
    for name in tracked:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, tmp_path / name)
    heavy = {".git/objects/pack", ".venv/lib/torch.so", "data/MNIST/raw/t10k-images-idx3-ubyte", "runs/a/metrics.jsonl"}
    heavy |= {"cache/mnist.arrow", "results/a/weights.safetensors", "runs2/a/metrics.jsonl", ".mypy_cache/cache.json"}
    write_files(tmp_path, *heavy)
    client.submit_job(entrypoint="true", runtime_env={"working_dir": str(tmp_path)})
    (package,) = Dashboard.packages.values()
    names = set(package.namelist())
    assert {name for name in tracked if name.startswith(("vae_ray/", "jobs/"))} <= names
    assert names & heavy == set()
