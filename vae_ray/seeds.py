"""Streams of randomness addressed by name, so that nothing depends on who draws first or on how often."""

from __future__ import annotations

import hashlib

import torch


def stream(seed: int, *address: str | int) -> int:
    """A 63-bit seed for the stream at `address`, e.g. `stream(seed, "noise", epoch, step)`.

    Hashing keeps streams of neighbouring addresses independent and equal on every machine.
    """
    text = "/".join(map(str, (seed, *address)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *address: str | int) -> torch.Generator:
    """A CPU generator at the start of the stream at `address`.

    Always on the CPU: the same numbers whatever the device that uses them.
    """
    return torch.Generator().manual_seed(stream(seed, *address))
