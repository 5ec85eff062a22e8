"""A sweep of many short trials leaves this machine as it was."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import pytest
import ray.util

from tests.distributed.conftest import digits
from vae_ray import sweep

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

NUM_TRIALS = 16
SPACE = {"optim.lr": {"loguniform": [1e-3, 1e-2]}, "objective.beta": {"uniform": [0.5, 2.0]}}
TINY = {"training.epochs": 1, "model.network.hidden": (8,), "training.global_batch_size": 512}


def num_descendants() -> int:
    """Processes below this one: Ray's own and its workers."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            content = stat.read_text()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(content.rpartition(")")[2].split()[1])
    found, frontier = set[int](), {os.getpid()}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier} - found
        found |= frontier
    return len(found)


def resident_megabytes() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measured() -> tuple[int, int, int, float]:
    """(descendants, open files, living placement groups, resident MiB), once what has ended is gone."""
    time.sleep(5)
    groups = [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
    return num_descendants(), len(os.listdir("/proc/self/fd")), len(groups), resident_megabytes()


def test_many_trials_leave_no_processes_files_groups_or_memory_behind(tmp_path: Path) -> None:
    sweep(digits(tmp_path, 1, name="first", **TINY), search=SPACE, num_trials=3, scheduler="none", max_concurrent=2)
    processes, files, groups, megabytes = measured()

    result = sweep(digits(tmp_path, 1, name="many", **TINY), search=SPACE, num_trials=NUM_TRIALS, max_concurrent=2)

    assert result.num_trials == NUM_TRIALS
    assert result.num_failed == 0
    after = measured()
    assert after[0] <= processes
    assert after[1] <= files + 2
    assert after[2] <= groups == 0
    # 16 trials' records, leaderboard and report pass through the driver; none of it stays
    assert after[3] - megabytes < 24, f"{after[3] - megabytes:.0f} MiB more"
