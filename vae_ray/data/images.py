"""Images that a user gives to a trained model, as arrays, tensors or lists: checked, and brought to one form."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from vae_ray.data.batches import scaled
from vae_ray.errors import UserError, one_line

ROUNDING = 1e-6
"""How far a float may lie outside of [0, 1], as (2x - 1 + 1) / 2 does."""


def as_tensor(values: Any, *, key: str) -> Tensor:
    """A tensor, an array or a nested list of numbers as a tensor; raises `UserError` that begins with `key`."""
    if isinstance(values, Tensor):
        if values.layout != torch.strided or values.is_nested or values.is_meta:
            kind = "meta" if values.is_meta else "nested" if values.is_nested else "sparse"
            raise UserError(f"{key}: got a {kind} tensor, should be a dense tensor")
        return values.detach()
    if isinstance(values, np.ma.MaskedArray):
        raise UserError(f"{key}: got a masked array, should be a dense tensor or array; try .filled(0)")
    try:
        array = np.asarray(values, order="C")
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, strings, objects
        reason = one_line(error)[:120]
        raise UserError(f"{key}: got a {type(values).__name__} that is no array of numbers ({reason})") from None


def as_images(images: Any, image_shape: tuple[int, int, int]) -> Tensor:
    """Images `(N, *image_shape)` as float32 in [0, 1].

    Takes uint8 (divided by 255), bool, and floats in [0, 1] of any precision. Raises `UserError` for anything else, for
    what is not finite, and for no image.
    """
    images = as_tensor(images, key="images")
    if images.ndim != 4 or tuple(images.shape[1:]) != image_shape or not len(images):
        got, needed = tuple(images.shape), ", ".join(map(str, image_shape))
        is_channels_last = got[1:] == (*image_shape[1:], image_shape[0]) != image_shape
        remedy = "; channels come first: try np.moveaxis(images, -1, 1)" if is_channels_last else ""
        raise UserError(f"images: got shape {got}, should be (N, {needed}) with at least one image{remedy}")
    if images.dtype == torch.uint8:
        return scaled(images)
    floats = torch.zeros(1) if images.is_complex() else images.float()
    low, high = (float(end) for end in floats.aminmax())  # NaN if one value is
    if images.dtype == torch.bool or (images.is_floating_point() and low >= -ROUNDING and high <= 1 + ROUNDING):
        return floats.clamp(0, 1)
    dtype, remedy = str(images.dtype).removeprefix("torch."), ""
    received = f"{dtype} from {low:g} to {high:g}"
    if images.is_complex() or not floats.isfinite().all():
        received = f"{dtype} with NaN or infinity" if images.is_floating_point() else dtype
    elif low >= 0 and high <= 255:
        is_float = images.is_floating_point()
        remedy = "; try images / 255" if is_float else "; convert them to uint8 if 255 is white, to float if 1 is"
    elif low >= -1 and high <= 1:
        remedy = "; try (images + 1) / 2"
    raise UserError(f"images: got {received}, should be uint8, bool, or floats in [0, 1]{remedy}")
