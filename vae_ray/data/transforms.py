"""What happens to images on the way to a batch: augmentation and random binarization, on the device of the images.

All randomness is addressed by (seed, split, epoch, image): value j of an image is a hash of the address and of j, from
a counter-based generator in the sense of Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2, 3". An image
therefore looks the same whatever the batch, the worker or the device that computes it, and after a resume.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vae_ray.config.fields import AUGMENTATION
from vae_ray.seeds import stream

Binarization = Literal["none", "dynamic", "fixed"]


def _signed(value: int, bits: int) -> int:
    """The signed integer of so many bits that has the bits of an unsigned one; torch's multiplication wraps around."""
    return value - (1 << bits) if value >> (bits - 1) else value


GOLDEN = _signed(0x9E3779B97F4A7C15, 64)
MIX64 = _signed(0xBF58476D1CE4E5B9, 64), _signed(0x94D049BB133111EB, 64)
MIX32 = _signed(0x7FEB352D, 32), _signed(0x846CA68B, 32)


def _xor_shift(x: Tensor, shift: int, scratch: Tensor) -> Tensor:
    """x ^= x >> shift, in place. Integers are signed here: the mask makes the shift a logical one."""
    torch.bitwise_right_shift(x, shift, out=scratch)
    scratch &= (1 << (8 * x.element_size() - shift)) - 1
    return x.bitwise_xor_(scratch)


def _image_keys(indices: Tensor, seed: int) -> Tensor:
    """A 64-bit key for each image: output number `indices` of SplitMix64 that starts at `seed`.

    Steele, Lea and Flood (2014), "Fast splittable pseudorandom number generators", with Stafford's mixer 13.
    """
    key = (indices + 1) * GOLDEN + seed
    scratch = torch.empty_like(key)
    _xor_shift(key, 30, scratch).mul_(MIX64[0])
    _xor_shift(key, 27, scratch).mul_(MIX64[1])
    return _xor_shift(key, 31, scratch)


