"""`ray up` and `ray down` of jobs/cluster/own-machines.yaml, as its first lines say, on two hosts with an sshd each."""

from __future__ import annotations

import secrets
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.hosts import HOME, Host, Network
from tests.cluster.ray_nodes import REPOSITORY, RayNodes, succeeded
from vae_ray import TrainedVAE

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]

FILE = REPOSITORY / "jobs" / "cluster" / "own-machines.yaml"
SSHD = """
ListenAddress {address}:22
HostKey {home}/.ssh/host_key
AuthorizedKeysFile {home}/.ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PidFile none
"""


def with_sshd(host: Host, *, public_key: str, log: Path) -> None:
    """Have `host` accept root with that key, and be prepared as a machine where the setup has run before."""
    keys = f"{HOME}/.ssh"
    host.write(f"{keys}/authorized_keys", public_key)
    host.write(f"{keys}/sshd_config", SSHD.format(address=host.address, home=HOME))
    succeeded(host.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{keys}/host_key"))
    succeeded(host.run("mkdir", "-p", "/run/sshd"))
    host.start("/usr/sbin/sshd", "-D", "-e", "-f", f"{keys}/sshd_config", log=log)
    # no network leads out of here: the environment is there and is the one that constraints.txt describes
    host.write(f"{HOME}/vae-ray/installed.txt", (REPOSITORY / "constraints.txt").read_text())
    succeeded(host.run("ln", "-s", sys.prefix, f"{HOME}/vae-ray/.venv"))


def all_but_sshd(host: Host) -> list[str]:
    """What runs on `host`: with Ray gone, nothing."""
    return [line for line in host.processes() if "sshd" not in line]


def test_ray_up_brings_up_machines_a_job_runs_there_and_ray_down_leaves_nothing(network: Network) -> None:
    client, head, worker = (network.host(name) for name in ("client", "h1", "h2"))
    cluster = RayNodes(network, client, secrets.token_hex(32), head=head, through_ssh=True)
    succeeded(client.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{HOME}/.ssh/id_ed25519"))
    client.write(f"{HOME}/.ray/auth_token", cluster.token)
    public_key = client.run("cat", f"{HOME}/.ssh/id_ed25519.pub").stdout
    for host in (head, worker):
        with_sshd(host, public_key=public_key, log=network.shared / f"sshd-{host.name}.log")

    # what a user fills in, and nothing else
    filled_in = {"192.168.1.10": head.address, "192.168.1.11": worker.address, "ssh_user: ubuntu": "ssh_user: root"}
    text = FILE.read_text()
    for placeholder, value in filled_in.items():
        assert text.count(placeholder) == 1
        text = text.replace(placeholder, value)
    file = network.shared / FILE.name
    file.write_text(text)
    user = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}

    succeeded(client.run("ray", "up", "-y", str(file), env=user, cwd=REPOSITORY))
    client.start("ray", "dashboard", str(file), env=user, log=network.shared / "tunnel.log")
    cluster.wait_until_alive(head, worker)
    assert client.run("ray", "job", "list", "--address", f"http://{head.address}:8265", env=user).returncode != 0

    storage = network.shared / "runs"
    options = ["--workers.num", "2", "--training.epochs", "1", "--storage", str(storage), "--name=own"]
    succeeded(cluster.submit("python", "jobs/train.py", "digits", *options, env=user))
    assert TrainedVAE.load(storage / "own").checkpoint.epoch == 1

    client.kill_everything()  # the tunnel
    succeeded(client.run("ray", "down", "-y", str(file), env=user, cwd=REPOSITORY))
    for host in (head, worker):
        deadline = time.monotonic() + 60
        while (left := all_but_sshd(host)) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert left == [], host.name
