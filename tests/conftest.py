"""Fixtures of the unit suite: a cache of its own, the real MNIST where it is, and one small trained run."""

import compileall
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from py_compile import PycInvalidationMode

import hypothesis
import pytest
import torch

from tests.storage.servers import ObjectStore
from vae_ray import Experiment, TrainResult, train

REPOSITORY = Path(__file__).resolve().parents[1]

hypothesis.settings.register_profile("any machine", deadline=None)  # a slow moment of a machine is no failure
hypothesis.settings.load_profile("any machine")

# two threads on a busy machine wait for each other at each small product: ten times as long
torch.set_num_threads(1)

# tests write modules that change within a second, which bytecode would hide, and look at what lies in directories
sys.dont_write_bytecode = True
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
# hundreds of processes start, each of which would compile the package; by its content, which may change within a second
compileall.compile_dir(REPOSITORY / "vae_ray", quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH)

# a suite that runs under nohup, or after `&` in a script, ignores these, and so do the processes that tests start
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

MNIST_ROOT = (REPOSITORY.parent / "shared" / "data").resolve()  # hosts of tests/cluster see no link in /tmp


@pytest.fixture(scope="session", autouse=True)
def isolated_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Decoded images of this session, also for the processes that tests start; the user's cache is not touched."""
    cache = tmp_path_factory.mktemp("cache")
    before = os.environ.get("VAE_RAY_CACHE")
    os.environ["VAE_RAY_CACHE"] = str(cache)
    yield cache
    if before is None:
        del os.environ["VAE_RAY_CACHE"]
    else:
        os.environ["VAE_RAY_CACHE"] = before


@pytest.fixture(scope="session")
def store() -> Iterator[ObjectStore]:
    """A running S3 API server; this process and those that it starts are its clients."""
    server = ObjectStore()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        try:
            server.start()
            yield server
        finally:
            server.stop()


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """`data.root` of the real MNIST; skips the test where the files are absent."""
    if not (MNIST_ROOT / "MNIST" / "raw" / "t10k-images-idx3-ubyte").is_file():
        pytest.skip("needs the real MNIST in ../shared/data/MNIST/raw, which is absent")
    return MNIST_ROOT


def digits_in_this_process(storage: Path) -> Experiment:
    """Three quick epochs of the digits without Ray, with a validation split, warm-up and decay.

    With a beta of 0.25 the posterior does not collapse in so few steps, so that codes and samples say something.
    """
    return Experiment.from_dict(
        {
            "data": {"source": "digits", "num_validation": 100},
            "model": {"network": {"name": "mlp", "hidden": [64]}, "latent_dim": 5, "encoder_range": "signed"},
            "objective": {"beta": 0.25},
            "optim": {"lr": 5e-3, "schedule": "cosine", "warmup_steps": 7},
            "training": {"epochs": 3, "global_batch_size": 32},
            "workers": {"num": 0, "cpus": 1, "device": "cpu"},
            "run": {"storage": str(storage), "name": "digits-in-process", "seed": 3},
        }
    )


@pytest.fixture
def quick(tmp_path: Path) -> Experiment:
    """An experiment that trains in well under a second, in a storage of its own."""
    return digits_in_this_process(tmp_path / "runs")


@pytest.fixture(scope="module")
def module_quick(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """The same for a fixture that a whole module shares."""
    return digits_in_this_process(tmp_path_factory.mktemp("module") / "runs")


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """The finished run of `quick`, shared by the tests that only read it."""
    return train(digits_in_this_process(tmp_path_factory.mktemp("trained") / "runs"))
