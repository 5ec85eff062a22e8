"""The commands that make a picture with a trained model: one call each. Light until a command runs."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from vae_ray import signals
from vae_ray.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image
    from torch import Tensor

    from vae_ray.inference import TrainedVAE


def load_model(options: argparse.Namespace) -> TrainedVAE:
    """The model of the command."""
    if "out" in options:  # of a picture
        out_file(options)  # before anything is read
    if getattr(options, "images", None) == "":
        raise UserError("--images: got '', should be a directory of pictures, a picture, a .npy or a .npz file")
    with signals.deferred():
        from vae_ray.inference import TrainedVAE

    model = TrainedVAE.load(options.checkpoint, trust_code=options.trust_code, data=options.overrides)
    return model.with_prior(options.prior) if getattr(options, "prior", None) else model


def _images(options: argparse.Namespace, model: TrainedVAE, num: int) -> tuple[Tensor, Any]:
    """The first `num` images of `--images`, else of the test split; and the labels of a conditional VAE's."""
    if options.images is None:
        if options.label is not None:
            raise UserError(
                f"--label: got {options.label!r}, but test images have labels; leave it out, or add --images"
            )
        return model.test_examples(num, spread=True)
    from vae_ray.data.image_files import read_images
    from vae_ray.data.sources import rules_for
    from vae_ray.storage.locations import local_path

    rules = rules_for(model.experiment.data, model.image_shape)
    images = read_images(local_path(options.images, key="--images"), model.image_shape, num=num, rules=rules)
    return images, _label(options, model)


def _label(options: argparse.Namespace, model: TrainedVAE) -> int | None:
    """The class that `--label`, a number or a name, stands for."""
    label: str | None = options.label
    is_name = label in model.target_names.get(model.model.condition_on or "", [])
    is_number = label is not None and label.isdecimal() and not is_name
    return model.class_of(int(label) if is_number else label, key="--label")  # type: ignore[arg-type]


def _name_of_images(options: argparse.Namespace) -> str:
    return "test images" if options.images is None else f"images of {os.path.basename(options.images.rstrip(os.sep))}"


def out_file(options: argparse.Namespace) -> Path:
    """The path of `--out`; raises `UserError` if it cannot be that of a picture."""
    from vae_ray.storage.locations import local_path

    out = local_path(options.out, key="--out")
    if out.suffix.lower() != ".png":
        raise UserError(f"--out: got {options.out!r}, should end in .png: pictures are PNG files")
    return out


def write_picture(picture: Image, options: argparse.Namespace) -> str:
    """Write a picture to `--out`; the file's path."""
    from vae_ray.run_files.image_grids import png_bytes

    out = out_file(options)
    try:
        out.write_bytes(png_bytes(picture))
    except OSError as error:
        raise UserError(f"--out: got {options.out!r}, cannot be written ({error.strerror})") from None
    return str(out)


def _answer(picture: Image, options: argparse.Namespace, model: TrainedVAE) -> dict[str, Any]:
    out = write_picture(picture, options)
    return {"out": out, "checkpoint": str(model.checkpoint.path), "epoch": model.checkpoint.epoch}


def _title(model: TrainedVAE, what: str) -> str:
    from vae_ray.data.cache import name_of

    return f"{name_of(model.experiment.data)} · {what} · epoch {model.checkpoint.epoch}"


def generate(options: argparse.Namespace) -> dict[str, Any]:
    """new images, decoded from z ~ p(z), the prior"""
    from vae_ray.run_files.image_grids import square_grid

    model = load_model(options)
    label = None if options.label is None else _label(options, model)
    images = model.generate(options.num, seed=options.seed, temperature=options.temperature, label=label)
    prior = "p(z)" if model.fitted_prior is None else model.fitted_prior.label
    return _answer(square_grid(images, title=_title(model, f"samples, z ~ {prior}")), options, model)


def reconstruct(options: argparse.Namespace) -> dict[str, Any]:
    """test images, or your own, and their reconstructions"""
    from vae_ray.run_files.image_grids import pairs_grid

    model = load_model(options)
    images, labels = _images(options, model, options.num)
    title = _title(model, f"{_name_of_images(options)}, z = posterior mean")
    return _answer(pairs_grid(images, model.reconstruct(images, labels), title=title), options, model)


def interpolate(options: argparse.Namespace) -> dict[str, Any]:
    """paths in latent space between pairs of test images, or of your own"""
    from vae_ray.run_files.image_grids import grid

    model = load_model(options)
    images, labels = _images(options, model, 2 * options.num)
    if len(images) < 2:
        raise UserError(f"images: got {len(images)}, should be at least two, the ends of a path; give more by --images")
    start, end = images[0::2], images[1::2]
    labels, end_labels = (labels[0::2][: len(end)], labels[1::2]) if getattr(labels, "ndim", 0) else (labels, None)
    paths = model.interpolate(start[: len(end)], end, labels, end_labels, steps=options.steps, method=options.method)
    title = _title(model, f"{options.method} interpolation between pairs of {_name_of_images(options)}")
    return _answer(grid(list(paths), title=title), options, model)


def traverse(options: argparse.Namespace) -> dict[str, Any]:
    """what each latent dimension does to an image"""
    from vae_ray.run_files.image_grids import grid

    model = load_model(options)
    images, labels = _images(options, model, 1000)
    traversal = model.traverse(images, labels, num_dimensions=options.num, steps=options.steps)
    title = _title(model, f"{traversal.title()}, -3 to 3")
    return _answer(grid(list(traversal.images), title=title, row_labels=traversal.row_labels()), options, model)
