"""Types of fields: what a value may be, how its text on a command line is read, and what a field stands for.

A field is declared as content (what is computed) or, by `place`, as place: where, by whom and how carefully it is
computed. Resume, sweeps, TensorBoard's hparams and the report read that mark (`is_place_key`).
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    PlainSerializer,
    PlainValidator,
    StringConstraints,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

from vae_ray.storage.locations import parse_location, parse_path

MAX_WORKERS = 4096
MAX_SAMPLES = 4096
"""Of z for each image in an objective: all are decoded together."""
MAX_CLASSES = 10_000
"""Of a conditional VAE."""
MIN_PIXEL_SCALE = 0.001
LARGEST_FLOAT = 3.4e38
"""Of float32, in which a run computes."""
MAX_IMAGE_SIDE = 8192
AUGMENTATION = "flip|shift:[1-9][0-9]{0,2}"
COLOUR = "white|black|#[0-9A-Fa-f]{6}"
IMPORT_PATH = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$"
"""`package.module:name`, a user's own code."""


class Section(BaseModel):
    """Base of all sections and entries: frozen, and no other keys than the declared ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Misfit(ValueError):
    """A value that does not go with others of its section. `instead` is one that does, or one of the field `field`."""

    def __init__(self, reason: str, *, instead: Any, field: str | None = None) -> None:
        super().__init__(reason)
        self.instead, self.field = instead, field


@dataclass(frozen=True)
class Shown:
    """Marks a field whose values have a form of their own in help and reference."""

    text: str


def place(default: Any, **options: Any) -> Any:
    """A field that says where, by whom or how carefully a run is computed; it may differ on resume."""
    return Field(default, json_schema_extra={"place": True}, **options)


def _split_list(value: object) -> object:
    """`"400,100"` or `"[400, 100]"` from a command line becomes a list; `""` an empty one; a number a list of it."""
    if isinstance(value, int | float):
        return [value]
    if not isinstance(value, str):
        return value
    text = value.strip("[]() ")
    return [part.strip() for part in text.split(",")] if text else []


def _refuse_bool(value: object) -> object:
    """Python counts `True` as 1; a number that was meant as a switch is a mistake."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


def _refuse_overflow(value: float) -> float:
    if abs(value) > LARGEST_FLOAT:
        raise ValueError(f"should be at most {LARGEST_FLOAT:g} in magnitude, the end of float32")
    return value


def _location(value: str) -> str:
    """The location that a text means; one that no file system allows, or that no terminal shows, is a mistake."""
    location = parse_location(value)
    if any(ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in value + location):
        raise ValueError("should be a path of printable characters")
    return location


def _refuse_below_rounding(value: float) -> float:
    if value < MIN_PIXEL_SCALE:
        raise ValueError(
            f"should be at least {MIN_PIXEL_SCALE}: rounding to 256 levels alone has a standard deviation of 0.0011"
        )
    return value


def _worker_count(value: object) -> int | tuple[int, int] | str:
    """4, `"4"`, `"2..8"`, `(2, 8)` or `"auto"`; a range of one number is that number."""
    text = "..".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    if text == "auto":
        return text
    match = re.fullmatch(r"(\d{1,9})(?:\.\.(\d{1,9}))?", text.strip(), re.ASCII)
    if isinstance(value, bool | float) or match is None:
        raise ValueError("should be a number of workers such as 4, a range such as 2..8, or auto")
    low, high = int(match[1]), int(match[2] or match[1])
    if high > MAX_WORKERS:
        raise ValueError(f"should be at most {MAX_WORKERS}")
    if low > high or (low == 0 and high > 0):
        raise ValueError("should be a range from at least 1 up to a larger number, such as 2..8")
    return low if low == high else (low, high)


def _image_size(value: object) -> object:
    """64 or (height, width), of a text such as "64" or "48,64"; or None."""
    if value is None:
        return None
    parts = value.strip("[]() ").split(",") if isinstance(value, str) else value
    parts = [parts] if isinstance(parts, int) else parts
    if not isinstance(parts, list | tuple) or len(parts) not in (1, 2):
        raise ValueError("should be one side such as 64, height and width such as 48,64, or null")
    sides = [int(part) if re.fullmatch(r"\s*\d{1,5}\s*", str(part), re.ASCII) else 0 for part in parts]
    if not all(1 <= side <= MAX_IMAGE_SIDE for side in sides):
        raise ValueError(f"should be sides from 1 to {MAX_IMAGE_SIDE} pixels, such as 64 or 48,64, or null")
    return sides[0] if len(set(sides)) == 1 else tuple(sides)


def _value_range(value: object) -> object:
    """`(low, high)`, or "auto"."""
    if value == "auto":
        return value
    parts = value.strip("[]() ").split(",") if isinstance(value, str) else value
    try:
        low, high = map(float, parts if isinstance(parts, list | tuple) else ())
    except (TypeError, ValueError):
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError("should be auto, or two numbers, black first, such as 0,4095")
    return (low, high)


def _printable(value: str) -> str:
    if not value.isprintable():
        raise ValueError("should be printable characters")
    return value


def _channels(value: object) -> object:
    return {"1": 1, "3": 3}.get(value, value) if isinstance(value, str) else _refuse_bool(value)


