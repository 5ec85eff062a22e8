"""Two drivers of one run where there are no locks: real processes, a shared directory as the store."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from vae_ray.errors import UserError
from vae_ray.storage import lease as lease_module
from vae_ray.storage.lease import lease
from vae_ray.storage.remote import RemoteDirectory


@pytest.fixture
def store(tmp_path: Path) -> RemoteDirectory:
    (tmp_path / "store").mkdir()
    return RemoteDirectory((tmp_path / "store").as_uri())


def hold(uri: str, ready: Connection) -> None:
    with lease(RemoteDirectory(uri), name="run"):
        ready.send(True)
        time.sleep(60)


@pytest.fixture
def holder(store: RemoteDirectory) -> multiprocessing.context.SpawnProcess:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(store.uri, theirs), daemon=True)
    process.start()
    assert ours.poll(60)
    yield process
    process.kill()
    process.join()


def test_a_run_that_is_driven_is_refused_and_its_driver_named(
    store: RemoteDirectory, holder: multiprocessing.context.SpawnProcess
) -> None:
    with (
        pytest.raises(UserError, match=rf"'run' is running right now by process {holder.pid} on .*--name"),
        lease(store, name="run"),
    ):
        raise AssertionError("two drivers")


def test_a_driver_that_was_killed_here_holds_nothing(
    store: RemoteDirectory, holder: multiprocessing.context.SpawnProcess
) -> None:
    os.kill(int(holder.pid or 0), signal.SIGKILL)
    holder.join()
    started = time.monotonic()
    with lease(store, name="run"):
        assert time.monotonic() - started < lease_module.WATCH_SECONDS / 2
        assert len(claims(store)) == 1, "the dead one's claim is gone"
    assert claims(store) == []


def test_a_claim_from_elsewhere_that_is_not_renewed_holds_for_a_while_only(
    store: RemoteDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "WATCH_SECONDS", 1.5)
    store.write(".driver-another-machine-1-0abc", b"")
    started = time.monotonic()
    with lease(store, name="run"):
        assert 1.0 < time.monotonic() - started < 10
        assert ".driver-another-machine-1-0abc" not in claims(store)


def claims(store: RemoteDirectory) -> list[str]:
    return [name for name in store.list() if name.startswith(".driver-")]
