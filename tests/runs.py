"""Runs in this process for tests: begun as `train` begins them, interrupted at a step, compared with each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.thread_workers import on_threads
from vae_ray import Experiment
from vae_ray.parallel.group import SingleProcess, WorkerGroup
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.storage.records import read_records
from vae_ray.training import loop
from vae_ray.training.fit import fit


class Counting(SingleProcess):
    """Alone, and calls `at` before every step's gradient, with how many there have been; see `counted_steps`."""

    def __init__(self, at: Callable[[int], None]) -> None:
        super().__init__(torch.device("cpu"))
        self.num_steps, self._at = 0, at

    def count(self) -> None:
        self.num_steps += 1
        self._at(self.num_steps)


@pytest.fixture(autouse=True)
def counted_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop.gradients_of

    def counting(*args: Any, group: WorkerGroup, **options: Any) -> dict[str, list[nn.Parameter]]:
        if isinstance(group, Counting):
            group.count()
        return original(*args, group=group, **options)

    monkeypatch.setattr(loop, "gradients_of", counting)


def run_of(experiment: Experiment) -> RunDirectory:
    """The run's directory, begun as `train` begins it."""
    run = RunDirectory(Path(experiment.run.storage) / str(experiment.run.name))
    run.path.mkdir(parents=True)
    run.write_experiment(experiment)
    return run


def computed(run: Path) -> list[dict[str, Any]]:
    """The records of a run's epochs without how long they took."""
    timing = ("images_per_second", "seconds", "started_at")
    records = read_records(run / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in timing} for record in records]


def tensors_of(run: Path) -> dict[str, bytes]:
    """The safetensors files of all checkpoints by their path."""
    files = (run / "checkpoints").rglob("*")
    return {str(f.relative_to(run)): f.read_bytes() for f in files if f.suffix == ".safetensors"}


def assert_same(run: Path, other: Path) -> None:
    """Equal records, and tensors equal to the bit."""
    assert tensors_of(run) == tensors_of(other)
    assert computed(run) == computed(other)


def fitted(experiment: Experiment, run: RunDirectory, num_workers: int) -> list[Any]:
    """Train on so many workers that are threads; what each raised, or None."""
    return on_threads(num_workers, lambda group: fit(experiment, run.path, group))
