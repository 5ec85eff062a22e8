"""A cluster whose head runs no training: nodes join for a sweep, leave when idle, and join for a run that waits.

Ray's `fake_multinode` provider: the real autoscaler, whose "machines" are raylets of one host.
"""

from __future__ import annotations

import json
import secrets
import time

import pytest
import yaml

from tests.cluster.hosts import Network, describe
from tests.cluster.ray_nodes import GCS_PORT, REPOSITORY, RayNodes, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]

HEAD_ID = "f" * 51 + "00000"


# Fields that `ray up` fills in; for this provider its file of defaults is missing in the wheel.
NOTHING_TO_SET_UP = {
    "auth": {},
    "docker": {},
    "file_mounts": {},
    "file_mounts_sync_continuously": False,
    **{
        key: []
        for key in (
            *("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands"),
            *("head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"),
        )
    },
}


def autoscaling(address: str) -> str:
    """A cluster.yaml of one CPU a worker, two workers at most, which go after some idle seconds."""
    node_types = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "min_workers": 0, "max_workers": 0},
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    }
    provider = {
        "type": "fake_multinode",
        "gcs_address": f"{address}:{GCS_PORT}",
        "head_node_id": HEAD_ID,
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    return yaml.safe_dump(
        {
            **NOTHING_TO_SET_UP,
            "cluster_name": "fake",
            "max_workers": 2,
            "idle_timeout_minutes": 0.3,  # at 0.1 a busy test machine's news are so late that a trial's node goes
            "provider": provider,
            "available_node_types": node_types,
            "head_node_type": "ray.head.default",
            "upscaling_speed": 10,
        }
    )


def test_nodes_join_for_a_sweep_leave_when_idle_and_join_for_a_run_that_waits(network: Network) -> None:
    client, head = network.host("client"), network.host("h1")
    head.write("/tmp/autoscaling.yaml", autoscaling(head.address))
    head.environment = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_NODE_TYPE_NAME": "ray.head.default",  # as `ray up` and KubeRay set it
        # Not as a submitted job: this provider's nodes share one session directory, and one that goes takes the job's
        # working directory along.
        "PYTHONPATH": str(REPOSITORY),
    }
    cluster = RayNodes(network, client, secrets.token_hex(32), num_cpus=0)
    cluster.start(head, "--autoscaling-config=/tmp/autoscaling.yaml")
    cluster.wait_until_alive(head)

    storage = network.shared / "runs"
    options = ["--num-trials=3", "--training.epochs=2", "--scheduler=none", "--storage", str(storage), "--name=grown"]
    log = network.shared / "sweep.log"
    user = {**cluster.credentials, "RAY_ADDRESS": f"{head.address}:{GCS_PORT}"}
    sweep = head.start("python", str(REPOSITORY / "jobs" / "sweep.py"), "digits", *options, log=log, env=user)
    most = 1
    while sweep.poll() is None:
        most = max(most, cluster.num_alive())
        time.sleep(1)
    assert sweep.returncode == 0, log.read_text()
    assert "killed" not in log.read_text()
    summary = json.loads((storage / "grown" / "summary.json").read_text())
    assert summary["num_trials"] == 3
    assert most == 3, "the head and two workers"

    wait_until(lambda: cluster.num_alive() == 1, "idle workers are gone", seconds=90)

    options = ["--workers.num=2", "--training.epochs=1", "--storage", str(storage), "--name=waited"]
    trained = head.run("python", "-m", "vae_ray", "train", "digits", *options, env=user)
    assert trained.returncode == 0, describe(trained)
    assert "waiting for nodes: the Ray cluster has room for 0 of 2 workers now" in trained.stderr
    assert json.loads((storage / "waited" / "summary.json").read_text())["num_workers"] == 2