def _random_bits(indices: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """32 random bits each, as int32 `(n, count)`, and memory of that size which the caller may overwrite.

    Row i is the same for the same `(indices[i], seed)`.

    The mixer is Wellons' lowbias32 (2018), https://nullprogram.com/blog/2018/07/31, of the position in the image. One
    half of the image's key is added before it, the other half is mixed in at its middle: the mixer alone has 32 bits of
    state, too few for the pixels of a long training.

    Args:
        indices: int64 `(n,)`, numbers of the images, at least 0.
        count: Values an image.
        seed: Of the stream, as `vae_ray.seeds.stream` returns.
    """
    keys = _image_keys(indices, seed)
    first, second = keys.to(torch.int32)[:, None], (keys >> 32).to(torch.int32)[:, None]
    bits = torch.arange(count, dtype=torch.int32, device=indices.device) + first
    scratch = torch.empty_like(bits)  # one for all steps: fresh memory costs more than the arithmetic
    _xor_shift(bits, 16, scratch).mul_(MIX32[0]).bitwise_xor_(second)
    _xor_shift(bits, 15, scratch).mul_(MIX32[1])
    return _xor_shift(bits, 16, scratch), scratch


def uniform(indices: Tensor, count: int, seed: int) -> Tensor:
    """float32 `(n, count)` in [0, 1): multiples of 2^-24, of which each is as probable as any other."""
    return _uniform(*_random_bits(indices, count, seed))


def _uniform(bits: Tensor, scratch: Tensor) -> Tensor:
    """Floats in [0, 1) of the upper 24 random bits, in the memory of `scratch`; `bits` may then be overwritten."""
    # The shift is arithmetic: from -2^23 to 2^23 - 1, which float32 holds exactly; so are the product and the sum.
    bits >>= 8
    return scratch.view(torch.float32).copy_(bits).mul_(2**-24).add_(0.5)


def random_integers(indices: Tensor, count: int, seed: int, *, high: int) -> Tensor:
    """int64 `(n, count)` from 0 to `high` - 1, each as probable as the others to within 2^-32."""
    unsigned = _random_bits(indices, count, seed)[0].long() & 0xFFFFFFFF
    return (unsigned * high) >> 32


@dataclass(frozen=True)
class Flip:
    """Mirrors left and right, with probability 1/2."""

    def __call__(self, pixels: Tensor, indices: Tensor, seed: int) -> Tensor:
        is_flipped = random_integers(indices, 1, seed, high=2) == 1
        return torch.where(is_flipped[:, :, None, None], pixels.flip(-1), pixels)


@dataclass(frozen=True)
class Shift:
    """Moves by up to `limit` whole pixels down or up and right or left, uniformly; the edge is repeated."""

    limit: int

    def __call__(self, pixels: Tensor, indices: Tensor, seed: int) -> Tensor:
        offsets = random_integers(indices, 2, seed, high=2 * self.limit + 1) - self.limit
        return _shifted(pixels, offsets[:, 0], offsets[:, 1], limit=self.limit)


def _shifted(pixels: Tensor, down: Tensor, right: Tensor, *, limit: int) -> Tensor:
    """Images moved by whole pixels: every row of the result is one window of a row whose ends are repeated."""
    n, channels, height, width = pixels.shape
    left_edge, right_edge = (edge.expand(-1, -1, -1, limit) for edge in (pixels[..., :1], pixels[..., -1:]))
    padded = torch.cat([left_edge, pixels, right_edge], dim=-1)
    device = pixels.device
    row = (torch.arange(height, device=device) - down[:, None]).clamp_(0, height - 1)
    plane = torch.arange(n * channels, device=device).view(n, channels, 1)
    start = (plane * height + row[:, None]) * (width + 2 * limit) + (limit - right)[:, None, None]
    # An index a row instead of a pixel: up to 3 times faster than gather, 20 times than indexing (64x3x64x64).
    windows = padded.view(-1).unfold(0, width, 1)
    return windows.index_select(0, start.view(-1)).view(pixels.shape)


Augmentation = Flip | Shift


def parse_augmentation(text: str) -> Augmentation:
    """The augmentation that a configuration names; raises `ValueError` with what is allowed."""
    if not re.fullmatch(AUGMENTATION, text):
        raise ValueError(f"got {text!r}, should be flip or shift:K with K from 1 to 999 pixels, as in shift:4")
    name, _, limit = text.partition(":")
    return Flip() if name == "flip" else Shift(int(limit))


def augment(
    pixels: Tensor, indices: Tensor, steps: Sequence[Augmentation], *, seed: int, epoch: int, split: str
) -> Tensor:
    """Images after all `steps`, in their order.

    Args:
        pixels: uint8 `(n, C, H, W)`.
        indices: int64 `(n,)`, the images' numbers in the split, on the device of `pixels`.
    """
    if not len(pixels):  # the empty shard of a worker
        return pixels
    for number, step in enumerate(steps):
        # numbered, so that the same step twice draws twice
        pixels = step(pixels, indices, stream(seed, "augmentation", split, epoch, number))
    return pixels


def binarize(pixels: Tensor, indices: Tensor, how: Binarization, *, seed: int, epoch: int | None, split: str) -> Tensor:
    """float32 images: a pixel is 1 with probability its grey level, else 0; with `how` "none" the grey level itself.

    Salakhutdinov and Murray (2008). "dynamic" draws anew in every epoch, "fixed" once: in evaluation, which has the
    epoch None, the two are equal. Level 0 is never 1, level 1 always.

    Args:
        pixels: uint8, or floats in [0, 1], `(n, C, H, W)`.
        indices: int64 `(n,)`, the images' numbers in the split, on the device of `pixels`.
    """
    if how == "none":
        return _to_levels(pixels.float(), pixels.dtype)
    address = (epoch,) if how == "dynamic" and epoch is not None else ()
    bits, scratch = _random_bits(indices, pixels[:1].numel(), stream(seed, "binarization", split, *address))
    draws = _uniform(bits, scratch).view(pixels.shape)
    levels = bits.view(torch.float32).view(pixels.shape).copy_(pixels)  # in its memory: three times faster
    return draws.lt_(_to_levels(levels, pixels.dtype))


def _to_levels(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Grey levels in [0, 1] of float32 `values`, which were pixels of `dtype`; overwrites those of uint8."""
    return values.mul_(1 / 255) if dtype == torch.uint8 else values
