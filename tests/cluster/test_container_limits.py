"""The limits of a container, in a mount namespace whose cgroup files a test has replaced."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.ray_nodes import REPOSITORY

pytestmark = pytest.mark.cluster

GIB = 2**30
V1 = {
    "cpu/cpu.cfs_quota_us": "100000",
    "cpu/cpu.cfs_period_us": "100000",
    "memory/memory.limit_in_bytes": str(GIB),
    "memory/memory.usage_in_bytes": str(GIB // 4),
    "memory/memory.stat": "total_inactive_file 0\ntotal_active_file 0",
}
V2 = {
    "cpu.max": "100000 100000",
    "memory.max": str(GIB),
    "memory.current": str(GIB // 4),
    "memory.stat": "inactive_file 0\nactive_file 0",
}
IN_CONTAINER = 'mount --bind "$0" /sys/fs/cgroup && exec "$@"'
LIMITS = """
import json
from vae_ray.distributed.resources import memory_bytes, num_cpus
print(json.dumps({"num_cpus": num_cpus(), "memory": memory_bytes()}))
"""


@pytest.mark.parametrize("files", [V1, V2], ids=["cgroup v1", "cgroup v2"])
def test_the_quotas_of_a_container_limit_cpus_and_memory(tmp_path: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    command = ["unshare", "--mount", "sh", "-c", IN_CONTAINER, str(tmp_path), sys.executable, "-c", LIMITS]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    limits = json.loads(done.stdout)
    assert limits == {"num_cpus": 1, "memory": {"total": GIB, "available": 3 * GIB // 4}}