def _sprite_side(value: object) -> object:
    return {"32": 32, "64": 64}.get(value, value) if isinstance(value, str) else value


def _augmentations(value: object) -> object:
    steps = _split_list(value)
    if isinstance(steps, list | tuple) and all(re.fullmatch(AUGMENTATION, str(step), re.ASCII) for step in steps):
        return steps
    raise ValueError("should be flip, shift:PIXELS or both, such as flip,shift:4")


def _colour(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(COLOUR, value, re.ASCII):
        return value.lower()
    raise ValueError("should be white, black, or a colour such as '#ff8000'")


def _count_text(value: int | tuple[int, int] | str) -> int | str:
    return f"{value[0]}..{value[1]}" if isinstance(value, tuple) else value


Int = Annotated[int, BeforeValidator(_refuse_bool)]
Seed = Annotated[Int, Field(ge=0, lt=2**63)]
Float = Annotated[float, BeforeValidator(_refuse_bool), Field(allow_inf_nan=False), AfterValidator(_refuse_overflow)]
PixelScale = Annotated[Float, AfterValidator(_refuse_below_rounding)]
WorkerCount = Annotated[
    int | tuple[int, int] | Literal["auto"],
    PlainValidator(_worker_count),
    PlainSerializer(_count_text, when_used="json"),
]
CpuCount = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=1)] | Literal["auto"]
FilePath = Annotated[
    Path, BeforeValidator(lambda value: _location(parse_path(value)) if isinstance(value, str | Path) else value)
]
Location = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value),
    Field(min_length=1),
    AfterValidator(_location),
]
"""A directory or a URI; see `vae_ray.storage.locations`."""
Widths = Annotated[
    tuple[Annotated[Int, Field(ge=1, le=65536)], ...], Field(max_length=256), BeforeValidator(_split_list)
]
Counts = Annotated[tuple[Annotated[Int, Field(ge=0, le=256)], ...], Field(max_length=256), BeforeValidator(_split_list)]
Fractions = Annotated[tuple[Annotated[Float, Field(ge=0)], ...], Field(max_length=256), BeforeValidator(_split_list)]
ImageSize = Annotated[int | tuple[int, int] | None, BeforeValidator(_image_size), Shown("INT|HEIGHT,WIDTH")]
ValueRange = Annotated[tuple[float, float] | Literal["auto"], BeforeValidator(_value_range), Shown("auto|LOW,HIGH")]
SpriteSide = Annotated[Literal[32, 64], BeforeValidator(_sprite_side), Shown("{32,64}")]
Channels = Annotated[Literal["auto", 1, 3], BeforeValidator(_channels), Shown("{auto,1,3}")]
Augmentations = Annotated[tuple[str, ...], BeforeValidator(_augmentations), Shown("flip,shift:INT")]
Name = Annotated[str, Field(min_length=1), AfterValidator(_printable)]
Colour = Annotated[str, BeforeValidator(_colour), Shown("white|black|#RRGGBB")]
ImportPath = Annotated[str, StringConstraints(pattern=IMPORT_PATH)]
ImportPaths = Annotated[tuple[ImportPath, ...], Field(max_length=64), BeforeValidator(_split_list)]


class UserEntry(BaseModel):
    """An entry that is a user's own code: `name` is its import path, all other keys are its keyword settings."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: ImportPath

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments of the user's function."""
        return dict(self.model_extra or {})


@dataclass(frozen=True)
class Choice:
    """Marks a field as an axis: it holds one of the entries of its union, discriminated by the field `tag`."""

    axis: str
    """What an entry is called in messages: "network", "likelihood", ..."""
    tag: str = "name"

    def entries(self, union: Any) -> dict[str, type[BaseModel]]:
        """Settings class by the entry's name, for the members of `union`; a user's own entry is not among them."""
        return {
            name: cls for cls in self._classes(union) for name in literal_values(cls.model_fields[self.tag].annotation)
        }

    def entry(self, union: Any, name: object) -> type[BaseModel] | None:
        """The settings class of the entry of that name or import path; None if there is none."""
        if isinstance(name, str) and ":" in name:
            users = [cls for cls in self._classes(union) if not literal_values(cls.model_fields[self.tag].annotation)]
            return users[0] if users else None
        return self.entries(union).get(str(name))

    def _classes(self, union: Any) -> tuple[type[BaseModel], ...]:
        return typing.get_args(union) or (union,)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def kind_of(value: Any) -> str | None:
            name = value.get(self.tag) if isinstance(value, Mapping) else getattr(value, self.tag, None)
            cls = self.entry(source, name)
            return cls.__name__ if cls is not None else None

        kinds = {cls.__name__: handler.generate_schema(cls) for cls in self._classes(source)}
        return core_schema.tagged_union_schema(kinds, discriminator=kind_of)


def choice_of(field: FieldInfo) -> Choice | None:
    """The mark of a field that is an axis."""
    return next((mark for mark in field.metadata if isinstance(mark, Choice)), None)


def literal_values(annotation: Any) -> tuple[Any, ...]:
    """The values of a `Literal[...]`; none of any other type."""
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()
