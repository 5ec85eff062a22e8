"""One local Ray for all tests that need workers: starting it costs more than most of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import heads
from tests.storage.servers import ObjectStore
from vae_ray import Experiment, TrainResult, train

# 1281 = 20 * 64 + 1 training images: the last batch of an epoch leaves all workers but one an empty shard.
DIGITS = {
    "data.num_validation": 157,
    "training.epochs": 3,
    "training.global_batch_size": 64,
    "model.network.hidden": (48, 24),
    "model.latent_dim": 6,
    "model.prior": "standard",
    "likelihood": "bernoulli",
    "optim.lr": 2e-3,
    "run.seed": 11,
}


@pytest.fixture(scope="session")
def cluster(store: ObjectStore) -> Iterator[None]:
    """Ray with four logical CPUs, whatever the machine has: three workers must fit. Its workers may use `store`."""
    import vae_ray.distributed  # sets Ray's environment before Ray starts  # noqa: F401, I001
    import ray

    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # as on a Ray that a run starts for itself
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def head() -> Iterator[heads.Head]:
    """A head node with token authentication, for clients; its processes are not those of `cluster`."""
    with heads.head() as running:
        yield running


@pytest.fixture(scope="module")
def two_nodes(head: heads.Head) -> Iterator[heads.Head]:
    """The same after a second node has joined it; not for jobs: both share a directory, of which each deletes parts."""
    with heads.second_node(head):
        yield head


@pytest.fixture(scope="session")
def trained_by(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], TrainResult]:
    """The same digits run by any number of workers; each number trains once a session."""
    storage, results = tmp_path_factory.mktemp("runs"), dict[int, TrainResult]()

    def result(num_workers: int) -> TrainResult:
        if num_workers not in results:
            results[num_workers] = train(digits(storage, num_workers, name=f"w{num_workers}"))
        return results[num_workers]

    return result


def digits(storage: Path, num_workers: int, *, name: str, **overrides: Any) -> Experiment:
    """The small experiment of these tests."""
    return Experiment.preset("digits").with_overrides(
        {**DIGITS, "workers.num": num_workers, "run.storage": str(storage), "run.name": name, **overrides}
    )
