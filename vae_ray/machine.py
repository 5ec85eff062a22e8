"""What this machine has."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
from pathlib import Path

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Of a container, by cgroup v2 and v1."""


def num_local_cpus() -> int:
    """CPU cores that this process may use: those of its affinity, at most the quota of its container."""
    import loky  # reads both, cgroup v1 and v2; here, because its import takes 50 ms

    return int(loky.cpu_count())


def cpu_model() -> str:
    """The name of the processor, or else its architecture."""
    with contextlib.suppress(OSError, StopIteration):  # not Linux, or no x86
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def local_memory_bytes() -> int:
    """Memory that this process may use: the machine's, at most the limits of its container and of `ulimit -v`."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says "max"
            limits.append(int(Path(path).read_text(encoding="ascii")))
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return min(limits if soft == resource.RLIM_INFINITY else [*limits, soft])
