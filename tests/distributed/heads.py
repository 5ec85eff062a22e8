"""Ray head nodes for tests of clients: processes of their own, with ports and files of their own."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class Head:
    """A running head node: where clients reach it, and the environment in which they may."""

    dashboard: str
    gcs: str
    environment: Mapping[str, str]

    def run(
        self, *command: str, cwd: Path = REPOSITORY, timeout: float = 240, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """A client's process."""
        return subprocess.run(
            command,
            cwd=cwd,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def vae_ray(self, *arguments: str, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
        """The command line as a client."""
        return self.run(sys.executable, "-m", "vae_ray", *arguments, cwd=cwd, **environment)


def doctor(head: Head, *arguments: str, **environment: str) -> tuple[int, Any]:
    """Exit code and JSON answer of `vae-ray doctor` as a client."""
    done = head.vae_ray("doctor", *arguments, "--python", sys.executable, "--json", **environment)
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout)


def levels(answer: Any) -> dict[str, str]:
    """The level (ok, warning or error) of each subject."""
    return {finding["subject"]: finding["level"] for finding in answer["findings"]}


def text(answer: Any, subject: str) -> str:
    """The text of the finding about `subject`."""
    return str(next(finding["text"] for finding in answer["findings"] if finding["subject"] == subject))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def head(*, token: bool = True, num_cpus: int = 2) -> Iterator[Head]:
    """A head node on free loopback ports, which requires a token unless `token` is False."""
    gcs, dashboard = f"127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    # a package that is installed from elsewhere must not stand in for the one that is tested
    environment["PYTHONPATH"] = str(REPOSITORY)
    if token:
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    options = [
        *("--head", f"--num-cpus={num_cpus}", "--node-ip-address=127.0.0.1", f"--port={gcs.rpartition(':')[2]}"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard.rpartition(':')[2]}"),
    ]
    with _node(options, environment):
        _wait_until_up(f"{dashboard}/api/version", environment.get("RAY_AUTH_TOKEN", ""))
        yield Head(dashboard, gcs, environment)


@contextlib.contextmanager
def second_node(first: Head, *, num_cpus: int = 1) -> Iterator[None]:
    """Another node of that cluster, on the same machine."""
    name = f"second-{secrets.token_hex(4)}"
    look = "import ray, sys; ray.init('auto', logging_level='ERROR'); "
    look += "sys.exit((sys.argv[1], True) not in [(node['NodeName'], node['Alive']) for node in ray.nodes()])"
    options = [f"--address={first.gcs}", f"--num-cpus={num_cpus}", "--node-ip-address=127.0.0.1", f"--node-name={name}"]
    with _node(options, first.environment):
        deadline = time.monotonic() + 60
        while first.run(sys.executable, "-c", look, name, RAY_ADDRESS=first.gcs).returncode:
            assert time.monotonic() < deadline, "the second node did not join"
        yield


@contextlib.contextmanager
def _node(options: list[str], environment: Mapping[str, str]) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as directory:  # Ray's sockets need a short path
        # another Ray on this host may have the default port of the agent; only a head has a directory of its own
        own = [f"--dashboard-agent-listen-port={free_port()}"]
        own += [f"--temp-dir={directory}"] if "--head" in options else []
        process = subprocess.Popen(
            [RAY, "start", "--block", *options, *own],
            env=dict(environment),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            # --block waits for its children for longer than a test should; they are all in its session
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_up(url: str, token: str) -> None:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 90
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < deadline, "the head node did not come up"
            time.sleep(0.5)
