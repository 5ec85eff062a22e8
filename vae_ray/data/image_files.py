"""A user's own images from files, in the form of a model's: a directory of pictures, one picture, or an array."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vae_ray.data.images import as_images
from vae_ray.errors import UserError, one_line


def read_images(path: Path, image_shape: tuple[int, int, int], *, num: int) -> Tensor:
    """The first `num` images of a directory (by name), a picture, or a .npy or .npz file: `(n, C, H, W)` in [0, 1].

    Nothing is resized or converted: raises `UserError`, naming the file, for what does not have the `image_shape`.
    """
    if path.suffix.lower() in (".npy", ".npz"):
        array = _channels_first(_read_array(path), image_shape)
        return as_images(array[:num] if array.ndim else array, image_shape)
    Image.init()
    try:
        is_directory = path.is_dir()
        files = sorted(path.iterdir()) if is_directory else [path]
    except OSError as error:
        raise UserError(f"images: {path} cannot be read ({_reason(error)})") from None
    if is_directory:
        pictures = [file for file in files if file.suffix.lower() in Image.EXTENSION]
        files = [file for file in pictures if not file.name.startswith(".")][:num]
    if not files:
        raise UserError(f"images: {path} has no pictures; should be a directory of pictures, a .npy or a .npz file")
    return as_images(np.stack([_read_picture(file, image_shape) for file in files]), image_shape)


def _read_array(file: Path) -> NDArray[np.generic]:
    """The array of a .npy file, or the only one, or that of the name `images`, of a .npz file."""
    try:
        loaded = np.load(_no_pipe(file), allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            name = loaded.files[0] if len(loaded.files) == 1 else "images"
            if name not in loaded.files:
                names = f"the arrays {', '.join(loaded.files)}" if loaded.files else "no arrays"
                raise UserError(f"images: {file} has {names}; should have one, or one of the name images")
            return np.asarray(loaded[name])
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"images: {file} cannot be read ({_reason(error)})") from None


def _channels_first(images: NDArray[np.generic], image_shape: tuple[int, int, int]) -> NDArray[np.generic]:
    """`(N, H, W)` of grey images and `(N, H, W, C)` as `(N, C, H, W)`; other shapes are left as they are."""
    channels, height, width = image_shape
    if images.shape[1:] == (height, width) and channels == 1:
        return images[:, None]
    if images.shape[1:] == (height, width, channels) and images.shape[1:] != image_shape:
        return np.moveaxis(images, 3, 1)
    return images


def _read_picture(file: Path, image_shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """uint8 `(C, H, W)`."""
    channels, height, width = image_shape
    try:
        with Image.open(_no_pipe(file)) as picture:
            size, mode = picture.size, picture.mode
            pixels = np.asarray(picture.convert("RGBA")) if size == (width, height) else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"images: {file} cannot be read as a picture ({_reason(error)})") from None
    if pixels is None:
        raise UserError(f"images: {file} has {size[0]}x{size[1]} pixels, the model's have {width}x{height}; resize it")
    if mode.startswith(("I", "F")):  # Pillow would cut the values off
        raise UserError(f"images: {file} has more than 8 bits a pixel; convert it to 8 bits, or give a .npy file")
    colour, alpha = pixels[..., :3], pixels[..., 3]
    if channels < 4 and alpha.min() < 255:
        raise UserError(f"images: {file} has transparent pixels, the model's images have none; remove them")
    if channels == 1 and (colour != colour[..., :1]).any():
        raise UserError(f"images: {file} is in colour, the model's images are grey; convert it to grey")
    if channels not in (1, 3, 4):
        raise UserError(f"images: {file} is a picture, the model's images have {channels} channels; give a .npy file")
    return np.moveaxis(pixels[..., :channels], 2, 0)


def _no_pipe(file: Path) -> Path:
    """The file; raises `ValueError` for a pipe or a device, which could keep a reader waiting."""
    if file.exists() and not (file.is_file() or file.is_dir()):
        raise ValueError("is a pipe or a device, should be a regular file")
    return file


def _reason(error: Exception) -> str:
    """Why a file cannot be read; without its name again."""
    return getattr(error, "strerror", None) or one_line(error)[:120]
