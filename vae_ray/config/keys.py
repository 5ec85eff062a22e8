"""Dotted keys: the one language that names, documents and overrides fields, for the CLI, YAML, jobs and Tune.

optim.lr                   a field
model.network              the entry of an axis, `mlp` or a user's `package.module:name`; short for model.network.name
model.network.hidden       a setting of the entry that is chosen
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from vae_ray.config.fields import Choice, Misfit, Section, Shown, choice_of, literal_values
from vae_ray.config.migration import renamed_key
from vae_ray.config.sections.run import NAME_RULE
from vae_ray.errors import UserError
from vae_ray.storage.reading import parse_yaml, short_repr

EXAMPLES = {
    "run.name": "my-run",
    "run.callbacks": "my_callbacks:Log",
    "data.augment": "flip",
    "objective.target": "100",
    "optim.schedule.epochs": (10, 20),
}
"""Values that messages show of fields whose default is none to try."""


class FieldDoc(NamedTuple):
    """One field as the command line's help and docs/configuration.md show it."""

    key: str
    flat_key: str
    """The key as `flattened` has it: `model.network.name` for `model.network`; of others the key itself."""
    type: str
    default: Any
    description: str
    entry: str
    """The entry whose setting it is, as in "mlp"; empty for a field that is always there."""
    is_place: bool
    is_axis: bool = False
    """Whether its value is the name of an entry; the key without the last part of `flat_key` means it too."""
    owner: str = ""
    """The class that declares it."""


