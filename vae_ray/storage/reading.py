"""Reading small files that someone else may have written: configurations, manifests, records; and writing YAML.

Nothing here runs what it reads, waits for a pipe or allocates more than a limit.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

import yaml

from vae_ray.errors import CorruptFile, UserError, one_line

MAX_BYTES = 1 << 20
"""Of a configuration or a manifest; real ones have a few thousand."""
MAX_VALUES = 50_000
"""Values and keys of one YAML or JSON text, counted as if its aliases were written out."""
MAX_DEPTH = 40


def read_bytes(file: Path, *, max_bytes: int = MAX_BYTES, follow_links: bool = True) -> bytes:
    """The content of a regular file of at most `max_bytes`; raises `CorruptFile` or `OSError`."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # without O_NONBLOCK, opening a FIFO waits for a writer
    if not follow_links:
        if file.is_symlink():
            raise CorruptFile(f"{file}: is a link, which could point out of its directory; should be a regular file")
        flags |= os.O_NOFOLLOW
    descriptor = os.open(file, flags)
    with open(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise CorruptFile(f"{file}: is a directory, should be a file")
        if not stat.S_ISREG(status.st_mode):
            raise CorruptFile(f"{file}: is a pipe or a device, should be a regular file")
        if status.st_size > max_bytes:
            raise CorruptFile(f"{file}: has {status.st_size} bytes, should have at most {max_bytes}")
        return stream.read(max_bytes + 1)


def parse_json(content: bytes) -> Any:
    """Strict JSON as plain data; raises `ValueError` with what is wrong."""
    try:
        value = json.loads(content.decode(), object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nests too deeply") from None
    _check_extent(value)
    return value


def parse_yaml(content: bytes) -> Any:
    """YAML of one document as plain data; raises `ValueError` with what is wrong.

    Numbers are those of YAML 1.2: `010` is 10, `1e-3` a number, and `12:30`, `yes` and `2026-01-01` are text. There
    are neither merge keys (`<<`), which can grow without bound, nor duplicate keys.
    """
    try:
        value = yaml.load(content.decode(), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)[:300]) from None
    except RecursionError:
        raise ValueError("nests too deeply") from None
    except (TypeError, AttributeError, LookupError, OverflowError) as error:
        # PyYAML raises these for a value that does not have the type of its tag, as in !!int ""
        raise ValueError(f"has a value of another type than its tag says ({type(error).__name__})") from None
    _check_extent(value)
    return value


def read_yaml(path: Path, *, label: str) -> Any:
    """The plain data of a user's YAML file; raises `UserError`, which begins with `label`."""
    try:
        return parse_yaml(read_bytes(path))
    except OSError as error:
        raise UserError(f"{label}: cannot be read ({error.strerror or one_line(error)})") from None
    except ValueError as error:
        raise UserError(f"{label}: cannot be read as YAML: {one_line(error)}") from None


def format_yaml(value: Any) -> str:
    """Plain data as YAML, of which `parse_yaml`, and readers of YAML 1.1 too, make the same data."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None)


def short_repr(value: object) -> str:
    """`repr(value)`, cut where it is long, for a message of one line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints, or endless nesting
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 120 else f"{text[:119]}…"


TAG = "tag:yaml.org,2002:"
CORE_SCHEMA = [
    (f"{TAG}{name}", re.compile(rf"(?:{pattern})\Z"))
    for name, pattern in {
        "null": "~|null|Null|NULL|",
        "bool": "true|True|TRUE|false|False|FALSE",
        "int": "[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
        "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "merge": "<<",
    }.items()
]
"""What unquoted text stands for (YAML 1.2.2, section 10.3.2). PyYAML reads YAML 1.1: 010 is 8 and 12:30 is 750."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {None: CORE_SCHEMA}  # noqa: RUF012 (as PyYAML declares it)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, 0) if text.startswith(("0o", "0x")) else int(text)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        return float(self.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Do not expand merge keys; the safe loader then refuses their tag."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key occurs twice in one mapping", node.start_mark)
        return mapping


_Loader.add_constructor(f"{TAG}int", _Loader.construct_yaml_int)
_Loader.add_constructor(f"{TAG}float", _Loader.construct_yaml_float)


class _Dumper(yaml.SafeDumper):
    """Quotes text that is a number by YAML 1.1 or by YAML 1.2."""

    yaml_implicit_resolvers = {**yaml.SafeDumper.yaml_implicit_resolvers, None: CORE_SCHEMA}  # noqa: RUF012


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"a key occurs twice among {short_repr([key for key, _ in pairs])}")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a finite number")


def _check_extent(value: Any) -> None:
    """Raise `ValueError` for data that is deeper or larger than anything we write; does not recurse."""
    pending, count = [(value, 0)], 0
    while pending:
        item, depth = pending.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise ValueError("nests too deeply")
        if count > MAX_VALUES:
            raise ValueError(f"has more than {MAX_VALUES} values")
        if isinstance(item, dict):
            pending += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list | tuple | set):
            pending += [(part, depth + 1) for part in item]
