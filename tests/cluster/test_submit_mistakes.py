"""Mistakes that `submit` and `doctor` answer with one line, before anything is sent."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vae_ray.cli.main import main

STORED = ["--storage", "/shared/runs"]


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def silent_address() -> Iterator[str]:
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def other_server() -> Iterator[str]:
    """A web server that is no Ray."""
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["train", "digit", *STORED], "preset 'digit' does not exist; did you mean 'digits'?"),
        (["train", "digits", "--storag", "/x"], "argument '--storag' does not exist; did you mean '--storage'?"),
        (["train", "digits"], "run.storage: got 'runs', relative to a directory of this machine"),
        (["train", "mnist", *STORED, "--data.root", "mine"], "data.root: got 'mine', relative to a directory"),
        (["data", "show", "/photos"], "submit: of vae-ray data a job can prepare images"),
        (["data", "prepare", "photos", "--out", "/x"], "ROOT: got 'photos', relative to a directory of this machine"),
        (["data", "prepare", "/photos", "--out", "x"], "--out: got 'x', relative to a directory of this machine"),
        (["evaluate", "runs/x"], "CHECKPOINT: got 'runs/x', relative to a directory of this machine"),
        (["evaluate", "/runs/x", "--optim.lr", "1"], "--optim.lr: only train, resume, sweep take the"),
        (["generate", "/runs/x"], "invalid choice: 'generate'"),
        (["train", "digits", *STORED, "--env", "NAME"], "--env: got 'NAME', should be KEY=VALUE"),
        (["train", "digits", *STORED, "--working-dir", "/nowhere"], "--working-dir: got '/nowhere', which is not a"),
        (
            ["train", "digits", *STORED, "--address", "http://127.0.0.1:1"],
            "no Ray dashboard answers at http://127.0.0.",
        ),
        (["train", "digits", *STORED, "--address", "ray://h:10001"], "for example --address http://h:8265"),
        (["train", "digits", *STORED, "--address", "http://"], "address: got 'http://', should be a dashboard's"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert text in err


def test_an_address_that_never_answers_is_given_up_within_seconds(
    silent_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    assert main(["submit", "train", "digits", *STORED, "--address", silent_address]) == 2
    assert time.monotonic() - started < 10
    assert f"no Ray dashboard answers at http://{silent_address} (timed out)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("127.0.0.1:1", "Connection refused"),
        ("host:port", "try --address http://host:8265"),
        ("//", "for example --address http://HOST:8265"),
    ],
)
def test_the_doctor_reports_an_address_without_a_dashboard(
    address: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--address", address]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("error    cluster")
    assert text in line


def test_another_server_is_not_taken_for_a_dashboard(other_server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--address", other_server, "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert [finding["level"] for finding in answer["findings"]] == ["error"]
    assert f"no Ray dashboard answers at {other_server} (HTTP 404)" in answer["findings"][0]["text"]


def test_the_doctor_examines_this_machine_without_ray(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert main(["doctor", "--storage", str(tmp_path / "new"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    levels = {finding["subject"]: finding["level"] for finding in answer["findings"]}
    assert levels["storage"] == levels["versions"] == "ok"
    assert levels["token"] == "warning"
    assert not (tmp_path / "new").exists()
    file = tmp_path / "file"
    file.write_text("")
    assert main(["doctor", "--storage", str(file / "below")]) == 1
    assert "error    storage" in capsys.readouterr().out
