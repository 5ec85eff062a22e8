"""One driver for a run whose storage is a URI: object stores have no locks.

A driver writes a claim there and renews it every few seconds. It watches the claims of others for longer than that: one
that is renewed has a live owner. No clocks are compared.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator

from vae_ray.errors import UserError
from vae_ray.storage.remote import FileStat, RemoteDirectory
from vae_ray.storage.synced import process_exists

PREFIX = ".driver-"
CLAIM = re.compile(rf"{re.escape(PREFIX)}.+-[0-9]+-[0-9a-f]+")  # host, process, a random part
RENEWAL_SECONDS = 5.0
WATCH_SECONDS = 16.0
"""A claim that is not renewed for so long has no live owner."""


@contextlib.contextmanager
def lease(remote: RemoteDirectory, *, name: str) -> Iterator[None]:
    """Hold the run `name` at `remote` for the body; raises `UserError` if another driver holds it.

    A driver of this machine that was killed is recognized at once, one of another machine after `WATCH_SECONDS`.
    """
    own = f"{PREFIX}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    remote.write(own, b"")
    stop = threading.Event()

    def renew() -> None:
        count = 0
        while not stop.wait(RENEWAL_SECONDS):
            count += 1
            with contextlib.suppress(OSError):  # the next renewal is soon
                remote.write(own, b" " * (count % 7))  # another size: some stores stamp whole seconds

    renewing = threading.Thread(target=renew, name="lease", daemon=True)
    renewing.start()
    try:
        _wait_for_others(remote, own, name=name)
        yield
    finally:
        stop.set()
        renewing.join()
        with contextlib.suppress(OSError):
            remote.delete(own)


def _wait_for_others(remote: RemoteDirectory, own: str, *, name: str) -> None:
    """Delete the claims of others that are not renewed; raises `UserError` for one that is."""
    first, deadline = _other_claims(remote, own), time.monotonic() + WATCH_SECONDS
    while time.monotonic() < deadline:
        now = _other_claims(remote, own)
        watched = [claim for claim in first.keys() & now.keys() if not _owner_ended(claim)]
        for claim in watched:
            if now[claim] != first[claim]:
                host, pid = _owner(claim)
                raise UserError(
                    f"run.name: {name!r} is running right now by process {pid} on {host}; choose another --name"
                )
        if not watched:
            break
        time.sleep(0.5)
    for claim in first:
        remote.delete(claim)


def _other_claims(remote: RemoteDirectory, own: str) -> dict[str, FileStat]:
    return {name: stat for name, stat in remote.list().items() if CLAIM.fullmatch(name) and name != own}


def _owner(claim: str) -> tuple[str, int]:
    """Host and process of the driver that wrote a claim."""
    host, pid, _ = claim.removeprefix(PREFIX).rsplit("-", 2)
    return host, int(pid)


def _owner_ended(claim: str) -> bool:
    host, pid = _owner(claim)
    return host == socket.gethostname() and not process_exists(pid)
