"""Sources of images, one file a kind, and how an experiment's section `data` chooses one."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from vae_ray.config.sections.data import DataConfig, ImagesData, PublishedData, SpritesData, UserData
from vae_ray.data.decoding import ImageRules
from vae_ray.data.preparation import Plan
from vae_ray.data.rows import Source
from vae_ray.data.sources.containers import is_archive
from vae_ray.data.sources.folder import Folder
from vae_ray.errors import UserError
from vae_ray.storage.locations import is_uri, local_path
from vae_ray.storage.reading import short_repr
from vae_ray.storage.retry import describe_os_error

ARRAY_SUFFIXES = (".npz", ".npy", ".h5", ".hdf5", ".hdf")
COLOURS = {"white": (255, 255, 255), "black": (0, 0, 0)}


def build_source(config: DataConfig | UserData, cache: Path) -> Source:
    """The source of an experiment's section `data`; raises `UserError` if its raw data cannot be found or read."""
    if isinstance(config, UserData):
        from vae_ray.data.sources.user import UserSource

        return UserSource(config)
    kind = kind_at(config) if isinstance(config, ImagesData) else config.source  # type: ignore[attr-defined]
    if isinstance(config, ImagesData) and kind == "folder" and (config.images or config.labels):
        raise UserError(
            f"data.{'images' if config.images else 'labels'}: names an array or a column, but {config.root} is a "
            "folder of image files; leave it out"
        )
    return _source_of_kind(kind, config, raw_directory(config, cache))


def _source_of_kind(kind: str, config: Any, root: Path) -> Source:
    """The source; each is imported where it is needed: a process that decodes starts sooner."""
    match kind:
        case "digits":
            from vae_ray.data.sources.digits import Digits

            return Digits()
        case "mnist" | "fashion_mnist" | "kmnist":
            from vae_ray.data.sources.mnist import Mnist

            return Mnist(config, root=root)
        case "cifar10":
            from vae_ray.data.sources.published import Cifar10

            return Cifar10(root, config.download)
        case "svhn":
            from vae_ray.data.sources.published import Svhn

            return Svhn(root, config.download)
        case "sprites":
            from vae_ray.data.sources.sprites import Sprites

            return Sprites(None if config.root is None else root, side=config.image_size, stride=config.stride)
        case "folder":
            return Folder(_location(config))
        case "arrays":
            from vae_ray.data.sources.arrays import ArraySource

            return ArraySource(Path(_location(config)), images=config.images, labels=config.labels)
        case "parquet":
            from vae_ray.data.sources.parquet import ParquetSource

            return ParquetSource(_location(config), images=config.images, labels=config.labels)
    raise AssertionError(kind)


def kind_at(config: ImagesData) -> str:
    """The kind of source at `data.root`, where `data.source` is "auto"; raises `UserError` if there is none."""
    location = _location(config)
    if not is_uri(location) and not os.path.exists(location):
        raise UserError(
            f"data.root: got {short_repr(config.root)}, which does not exist; should be a folder or a file of images"
        )
    if config.source != "auto":
        return config.source
    try:
        return _kind_of(location)
    except OSError as error:
        raise UserError(
            f"data.root: {location} cannot be read ({describe_os_error(error)}); make it readable"
        ) from None


def _kind_of(location: str) -> str:
    names = [location]
    if os.path.isdir(location):
        names = sorted(name for name in os.listdir(location) if not name.startswith("."))
    if any(name.endswith(".parquet") for name in names) or _has_parquet_below(location, names):
        return "parquet"
    if all(name.lower().endswith(".npy") for name in names) and names:
        return "arrays"
    if len(names) == 1 and names[0].lower().endswith(ARRAY_SUFFIXES):
        return "arrays"
    if is_uri(location) or os.path.isdir(location) or is_archive(location):
        return "folder"
    raise UserError(
        f"data.root: {location} is a file of no known kind; should be a folder of images, a .zip or .tar of it, .npz, "
        ".npy, .h5 or .parquet"
    )


def plan_of(config: DataConfig | UserData, source: Source) -> Plan:
    """How the images of a source are prepared."""
    if not isinstance(config, ImagesData):
        fraction = config.test_fraction if isinstance(config, SpritesData | UserData) else 0.1
        return Plan(source, ImageRules(), test_fraction=fraction, max_skipped_fraction=0.0, settings={})
    names = ("image_size", "fit", "channels", "background", "value_range", "test_fraction")
    settings = {name: value for name, value in config.model_dump(mode="json").items() if name in names}
    return Plan(
        source,
        rules_of(config),
        test_fraction=config.test_fraction,
        max_skipped_fraction=config.max_skipped_fraction,
        settings=settings,
        warnings=source.warnings if isinstance(source, Folder) else (),
    )


def rules_of(config: ImagesData) -> ImageRules:
    """How image files and arrays become pixels."""
    size = (config.image_size, config.image_size) if isinstance(config.image_size, int) else config.image_size
    name = config.background
    colour = COLOURS.get(name) or (int(name[1:3], 16), int(name[3:5], 16), int(name[5:7], 16))
    value_range = None if config.value_range == "auto" else config.value_range
    return ImageRules(size, config.fit, config.channels, colour, value_range)


def rules_for(config: DataConfig | UserData, image_shape: tuple[int, int, int]) -> ImageRules:
    """How other files become images like those of a run, which have the `image_shape`."""
    if not isinstance(config, ImagesData):
        return ImageRules()
    rules = rules_of(config)
    channels, height, width = image_shape
    return replace(rules, size=rules.size and (height, width), channels=1 if channels == 1 else "auto")


def raw_directory(config: DataConfig, cache: Path) -> Path:
    """Where this node has raw files: `data.root`, its copy where that is a URI, or `datasets/` in the cache."""
    if not isinstance(config, PublishedData | SpritesData) or config.root is None:
        return cache / "datasets"
    root = config.root
    if is_uri(root):
        if config.source in ("cifar10", "svhn", "sprites"):
            raise UserError(f"data.root: got {root!r}, but {config.source} is read from a directory of this machine")
        return cache / "datasets" / hashlib.sha256(root.encode()).hexdigest()[:16]
    return local_path(root, key="data.root")


def _location(config: ImagesData) -> str:
    if config.root is None:
        raise UserError(
            f"data.root: is missing, data.source {config.source} needs it; for example --data.root photos/ for a "
            "folder of images"
        )
    return config.root if is_uri(config.root) else str(local_path(config.root, key="data.root"))


def _has_parquet_below(location: str, names: list[str]) -> bool:
    """Whether the first directories hold Parquet files, as in a repository of Hugging Face (data/*.parquet)."""
    if is_uri(location):
        from vae_ray.storage.remote import RemoteDirectory

        return any(name.endswith(".parquet") for name in RemoteDirectory(location, key="data.root").list())
    folders = [os.path.join(location, name) for name in names[:20]] if os.path.isdir(location) else []
    return any(name.endswith(".parquet") for f in folders if os.path.isdir(f) for name in os.listdir(f))