def field_docs(model: type[BaseModel], prefix: str = "", entry: str = "", is_place: bool = False) -> Iterator[FieldDoc]:
    """Every dotted key below `model` with its type, default and sentence of documentation."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        place = is_place or _is_marked_place(field)
        if (axis := choice_of(field)) is not None:
            yield from _axis_docs(key, axis, field, place)
        elif (section := _section(field)) is not None:
            yield from field_docs(section, f"{key}.", entry, place)
        else:
            shown = next((mark.text for mark in field.metadata if isinstance(mark, Shown)), None)
            kind = shown or _type_name(field.annotation)
            text = field.description or ""
            yield FieldDoc(key, key, kind, field.default, text, entry, place, owner=model.__name__)


def _axis_docs(key: str, axis: Choice, field: FieldInfo, is_place: bool) -> Iterator[FieldDoc]:
    entries = axis.entries(field.annotation)
    has_user_entry = axis.entry(field.annotation, "module:name") is not None
    names = ",".join([*entries, *(["MODULE:NAME"] if has_user_entry else [])])
    tag_key = key if axis.tag == "name" else f"{key}.{axis.tag}"
    description = field.description or f"The {axis.axis}."
    default = getattr(field.default, axis.tag)
    yield FieldDoc(tag_key, f"{key}.{axis.tag}", f"{{{names}}}", default, description, "", is_place, is_axis=True)
    by_class: dict[type[BaseModel], list[str]] = {}
    for name, cls in entries.items():
        by_class.setdefault(cls, []).append(name)
    common = _common_fields(by_class)
    for number, (cls, cls_names) in enumerate(by_class.items()):
        for doc in field_docs(cls, f"{key}.", ", ".join(cls_names), is_place):
            name = doc.key.removeprefix(f"{key}.")
            if name == axis.tag or (name in common and number):
                continue
            yield doc._replace(entry="") if name in common and len(by_class) > 1 else doc


def _is_marked_place(field: FieldInfo) -> bool:
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("place"))


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The class of a field that is a section; None for a value or an axis."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) and choice_of(field) is None else None


def flattened(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"model.latent_dim": 20, ...}` of nested plain data."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def apply_overrides(
    model: type[BaseModel], tree: dict[str, Any], overrides: Mapping[str, Any], *, reads_text: bool
) -> None:
    """Write dotted overrides into the nested plain data `tree` of `model`.

    With `reads_text` the text of a setting of a user's own code, which has no declared type, is read as YAML. Entries
    are chosen before their settings are written, in whatever order both are given. Raises `UserError` for a key that
    does not exist, with the nearest that does.
    """
    flat: dict[str, Any] = {}
    for key, value in overrides.items():
        _collect(str(key).replace("-", "_"), value, flat)
    for key in sorted(flat, key=lambda key: (key.count("."), key.rpartition(".")[2] not in ("name", "source"))):
        try:
            _write(model, tree, key, flat[key], reads_text=reads_text)
        except UnknownKey:
            if (new := renamed_key(key)) is not None:
                raise UserError(f"key {key!r} does not exist any more; use {new!r}") from None
            existing = list(dict.fromkeys(doc.key for doc in field_docs(model)))
            raise UserError(f"key {key!r} does not exist; {did_you_mean(key, existing)}") from None


class UnknownKey(Exception):
    """There is no field of that key."""


def _collect(key: str, value: Any, flat: dict[str, Any]) -> None:
    """Spread a mapping that is given for a section or an entry over its dotted keys."""
    if isinstance(value, Mapping) and value:
        for name, part in value.items():
            _collect(f"{key}.{str(name).replace('-', '_')}", part, flat)
    else:
        flat[key] = value


def _write(model: type[BaseModel], tree: dict[str, Any], key: str, value: Any, *, reads_text: bool) -> None:
    node, parts = tree, key.split(".")
    for depth, part in enumerate(parts):
        field = model.model_fields.get(part)
        rest = parts[depth + 1 :]
        if field is None:
            if model.model_config.get("extra") == "allow" and not rest:
                node[part] = _setting(key, value) if reads_text and isinstance(value, str) else value
                return
            raise UnknownKey
        axis = choice_of(field)
        if axis is not None:
            node.setdefault(part, {axis.tag: getattr(field.default, axis.tag)})  # in an entry that was just chosen
            if not rest or rest == [axis.tag]:
                _choose(axis, field, node, part, value, key=key)
                return
            cls = axis.entry(field.annotation, node[part][axis.tag])
            assert cls is not None
            if rest[0] not in cls.model_fields and cls.model_config.get("extra") != "allow":
                raise _field_of_another_entry(axis, field, node[part][axis.tag], key, rest[0])
            node, model = node[part], cls
        elif (section := _section(field)) is not None:
            if not rest:
                if value == {} or value is None:
                    return
                names = ", ".join(f"{key}.{name}" for name in section.model_fields)
                raise UserError(f"{key}: is a section; set one of {names}")
            node, model = node[part], section
        elif rest:
            raise UnknownKey
        else:
            is_text = isinstance(value, str) and value not in literal_values(field.annotation)
            text_means_null = is_text and value.lower() in ("null", "none", "~")
            node[part] = None if text_means_null else value


def _setting(key: str, text: str) -> Any:
    """The value that the text of a setting of a user's own code stands for."""
    try:
        return parse_yaml(text.encode())
    except ValueError as error:
        raise UserError(f"{key}: got {short_repr(text)}, which is no YAML ({error}); quote it as text") from None


