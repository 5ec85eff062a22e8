"""Ray on the hosts of `tests/cluster/hosts.py`, with token authentication, and the clients that use it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from tests.cluster.hosts import Host, Network, describe

REPOSITORY = Path(__file__).resolve().parents[2]
GCS_PORT, DASHBOARD_PORT = 6379, 8265
SOON_DEAD = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
"""Ray notices a dead node after seconds; with its defaults it takes some twenty."""
# prints what the dashboard answers; the token is in the environment of all clients
GET = """
import os, sys, urllib.request
headers = {"Authorization": "Bearer " + os.environ["RAY_AUTH_TOKEN"]}
print(urllib.request.urlopen(urllib.request.Request(sys.argv[1], headers=headers), timeout=10).read().decode())
"""


def wait_until(condition: Callable[[], bool], what: str, *, seconds: float) -> None:
    """Return as soon as `condition` holds; fails the test if that takes longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not after {seconds:g} s"
        time.sleep(0.5)


@dataclass
class RayNodes:
    """A Ray cluster on hosts of a network, and a place that is not part of it."""

    network: Network
    client: Host
    token: str
    num_cpus: int = 1
    """Of each node: two workers of one CPU each cannot be on the same one."""
    head: Host | None = None
    nodes: list[Host] = field(default_factory=list)
    through_ssh: bool = False
    """Whether the client has a tunnel to the job API, which then listens on the head's loopback alone."""

    @property
    def job_address(self) -> str:
        """Where the client submits jobs."""
        assert self.head is not None
        return f"http://{'127.0.0.1' if self.through_ssh else self.head.address}:{DASHBOARD_PORT}"

    @property
    def credentials(self) -> dict[str, str]:
        """The environment of a process that may use the cluster."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_USAGE_STATS_ENABLED": "0"}

    def log(self, host: Host) -> Path:
        """The output of `ray start` on `host`."""
        return self.network.shared / f"ray-{host.name}.log"

    def start(self, host: Host, *more: str) -> None:
        """Start Ray on `host`: the head on the first one, then nodes that join it; also again after a kill.

        `more` are further options of `ray start`.
        """
        self.head = self.head or host
        is_head = host is self.head
        role = (
            ["--head", f"--port={GCS_PORT}", f"--dashboard-host={host.address}", f"--dashboard-port={DASHBOARD_PORT}"]
            if is_head
            else [f"--address={self.head.address}:{GCS_PORT}"]
        )
        options = [
            f"--node-ip-address={host.address}",
            f"--num-cpus={self.num_cpus}",
            "--object-store-memory=100000000",
        ]
        command = ["ray", "start", "--block", *role, *options, *more]
        host.start(*command, env={**self.credentials, **SOON_DEAD}, log=self.log(host))
        if host not in self.nodes:
            self.nodes.append(host)

    def get(self, path: str) -> Any:
        """The dashboard's JSON, asked for from the client's place; None if it does not answer."""
        done = self.client.run("python", "-c", GET, f"{self.job_address}{path}", env=self.credentials, timeout=30)
        return json.loads(done.stdout) if done.returncode == 0 else None

    def alive(self) -> set[str]:
        """The addresses of the nodes that are alive, as the head sees it."""
        return {node["raylet"]["nodeManagerAddress"] for node in self._alive_nodes()}

    def node_id(self, host: Host) -> str:
        """Ray's name of the alive node on `host`."""
        nodes = [node["raylet"] for node in self._alive_nodes()]
        return str(next(node["nodeId"] for node in nodes if node["nodeManagerAddress"] == host.address))

    def num_alive(self) -> int:
        """How many nodes are alive; of several on one host each counts."""
        return len(self._alive_nodes())

    def _alive_nodes(self) -> list[Any]:
        answer = self.get("/nodes?view=summary")
        nodes = answer["data"]["summary"] if answer else []
        return [node for node in nodes if node["raylet"].get("state") == "ALIVE"]

    def wait_until_alive(self, *hosts: Host, seconds: float = 90) -> None:
        """Return when exactly these hosts are nodes of the cluster, and the head's agent takes jobs."""
        addresses = {host.address for host in hosts}
        try:
            wait_until(lambda: self.alive() == addresses, f"nodes {sorted(addresses)} alive", seconds=seconds)
        except AssertionError as error:
            logs = [self.log(host) for host in hosts if self.log(host).is_file()]
            raise AssertionError("\n".join([str(error), *(log.read_text()[-2000:] for log in logs)])) from None
        wait_until(lambda: self.get("/api/jobs/") is not None, "the job API answers", seconds=seconds)

    def submit(
        self,
        *entrypoint: str,
        env: dict[str, str] | None = None,
        cwd: Path = REPOSITORY,
        timeout: float = 240,
    ) -> CompletedProcess[str]:
        """`ray job submit --working-dir .` in the checkout, from the client's place; follows the job to its end.

        `env` replaces the credentials.
        """
        command = self.submission(*entrypoint)
        deadline = time.monotonic() + 60
        while True:
            variables = self.credentials if env is None else env
            done = self.client.run(*command, env=variables, cwd=cwd, timeout=timeout)
            # a head node answers before the agent that runs jobs is up
            if "No available agent" not in done.stdout + done.stderr or time.monotonic() > deadline:
                return done
            time.sleep(1)

    def submission(self, *entrypoint: str) -> list[str]:
        """The command that submits a job from the working directory."""
        return ["ray", "job", "submit", f"--address={self.job_address}", "--working-dir", ".", "--", *entrypoint]

    def end(self) -> None:
        """Kill all that runs on the nodes; Ray is on none of them afterwards."""
        for host in self.nodes:
            host.kill_everything()


def succeeded(done: CompletedProcess[str]) -> CompletedProcess[str]:
    """`done`, or the failure of the test with all output of the command."""
    assert done.returncode == 0, describe(done)
    return done
