"""The dashboard of a cluster, to which jobs are submitted: whether it answers, and whether it requires a token.

Every failure is one line within seconds: Ray's own clients wait indefinitely for an address that does not answer.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient
from ray.util.state import list_nodes

from vae_ray.errors import UserError, one_line

PROBE_SECONDS = 4.0
TOKEN_ADVICE = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what `ray get-auth-token` prints on the head node"


@dataclass(frozen=True)
class Dashboard:
    """A dashboard that answers, and Ray's client of its job API; `is_open` if it requires no token."""

    url: str
    is_open: bool
    client: JobSubmissionClient

    def nodes(self) -> list[dict[str, Any]]:
        """The nodes of the cluster, with the keys of `ray.nodes()` that `distributed.resources` reads."""
        return [
            {"Alive": node.state == "ALIVE", "Resources": node.resources_total, "Labels": node.labels or {}}
            for node in list_nodes(self.url, limit=10_000, timeout=10)
        ]


def connect(address: str | None) -> Dashboard:
    """The dashboard at `address`, else at $RAY_API_SERVER_ADDRESS, $RAY_ADDRESS or this machine's usual port (`auto`).

    Raises `UserError` within seconds if no dashboard answers there, or if the token is missing or wrong.
    """
    api_server = os.environ.get("RAY_API_SERVER_ADDRESS")
    address = address or api_server or os.environ.get("RAY_ADDRESS") or "auto"
    if address == "auto":
        address = api_server or "http://127.0.0.1:8265"
    scheme, _, rest = address.rpartition("://")
    url = f"{scheme or 'http'}://{rest.rstrip('/')}"
    host = urlsplit(url).hostname
    usual_url = f"http://{host or 'HOST'}:8265"
    if scheme not in ("", "http", "https") or not host:
        raise UserError(f"address: got {address!r}, should be a dashboard's; for example --address {usual_url}")
    try:
        is_open = _answers_without_token(url)
    except OSError as error:
        usual = "start one with `ray start --head`" if url == usual_url else f"try --address {usual_url}"
        raise UserError(
            f"address: no Ray dashboard answers at {url} ({describe_error(error)}); if there is a cluster, give its "
            f"dashboard's address; else {usual}"
        ) from None
    os.environ["RAY_API_SERVER_ADDRESS"] = url  # Ray's clients prefer it to their own `address` argument
    for name in ("dashboard_sdk", "job.sdk"):  # they log every package and connection
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    try:
        return Dashboard(url, is_open, JobSubmissionClient(url))
    except AuthenticationError as error:
        if "failed" in str(error).partition(":")[0]:
            raise UserError(f"address: {url} refuses this token; {TOKEN_ADVICE}") from None
        raise UserError(f"address: {url} requires a token; none is set here: {TOKEN_ADVICE}") from None
    except (RuntimeError, OSError) as error:
        raise UserError(f"address: {url} cannot be used ({describe_error(error)})") from None


def _answers_without_token(url: str) -> bool:
    """Whether the dashboard at `url` requires no token; raises `OSError` if no dashboard answers."""
    try:
        with urllib.request.urlopen(f"{url}/api/version", timeout=PROBE_SECONDS) as response:
            if "ray_version" in json.loads(response.read(65536)):
                return True
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return False
        raise OSError(f"HTTP {error.code}") from None
    except urllib.error.URLError as error:
        raise error.reason if isinstance(error.reason, OSError) else OSError(str(error.reason)) from None
    except (http.client.HTTPException, ValueError, TypeError) as error:
        raise OSError(f"another server answers there: {describe_error(error)}") from None
    raise OSError("another server answers there")


def describe_error(error: Exception) -> str:
    """The error's message on one line of at most 200 characters."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return one_line(text)[:200] or type(error).__name__
