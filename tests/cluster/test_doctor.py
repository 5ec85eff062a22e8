"""`vae-ray doctor` from a third place, about clusters of hosts with addresses and files of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.hosts import Host, Network, describe
from tests.cluster.ray_nodes import DASHBOARD_PORT, GCS_PORT, REPOSITORY, RayNodes, wait_until

pytestmark = pytest.mark.cluster


def doctor(client: Host, *arguments: str, env: dict[str, str]) -> tuple[int, Any]:
    """Exit code and the JSON answer."""
    done = client.run("python", "-m", "vae_ray", "doctor", "--json", *arguments, env=env, cwd=REPOSITORY)
    assert "Traceback" not in done.stderr, describe(done)
    return done.returncode, json.loads(done.stdout)


def findings(answer: Any, level: str) -> dict[str, str]:
    return {finding["subject"]: finding["text"] for finding in answer["findings"] if finding["level"] == level}


def test_a_healthy_cluster_of_two_hosts(two_nodes: RayNodes) -> None:
    storage = str(two_nodes.network.shared / "doctors")
    place = ["--address", two_nodes.job_address, "--storage", storage]
    code, answer = doctor(two_nodes.client, *place, env=two_nodes.credentials)
    assert code == 0, answer
    assert findings(answer, "error") == {}
    assert {node["address"] for node in answer["nodes"]} == {host.address for host in two_nodes.nodes}
    ok = findings(answer, "ok")
    assert {"token", "clocks", "versions", "data cache"} <= set(ok)
    assert ok["storage"] == f"{storage} is writable from every node"


def test_a_storage_that_a_node_does_not_see_is_named_with_that_node(two_nodes: RayNodes) -> None:
    """Each host has its own /tmp: the path exists on all hosts and is another directory on each."""
    head, other = two_nodes.nodes
    for host in (head, other):
        host.run("mkdir", "-p", "/tmp/runs")
    place = ["--address", two_nodes.job_address, "--storage", "/tmp/runs"]
    code, answer = doctor(two_nodes.client, *place, env=two_nodes.credentials)
    assert code == 1
    assert list(findings(answer, "error")) == ["storage"]
    assert f"{other.address} cannot see it" in findings(answer, "error")["storage"]
    assert head.address not in findings(answer, "error")["storage"]


@pytest.fixture
def open_head(network: Network) -> Iterator[tuple[Host, Host]]:
    """A head that `ray start --head` starts without a token, and a client."""
    client, head = network.host("client"), network.host("h1")
    role = ["--head", f"--port={GCS_PORT}", f"--dashboard-host={head.address}", f"--dashboard-port={DASHBOARD_PORT}"]
    options = [f"--node-ip-address={head.address}", "--num-cpus=1", "--object-store-memory=100000000"]
    env = {"RAY_USAGE_STATS_ENABLED": "0"}
    head.start("ray", "start", "--block", *role, *options, env=env, log=network.shared / "ray-open.log")
    ask = ["python", "-c", "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=5).read()"]
    url = f"http://{head.address}:{DASHBOARD_PORT}/api/jobs/"
    wait_until(lambda: client.run(*ask, url).returncode == 0, "the job API answers", seconds=90)
    yield client, head
    head.kill_everything()


def test_a_cluster_without_a_token_is_an_error_that_says_what_to_do(open_head: tuple[Host, Host]) -> None:
    client, head = open_head
    code, answer = doctor(client, "--address", f"http://{head.address}:{DASHBOARD_PORT}", env={})
    assert code == 1
    assert list(findings(answer, "error")) == ["token"]
    (token,) = (finding for finding in answer["findings"] if finding["subject"] == "token")
    assert "anyone who can reach the cluster can run code" in token["text"]
    assert "RAY_AUTH_MODE=token" in token["advice"]


def test_submit_refuses_a_storage_that_the_hosts_do_not_share(two_nodes: RayNodes) -> None:
    command = ["python", "-m", "vae_ray", "submit", "train", "digits", "--workers.num", "2", "--storage", "/tmp/runs"]
    done = two_nodes.client.run(*command, "--address", two_nodes.job_address, env=two_nodes.credentials, cwd=REPOSITORY)
    assert done.returncode == 2, describe(done)
    assert "vae-ray: run.storage: got '/tmp/runs', which not all nodes of the cluster share" in done.stderr
