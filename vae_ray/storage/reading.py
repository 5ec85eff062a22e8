"""Reading small files that someone else may have written: configurations, manifests, journals.

Below every room that reads. Nothing here runs what it reads, waits for a file that is none, or allocates more than a
limit: a link, FIFO or device is refused, and so is text that expands, nests or repeats its keys.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from vae_ray.errors import CorruptFile

MOST_BYTES = 1 << 20
"""Of a configuration or a manifest; real ones have a few thousand."""
MOST_NODES = 50_000
"""Values and keys of one YAML or JSON text, counted as if its aliases were written out."""
MOST_DEPTH = 40
MOST_DIGITS = 40
"""Of a whole number; Python's own integers have no end, and reading one costs the square of its digits."""


def read_bytes(file: Path, *, most_bytes: int = MOST_BYTES, follow_links: bool = True) -> bytes:
    """The content of a regular file of at most `most_bytes`; raises `CorruptFile` or `OSError`."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # without O_NONBLOCK, opening a FIFO waits for a writer
    if not follow_links:
        if file.is_symlink():
            raise CorruptFile(f"{file}: is a link, which could point out of its directory; should be a regular file")
        flags |= os.O_NOFOLLOW
    descriptor = os.open(file, flags)
    with open(descriptor, "rb") as stream:
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            raise CorruptFile(f"{file}: is a directory, should be a file")
        if not stat.S_ISREG(found.st_mode):
            raise CorruptFile(f"{file}: is a pipe or a device, should be a regular file")
        if found.st_size > most_bytes:
            raise CorruptFile(f"{file}: has {found.st_size} bytes, should have at most {most_bytes}")
        return stream.read(most_bytes + 1)


def parse_json(content: bytes | str) -> Any:
    """Strict JSON as plain data; raises `ValueError` with what is wrong."""
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_short_int,
            parse_float=_finite_float,
            parse_constant=_no_constant,
        )
    except RecursionError:
        raise ValueError("nests too deeply") from None
    _check_extent(value)
    return value


def parse_yaml(content: bytes) -> Any:
    """YAML of one document as plain data; raises `ValueError` with what is wrong.

    As `yaml.safe_load`, but a key must not stand twice, and aliases must not expand to more than `MOST_NODES`.
    """
    try:
        value = yaml.load(content.decode("utf-8"), Loader=_Loader)
        _check_extent(value)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())[:300]) from None
    except RecursionError:
        raise ValueError("nests too deeply") from None
    except (TypeError, AttributeError, IndexError, KeyError, OverflowError) as error:
        # an explicit tag on a value that is not of its kind, as in !!int ""
        raise ValueError(f"has a value that is not of its tag's kind ({type(error).__name__})") from None
    return value


def shown(value: object, *, most_characters: int = 120) -> str:
    """`repr(value)`, cut where it is long, for a message of one line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints, or endless nesting
        text = f"<{type(value).__name__}>"
    return text if len(text) <= most_characters else f"{text[: most_characters - 1]}…"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_twice([key for key, _ in pairs])
    return dict(pairs)


def _refuse_twice(keys: Sequence[Hashable]) -> None:
    if len(set(keys)) < len(keys):
        ((key, _),) = Counter(keys).most_common(1)
        raise ValueError(f"key {shown(key)} stands there twice")


def _short_int(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no finite number")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no finite number")


def _check_extent(value: Any) -> None:
    """Raise `ValueError` for data that is deeper or larger than anything we write; never recurses."""
    waiting, seen = [(value, 0)], 0
    while waiting:
        item, depth = waiting.pop()
        seen += 1
        if depth > MOST_DEPTH:
            raise ValueError("nests too deeply")
        if seen > MOST_NODES:
            raise ValueError(f"has more than {MOST_NODES} values")
        if isinstance(item, dict):
            waiting += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list | tuple | set):
            waiting += [(part, depth + 1) for part in item]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which builds plain data only, within limits."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._num_nodes = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise yaml.composer.ComposerError(None, None, "nests too deeply")
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self._num_nodes += _num_nodes(node) if is_alias else 1
        if self._num_nodes > MOST_NODES:
            raise yaml.composer.ComposerError(None, None, f"has more than {MOST_NODES} values")
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != MERGE]
        _refuse_twice([key for key in keys if isinstance(key, Hashable)])
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MOST_DIGITS:
            raise yaml.constructor.ConstructorError(None, None, f"a whole number of {len(node.value)} digits")
        return int(super().construct_yaml_int(node))


MERGE = "tag:yaml.org,2002:merge"
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _num_nodes(node: yaml.Node | None) -> int:
    """How many nodes an alias stands for, as far as `MOST_NODES`; raises for one that contains itself."""
    waiting, seen = [node], 0
    while waiting and seen <= MOST_NODES:
        item = waiting.pop()
        seen += 1
        if isinstance(item, yaml.CollectionNode):
            if item.end_mark is None:  # not closed yet: the alias stands inside what it names
                raise yaml.composer.ComposerError(None, None, "an alias contains itself")
            for part in item.value:
                waiting += part if isinstance(part, tuple) else [part]
    return seen
