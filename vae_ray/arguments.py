"""Checks of the arguments that users give in Python; each raises `UserError` with the name and the value."""

from __future__ import annotations

import numbers
from collections.abc import Collection
from typing import Any

import torch

from vae_ray.errors import UserError
from vae_ray.storage.reading import short_repr

FLOAT32_MAX = torch.finfo(torch.float32).max


def check_whole(name: str, value: Any, *, least: int) -> None:
    """Raise `UserError` for what is no whole number from `least` to 2^63 - 1."""
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_whole or not least <= int(value) < 2**63:
        raise UserError(f"{name}: got {short_repr(value)}, should be a whole number, at least {least} and below 2**63")


def finite_float(name: str, value: Any, *, least: float = -FLOAT32_MAX) -> float:
    """The number as a float; raises `UserError` for what is none, less than `least`, or not finite in float32."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not least <= value <= FLOAT32_MAX:
        allowed = f"from {least:.4g} to {FLOAT32_MAX:.4g}"
        raise UserError(f"{name}: got {short_repr(value)}, should be a finite number {allowed}; for example 1.0")
    return float(value)


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise `UserError` for what is not one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        *others, last = choices
        raise UserError(f"{name}: got {short_repr(value)}, should be {', '.join(others)} or {last}")


def existing_device(device: str | int | torch.device) -> torch.device:
    """The device of that name; raises `UserError` if this machine does not have it."""
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):  # not the name of any
        wanted = torch.device("meta")
    if wanted.type == "cpu":
        return wanted
    accelerator = torch.accelerator.current_accelerator()
    count = torch.accelerator.device_count() if accelerator else 0
    existing = [f"{accelerator}:{index}" for index in range(count)]
    if f"{wanted.type}:{wanted.index or 0}" not in existing:
        raise UserError(f"device: got {short_repr(device)}, this machine has {', '.join(['cpu', *existing])}")
    return wanted
