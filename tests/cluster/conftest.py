"""A network of hosts and a Ray cluster of two of them, shared by all tests here: bringing it up takes half a minute."""

from __future__ import annotations

import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Network
from tests.cluster.ray_nodes import REPOSITORY, RayNodes
from tests.conftest import MNIST_ROOT

SEEN = [Path(sys.prefix), Path(sys.base_prefix), REPOSITORY, MNIST_ROOT]


@pytest.fixture
def network() -> Iterator[Network]:
    """An empty network of its own, with a directory that its hosts share."""
    yield from _network()


@pytest.fixture(scope="session")
def two_nodes() -> Iterator[RayNodes]:
    """A Ray cluster of two hosts with one CPU each, `h1` (the head) and `h2`, and a `client` outside of it.

    Its shared directory, `two_nodes.network.shared`, is the storage that all see under the same path.
    """
    for network in _network():
        cluster = RayNodes(network, network.host("client"), token=secrets.token_hex(32))
        hosts = [network.host("h1"), network.host("h2")]
        for host in hosts:
            cluster.start(host)
        cluster.wait_until_alive(*hosts)
        yield cluster
        cluster.end()


@pytest.fixture
def whole(two_nodes: RayNodes) -> Iterator[RayNodes]:
    """Both nodes alive before and after a test."""
    two_nodes.wait_until_alive(*two_nodes.nodes)
    yield two_nodes
    first, second = two_nodes.nodes
    if not any("raylet" in line for line in second.processes()):
        two_nodes.wait_until_alive(first)  # the dashboard learns late of a death
        two_nodes.start(second)
        two_nodes.wait_until_alive(first, second)


def _network() -> Iterator[Network]:
    shared = Path(tempfile.mkdtemp(prefix="vae-ray-hosts-", dir="/tmp"))
    try:
        with Network(shared, seen=[path.resolve() for path in SEEN if path.exists()]) as network:
            yield network
    finally:
        shutil.rmtree(shared)