def _choose(axis: Choice, field: FieldInfo, node: dict[str, Any], part: str, value: Any, *, key: str) -> None:
    """Choose an entry with its defaults; what all entries have in common, and content that it shares, is kept."""
    cls = axis.entry(field.annotation, value)
    names = list(axis.entries(field.annotation))
    if cls is None:
        has_user_entry = axis.entry(field.annotation, "module:name") is not None
        allowed = ", ".join(names) + (" or MODULE:NAME of your own" if has_user_entry else "")
        near = difflib.get_close_matches(str(value), names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{key}: got {short_repr(value)}, should be one of {allowed}{hint}")
    if node[part][axis.tag] == value:
        return
    common = _common_fields(axis.entries(field.annotation).values())
    if axis.entry(field.annotation, node[part][axis.tag]) is cls:  # as for the sources folder and arrays
        common |= {name for name, shared in cls.model_fields.items() if not _is_marked_place(shared)} - {axis.tag}
    node[part] = {axis.tag: value, **{name: kept for name, kept in node[part].items() if name in common}}


def _common_fields(classes: Iterable[type[BaseModel]]) -> set[str]:
    """Fields that all entries of an axis inherit from a base class of their own."""
    first, *others = dict.fromkeys(classes)
    bases = [base for base in first.__mro__[1:] if base is not Section and issubclass(base, Section)]
    shared = [base for base in bases if all(issubclass(other, base) for other in others)]
    return {name for base in shared for name in base.model_fields}


def _field_of_another_entry(axis: Choice, field: FieldInfo, entry: str, key: str, name: str) -> UserError:
    entries = axis.entries(field.annotation)
    owners = [other for other, cls in entries.items() if name in cls.model_fields]
    parent = key.rpartition(".")[0]
    if owners:
        flag = parent if axis.tag == "name" else f"{parent}.{axis.tag}"
        example = "auto" if "auto" in owners else owners[0]  # a user's own images
        return UserError(
            f"{key}: the {axis.axis} {entry!r} has no field {name!r}, {', '.join(owners)} "
            f"{'have' if len(owners) > 1 else 'has'}; for example --{flag.replace('_', '-')} {example}"
        )
    raise UnknownKey


def did_you_mean(wrong: str, names: Sequence[str]) -> str:
    """A hint for a misspelled name: the nearest of `names`, or all of them."""
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    last_part = wrong.strip(".").rpartition(".")[2]
    by_last_part = [key for key in names if last_part and key.rpartition(".")[2] == last_part]
    by_last_part.sort(key=lambda key: key.count("."))
    if near or by_last_part:
        nearest = min(by_last_part, key=lambda key: key.count("."), default=None) or near[0]
        return f"did you mean {nearest!r}?"
    return f"choose one of {', '.join(names)}" if len(names) < 20 else "vae-ray train --help lists all"


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line for the first of pydantic's errors: key, value received, what is allowed, what to try."""
    first = error.errors()[0]
    # of several entries that have the field the one that is chosen, else the first
    every = sorted(field_docs(model), key=lambda doc: doc.owner in first["loc"], reverse=True)
    docs = {doc.key: doc for doc in reversed(every)}
    # a location also names the classes of entries (which begin with a capital), members of unions and places in lists
    parts = [str(part) for part in first["loc"] if not str(part)[:1].isupper()]
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    key = next((prefix for prefix in prefixes if prefix in docs), prefixes[0])
    cause = first.get("ctx", {}).get("error")
    example = _misfit_example(key, cause) if isinstance(cause, Misfit) else _example(docs[key]) if key in docs else ""
    hint = f"; for example {example}" if example else ""
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if key == "run.name":
        reason = f"should be {NAME_RULE}"
    elif first["type"] in ("too_short", "string_too_short") and not first["input"]:
        reason = "should not be empty"
    elif first["type"] == "too_long":
        reason = f"should be at most {first['ctx']['max_length']} values, not {first['ctx']['actual_length']}"
    elif first["type"] == "string_pattern_mismatch":
        reason = "should be MODULE:NAME of your own code, such as my_nets:tiny"
    return f"{key}: got {short_repr(first['input'])}, {reason}{hint}"


def _example(doc: FieldDoc) -> str:
    return _assignment(doc.key, EXAMPLES.get(doc.key, doc.default))


def _misfit_example(key: str, misfit: Misfit) -> str:
    return _assignment(key if misfit.field is None else f"{key.rpartition('.')[0]}.{misfit.field}", misfit.instead)


def _assignment(key: str, value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, tuple | list) else "null" if value is None else str(value)
    return f"{flag_of(key)} {text or repr('')}"


def flag_of(key: str) -> str:
    """`--optim.weight-decay` for `optim.weight_decay`."""
    return f"--{key.replace('_', '-')}"


def _type_name(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if origin is Literal:
        return "{" + ",".join(literal_values(annotation)) + "}"
    if origin in (typing.Union, types.UnionType):
        kinds = [part for part in typing.get_args(annotation) if part is not type(None)]
        first = _type_name(kinds[0])
        return f"{first}|auto" if any(literal_values(part) == ("auto",) for part in kinds[1:]) else first
    if origin is tuple:
        kind = _type_name(typing.get_args(annotation)[0])
        return f"{kind},{kind},..."
    return {int: "INT", float: "FLOAT", bool: "BOOL", str: "TEXT", Path: "PATH"}[annotation]
