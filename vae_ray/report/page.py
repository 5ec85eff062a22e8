"""One page for people, complete in itself and without a network: the frame of every report.

A page contains its pictures and the data of its charts. Its Content-Security-Policy names the hashes of two scripts; no
other code runs, so a user's text is never code. A template extends `report/page.html.j2`.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import shlex
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup

from vae_ray.report.text import as_text, reproduction
from vae_ray.run_files.progress import format_nats


def render(template: str, values: Mapping[str, Any]) -> bytes:
    """The page of `template`, a path inside the package such as "report/run.html.j2"; `values` are its variables.

    Among them `charts`, Vega-Lite specifications by the id of their element, and `datasets`, what charts share.
    """
    common = {"bundle": Markup(_drawing_code()), "datasets": {}}
    return _environment().get_template(template).render(common | dict(values)).encode()


@functools.cache
def _drawing_code() -> str:
    """Vega-Lite and all that it needs, as one script."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vae_ray", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # `tojson` escapes <, > and &, so that no text can end the script element
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    filters: dict[str, Callable[..., str]] = {
        "text": as_text,
        "nats": lambda value: "–" if value is None else format_nats(value),
        "assignments": lambda overrides: ", ".join(f"{key} = {as_text(value)}" for key, value in overrides.items()),
        "command": reproduction,
        "quoted": shlex.quote,
        "python": repr,
        "script_hash": _script_hash,
    }
    environment.filters |= filters
    return environment


def _script_hash(script: str) -> Markup:
    """A script as the Content-Security-Policy names it."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return Markup(f"'sha256-{digest}'")
