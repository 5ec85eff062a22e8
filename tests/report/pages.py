"""A page as its reader gets it, taken apart; and text that would be code on a careless one."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

HOSTILE = "</script><script>alert('text')</script>"
HOSTILE_ATTRIBUTE = "\"'><img src=x onerror=alert('attribute')>"


class Page(HTMLParser):
    """Elements with their attributes, and the text of each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.html = text
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in ("img", "meta", "link", "input", "br", "wbr"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, "every element is closed where it was opened"

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]

    @property
    def commands(self) -> list[str]:
        return [text for text in self.text("pre") if text.startswith("vae-ray train")]

    @property
    def pictures(self) -> list[tuple[str, bytes]]:
        """The alternative text and the content of each."""
        return [(image["alt"], base64.b64decode(image["src"].partition(",")[2])) for image in self.all("img")]

    @property
    def _specs(self) -> dict[str, Any]:
        (data,) = (text for text in self.text("script") if text.startswith("{"))
        found: dict[str, Any] = json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        return found

    @property
    def charts(self) -> dict[str, Any]:
        return self._specs["charts"]

    @property
    def datasets(self) -> dict[str, Any]:
        return self._specs["datasets"]

    def assert_self_contained(self) -> None:
        """Nothing is fetched, only the page's own two scripts may run, and no text became an element."""
        references = ("src", "href", "srcset", "action", "data", "poster")
        values = [value for _, attributes in self.elements for key, value in attributes.items() if key in references]
        assert all(value.startswith(("data:", "#")) for value in values)
        (policy,) = (meta["content"] for meta in self.all("meta") if "http-equiv" in meta)
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        assert rules["default-src"] == "'none'"
        assert rules["img-src"] == "data:"
        assert [script.get("type") for script in self.all("script")] == ["application/json", "module", "module"]
        scripts = re.findall(r'<script type="module">(.*?)</script>', self.html, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
        assert rules["script-src"].split() == [f"'sha256-{digest}'" for digest in digests]
        assert not [key for _, attributes in self.elements for key in attributes if key.startswith("on")]
        assert "$schema" not in json.dumps(self.charts)
        assert not re.search(r"@import|url\(", "".join(self.text("style")))
