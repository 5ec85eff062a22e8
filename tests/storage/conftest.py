"""One S3 API server for all tests that need it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.storage.servers import ObjectStore


@pytest.fixture(scope="session")
def store() -> Iterator[ObjectStore]:
    """A running server; this process and those that it starts are its clients."""
    server = ObjectStore()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        try:
            server.start()
            yield server
        finally:
            server.stop()
