"""Copying to a URI from threads of its own: training does not wait for the network."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading

from vae_ray.errors import TrainingFailed, one_line
from vae_ray.storage.mirror import Mirror
from vae_ray.storage.retry import retry_io

logger = logging.getLogger(__name__)

UNSENT = "unsent-"
"""Prefix of the name of a copy that could not be pushed."""
RETRY_SECONDS = 10.0
WATCH_SECONDS = 0.5


class BackgroundSync:
    """Pushes `mirror` on request, and looks for the file `watched` at its URI, until it is closed."""

    def __init__(self, mirror: Mirror, *, watched: str) -> None:
        self._mirror, self._watched = mirror, watched
        self._requested, self._closing, self._seen = threading.Event(), threading.Event(), threading.Event()
        self._pushing = threading.Thread(target=self._push_on_request, name="background push", daemon=True)
        self._pushing.start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def push_soon(self) -> None:
        """Have everything that has changed copied, without waiting."""
        self._requested.set()

    def sees_watched(self) -> bool:
        """Whether the watched file existed at the last look, at most a second ago; does not wait."""
        return self._seen.is_set()

    def close(self) -> None:
        """Copy what has not been copied yet; raises `TrainingFailed` if the storage stays away for a minute."""
        self._closing.set()
        self._requested.set()
        self._pushing.join()
        directory, uri = self._mirror.directory, self._mirror.remote.uri
        try:
            retry_io(self._mirror.push, where=uri, is_transient=lambda error: True)
        except OSError as error:
            unsent = directory.rename(directory.with_name(f"{UNSENT}{directory.name}"))
            raise TrainingFailed(
                f"{uri}: could not be written ({one_line(error)[:200]}); the run's files are complete in {unsent} of "
                f"{socket.gethostname()}"
            ) from None

    def _push_on_request(self) -> None:
        while self._requested.wait() and not self._closing.is_set():
            self._requested.clear()
            try:
                self._mirror.push()
            except OSError as error:
                logger.warning(
                    "%s: cannot be written now (%s); training continues, trying again in %.0f s",
                    self._mirror.remote.uri,
                    one_line(error)[:200],
                    RETRY_SECONDS,
                )
                self._closing.wait(RETRY_SECONDS)
                self._requested.set()

    def _watch(self) -> None:
        while not self._closing.wait(WATCH_SECONDS) and not self._seen.is_set():
            with contextlib.suppress(OSError):  # the next look is soon
                if self._mirror.remote.read(self._watched) is not None:
                    self._seen.set()
