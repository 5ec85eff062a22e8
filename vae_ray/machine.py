"""What this machine has."""

from __future__ import annotations


def num_local_cpus() -> int:
    """CPU cores that this process may use: those of its affinity, at most the quota of its container."""
    import loky  # reads both, cgroup v1 and v2; here, because its import takes 50 ms

    return int(loky.cpu_count())
