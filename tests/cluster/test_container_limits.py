"""The limits of a container, in a mount namespace whose cgroup files a test has replaced."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.ray_nodes import REPOSITORY

pytestmark = pytest.mark.cluster

V1 = {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}
V2 = {"cpu.max": "100000 100000"}
IN_CONTAINER = 'mount --bind "$0" /sys/fs/cgroup && exec "$@"'
COUNT = "from vae_ray.training.placement import num_local_cpus; print(num_local_cpus())"


@pytest.mark.parametrize("files", [V1, V2], ids=["cgroup v1", "cgroup v2"])
def test_the_quota_of_a_container_limits_the_cpus(tmp_path: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    command = ["unshare", "--mount", "sh", "-c", IN_CONTAINER, str(tmp_path), sys.executable, "-c", COUNT]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1\n"


@pytest.mark.parametrize("file", ["memory/memory.limit_in_bytes", "memory.max"], ids=["cgroup v1", "cgroup v2"])
def test_the_doctor_reports_the_memory_of_a_container(tmp_path: Path, file: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(f"{3 << 29}\n")
    doctor = [sys.executable, "-m", "vae_ray", "doctor", "--storage", str(tmp_path / "runs")]
    command = ["unshare", "--mount", "sh", "-c", IN_CONTAINER, str(tmp_path), *doctor]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert "1.5 GiB of memory)" in done.stdout, done.stderr
