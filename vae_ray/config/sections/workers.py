"""Section `workers`: who computes."""

from __future__ import annotations

from typing import Literal

from vae_ray.config.fields import CpuCount, Int, Section, WorkerCount, place


class WorkersConfig(Section):
    """Who computes."""

    num: WorkerCount = place(
        "auto",
        description="Ray Train workers; 0 trains in this process without Ray; a range such as 2..8 starts with as many "
        "as the cluster has room for and follows it as nodes join and leave; auto: this process where one process can "
        "use the machine, else one worker per GPU, or per node of a Ray cluster without GPUs.",
    )
    cpus: CpuCount = place(
        "auto",
        description="CPU cores, and torch threads, of each worker; auto shares the cores out, and gives a small "
        "network one thread.",
    )
    gpus: Int = place(1, ge=1, description="GPUs reserved for each worker that trains on one; it uses the first.")
    device: Literal["auto", "cpu", "cuda"] = place(
        "auto", description="cuda, cpu, or auto: cuda if there is a GPU for every worker."
    )
    max_failures: Int = place(
        3,
        ge=0,
        description="How often lost Ray workers are replaced, continuing from the last checkpoint; preemptions do not "
        "count.",
    )

    @property
    def min(self) -> int:
        """The smallest number of workers that can train; 0 without Ray. `num` must be resolved (not "auto")."""
        assert self.num != "auto", "workers.num is resolved by training.placement before it is used"
        return self.num[0] if isinstance(self.num, tuple) else int(self.num)

    @property
    def max(self) -> int:
        """The largest number of workers that can train; 0 without Ray. `num` must be resolved (not "auto")."""
        assert self.num != "auto", "workers.num is resolved by training.placement before it is used"
        return self.num[1] if isinstance(self.num, tuple) else int(self.num)

    @property
    def num_threads(self) -> int:
        """torch threads of each worker; one while `cpus` is still "auto"."""
        return self.cpus if isinstance(self.cpus, int) else 1
