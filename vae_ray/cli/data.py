"""`vae-ray data`: a user's own images before training. Light until a command runs."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from vae_ray import signals
from vae_ray.cli.pictures import out_file, write_picture
from vae_ray.errors import UserError, one_line

if TYPE_CHECKING:
    from torch import Tensor

    from vae_ray.config.experiment import Experiment
    from vae_ray.data.dataset import Dataset, Split

IMAGES_PER_GROUP = 12
LINES_SHOWN = 30
DAY_SECONDS = 86_400
UNUSED_DAYS = 30


def data(options: argparse.Namespace) -> dict[str, Any]:
    """your own images: show what training will see, prepare them once for many runs, clean the cache"""
    if options.action == "clean" and options.out is not None:
        raise UserError("argument --out: is not one of data clean; show and prepare have it")
    if options.action != "clean" and options.unused_days is not None:
        raise UserError(f"argument --unused-days: is not one of data {options.action}; clean has it")
    return {"show": _show, "prepare": _prepare, "clean": _clean}[options.action](options)


def experiment_of(options: argparse.Namespace) -> Experiment:
    """The preset `images`, with the images that the command names."""
    from vae_ray.config.experiment import Experiment

    root = {} if options.root is None else {"data.root": options.root}
    if root and "data.root" in options.overrides:
        raise UserError(f"--data.root: got {options.overrides['data.root']!r} beside ROOT {options.root!r}; give one")
    return Experiment.preset("images").with_overrides({**root, **options.overrides})


def _show(options: argparse.Namespace) -> dict[str, Any]:
    experiment = experiment_of(options)
    if options.out is not None:
        out_file(options)  # before anything is read
    with signals.deferred():
        from vae_ray.data.cache import open_dataset
        from vae_ray.run_files.image_grids import contact_sheet
        from vae_ray.run_files.progress import preparation_view

    if "max_skipped_fraction" in type(experiment.data).model_fields:  # what is wrong is shown, not refused
        experiment = experiment.with_overrides({"data.max_skipped_fraction": 1.0})
    with preparation_view(quiet=False) as progress:
        dataset = open_dataset(experiment.data, progress=progress)
    lines = [dataset.describe(), *dataset.warnings]
    if options.out is not None:
        title = os.path.basename(str(options.root or dataset.description.source).rstrip("/"))
        write_picture(contact_sheet(_groups(dataset), title=title, lines=lines), options)
    counts = {name: split.counts() for name, split in dataset.splits.items()}
    if options.json:
        return {
            "images": dataset.description.source,
            "image_shape": list(dataset.description.image_shape),
            "splits": {name: len(split) for name, split in dataset.splits.items()},
            "labels": counts,
            "num_skipped": dataset.description.num_skipped,
            "warnings": dataset.warnings,
            "prepared": str(dataset.directory),
            "num_bytes": dataset.description.num_bytes,
            "out": options.out,
        }
    return {"text": "\n".join([*lines, *_table(counts), *_places(dataset, options)])}


def _table(counts: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    """Lines with the numbers of images by label and split."""
    lines: list[str] = []
    for column in dict.fromkeys(name for columns in counts.values() for name in columns):
        values = dict.fromkeys(value for columns in counts.values() for value in columns.get(column, {}))
        shown = {value: one_line(value) for value in values}
        width = max([len(column), *map(len, shown.values())])
        lines.append("  ".join([f"{column:<{width}}", *(f"{split:>9}" for split in counts)]))
        for value in list(values)[:LINES_SHOWN]:
            numbers = [columns.get(column, {}).get(value, 0) for columns in counts.values()]
            lines.append("  ".join([f"{shown[value]:<{width}}", *(f"{number:>9,}" for number in numbers)]))
        if len(values) > LINES_SHOWN:
            lines.append(f"... and {len(values) - LINES_SHOWN} more")
    return lines


def _places(dataset: Dataset, options: argparse.Namespace) -> list[str]:
    """Lines that say where the files are."""
    from vae_ray.data.shards import SKIPPED_FILE

    skipped = [f"skipped    {dataset.directory / SKIPPED_FILE}"] if dataset.description.num_skipped else []
    sheet = [] if options.out is None else [f"sheet      {options.out}"]
    return [*skipped, f"prepared   {dataset.directory} ({_size(dataset.description.num_bytes)})", *sheet]


def _groups(dataset: Dataset) -> list[tuple[str, Tensor]]:
    """For the contact sheet: the first images of each class of each split."""
    from torch import arange

    groups = []
    for name, split in dataset.splits.items():
        if "label" not in split.names:
            groups.append(_group(name, split, arange(len(split)), most=4 * IMAGES_PER_GROUP))
            continue
        for label, text in enumerate(split.names["label"]):
            indices = (split.columns["label"] == label).nonzero().squeeze(1)
            if len(indices):
                groups.append(_group(f"{name} · {text}", split, indices, most=IMAGES_PER_GROUP))
    return groups


def _group(label: str, split: Split, indices: Tensor, *, most: int) -> tuple[str, Tensor]:
    from vae_ray.data.batches import scaled

    return f"{label} ({len(indices):,})", scaled(split.gather(indices[:most]))


def _prepare(options: argparse.Namespace) -> dict[str, Any]:
    if options.out is None:
        raise UserError("--out: is missing; should be a new directory, or a URI such as s3://BUCKET/images")
    experiment = experiment_of(options)
    with signals.deferred():
        from vae_ray.runs.prepare import prepare_data

    description = prepare_data(experiment.data, options.out, quiet=False)
    if options.json:
        return {
            "out": options.out,
            "images": description.source,
            "image_shape": list(description.image_shape),
            "splits": {name: description.num_images(name) for name in description.shards},
            "num_skipped": description.num_skipped,
            "warnings": description.warnings,
            "num_bytes": description.num_bytes,
        }
    return {
        "prepared": f"{options.out} ({_size(description.num_bytes)})",
        "images": description.describe(),
        **{f"warning {number}": line for number, line in enumerate(description.warnings, 1)},
        "train with": f"vae-ray train images --data.root {options.out}",
    }


def _clean(options: argparse.Namespace) -> dict[str, Any]:
    from vae_ray.data.cache import cache_directory, cached_datasets, clean

    if options.root is not None:
        raise UserError(f"argument {options.root!r}: vae-ray data clean takes no ROOT; --data.cache-dir names a cache")
    cache = cache_directory(experiment_of(options).data)
    days = UNUSED_DAYS if options.unused_days is None else options.unused_days
    deleted = clean(cache, unused_seconds=days * DAY_SECONDS)
    kept = cached_datasets(cache)
    if options.json:
        return {
            "cache": str(cache),
            "deleted": [str(each.path) for each in deleted],
            "deleted_bytes": sum(each.num_bytes for each in deleted),
            "kept": [str(each.path) for each in kept],
            "kept_bytes": sum(each.num_bytes for each in kept),
        }
    lines = [f"deleted    {each.path} ({_size(each.num_bytes)})" for each in deleted]
    lines += [f"kept       {each.path} ({_size(each.num_bytes)}, {_age(each.seconds_unused)})" for each in kept]
    return {"text": "\n".join([*lines, f"cache      {cache} ({_size(sum(each.num_bytes for each in kept))})"])}


def _age(seconds: float) -> str:
    days = int(seconds // DAY_SECONDS)
    return "used today" if days < 1 else f"used {days} day{'s' if days > 1 else ''} ago"


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
