"""The hosts themselves: apart from each other, and gone with the tests."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.cluster.hosts import HOME, Network
from tests.cluster.ray_nodes import REPOSITORY, succeeded

pytestmark = pytest.mark.cluster

OWNER = """
import sys, time
from pathlib import Path
from tests.cluster.hosts import Network
with Network(Path(sys.argv[1]), seen=[Path(sys.prefix), Path(sys.base_prefix)]) as network:
    host = network.host("h1")
    host.start("sleep", "1234", log=Path(sys.argv[1], "log"))
    print(host.pid, flush=True)
    time.sleep(60)
"""


def test_hosts_reach_each_other_by_name_and_share_only_one_directory(network: Network) -> None:
    first, second = network.host("h1"), network.host("h2")
    server = "import socket; s = socket.create_server(('h1', 7000)); print('up'); s.accept()[0].sendall(b'hello')"
    first.start("python", "-u", "-c", server, log=network.shared / "log")
    while "up" not in (network.shared / "log").read_text():
        time.sleep(0.05)
    client = "import socket; print(socket.create_connection(('h1', 7000), timeout=5).recv(5).decode())"
    assert succeeded(second.run("python", "-c", client)).stdout == "hello\n"
    for place in ("/tmp", "/dev/shm", HOME, str(network.shared)):
        succeeded(first.run("touch", f"{place}/from-h1"))
    assert all(second.run("test", "-e", f"{place}/from-h1").returncode for place in ("/tmp", "/dev/shm", HOME))
    succeeded(second.run("test", "-e", f"{network.shared}/from-h1"))
    assert second.run("hostname").stdout == "h2\n"


def test_hosts_end_with_the_tests_that_are_killed() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        command = [sys.executable, "-c", OWNER, directory]
        owner = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        assert owner.stdout is not None
        with owner.stdout:
            pid = int(owner.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        owner.kill()
        owner.wait()
        deadline = time.monotonic() + 5
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline, "the host outlives the tests"
            time.sleep(0.05)


def test_without_the_right_to_make_hosts_the_tests_fail_with_the_reason() -> None:
    """Not a skip: `make test-cluster` fails where it cannot test."""
    code = "from pathlib import Path; from tests.cluster.hosts import Network; Network(Path('/tmp')).__enter__()"
    unprivileged = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", sys.executable, "-c", code]
    done = subprocess.run(unprivileged, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode != 0
    assert "make test-cluster needs root and Linux namespaces: unshare" in done.stderr
