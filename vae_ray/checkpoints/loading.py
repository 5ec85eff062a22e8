"""The checkpoint format, and reading it.

    checkpoints/epoch=0007/                 after epoch 7, with its metrics
    checkpoints/epoch=0008-step=000412/     412 steps into epoch 8; only training continues from it
        weights.safetensors         the model's state_dict
        averaged.safetensors        the averaged weights, if the run averages them
        training_state.safetensors  tensors of the optimizer and of the training progress
        experiment.json             the resolved experiment
        manifest.json               epoch, metrics, scalars, image shape, fingerprints of the images that it was trained
                                    and tested with; sizes and SHA-256 of all files

No file can run code. A directory without a valid manifest is not a checkpoint. Formats 1 and 2 (vae_ray 0.1) have the
same weights and experiment, and a pickled `training_state.pt` that is never loaded.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from vae_ray.config.experiment import Experiment
from vae_ray.errors import CorruptFile, UserError
from vae_ray.storage.reading import MAX_BYTES, parse_json, read_bytes, short_repr

FORMAT = "vae_ray checkpoint"
FORMAT_VERSION = 3
MANIFEST, EXPERIMENT, WEIGHTS, AVERAGED, TRAINING_STATE = (
    "manifest.json",
    "experiment.json",
    "weights.safetensors",
    "averaged.safetensors",
    "training_state.safetensors",
)
PICKLED_STATE = "training_state.pt"
"""Formats 1 and 2."""
REQUIRED = {1: {EXPERIMENT, WEIGHTS, PICKLED_STATE}, 2: {EXPERIMENT, WEIGHTS, PICKLED_STATE}}
REQUIRED[FORMAT_VERSION] = {EXPERIMENT, WEIGHTS, TRAINING_STATE}

ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)
"""errno values of a file that is missing or not a regular file; all others are transient."""
MOST_PIXELS = 1 << 26
MOST_HEADER_BYTES = 1 << 24
"""Limit of the header of a safetensors file: about 100,000 tensors."""

Scalar = float | int | str | None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest was read; its other files are checked when they are read."""

    path: Path
    epoch: int
    step: int | None
    """Number of steps done in `epoch`; None after the whole epoch. With a step, `metrics` holds no evaluation."""
    image_shape: tuple[int, int, int]
    metrics: dict[str, float]
    selection_metric: str
    files: dict[str, dict[str, Any]]
    scalars: dict[str, Scalar]
    """Training progress as plain values; empty in formats 1 and 2."""
    fingerprints: dict[str, str]
    """`Splits.fingerprints`; empty where they were not recorded."""
    format_version: int
    contents: dict[str, bytes] = field(default_factory=dict, repr=False, compare=False)
    """Files that are in memory; always the manifest."""

    @property
    def epochs_done(self) -> int:
        """Number of whole epochs."""
        return self.epoch if self.step is None else self.epoch - 1

    @property
    def position(self) -> tuple[int, int]:
        """`(epochs done, steps done of the next epoch)`: the order of checkpoints."""
        return self.epochs_done, self.step or 0

    @property
    def score(self) -> float:
        """The value of the selection metric; lower is better."""
        return self.metrics[self.selection_metric]

    @property
    def has_averaged_weights(self) -> bool:
        return AVERAGED in self.files

    def other_images(self, image_shape: tuple[int, int, int], fingerprints: Mapping[str, str]) -> str:
        """How images, or labels, differ from those of this checkpoint's run; empty if they do not, or it is unknown."""
        if image_shape != self.image_shape:
            return f"images of shape {image_shape}, where the run's had {self.image_shape}"
        others = [split for split, found in fingerprints.items() if self.fingerprints.get(split, found) != found]
        images, labels = ([key for key in others if (" " in key) == is_label] for is_label in (False, True))
        parts = [f"other {' and '.join(images)} images"] * bool(images)
        parts += [f"other labels ({', '.join(labels)})"] * bool(labels)
        return f"{' and '.join(parts)} than the run had" if others else ""

    def check_images(self, source: str, image_shape: tuple[int, int, int], fingerprints: Mapping[str, str]) -> None:
        """Raise `UserError` if `source` has other images than this checkpoint was trained with."""
        if other := self.other_images(image_shape, fingerprints):
            fits = image_shape == self.image_shape
            alternative = f", or start another run with --run.initial-weights {self.path}" if fits else ""
            raise UserError(f"data.source: {source} has {other}; use the run's images (--data.root){alternative}")

    def read(self, name: str, *, most_bytes: int | None = None) -> bytes:
        """The bytes of one file; raises `CorruptFile` if they are not those written, or more than `most_bytes`.

        The size is compared with the manifest's before anything is read. Raises `UserError` for a file that cannot be
        read at the moment.
        """
        if name in self.contents:
            return self.contents[name]
        expected, file = self.files[name], self.path / name
        limit = expected["bytes"] if most_bytes is None else min(most_bytes, expected["bytes"])
        try:
            status = os.lstat(file)
            if stat.S_ISREG(status.st_mode) and status.st_size != expected["bytes"]:
                raise CorruptFile(
                    f"{file}: truncated or changed, expected {expected['bytes']} bytes, found {status.st_size}; "
                    "use another checkpoint of the run"
                )
            content = read_bytes(file, max_bytes=limit, follow_links=False)
        except OSError as error:
            if error.errno in ABSENT:
                raise CorruptFile(f"{file}: cannot be read ({error.strerror}); the checkpoint is incomplete") from None
            raise UserError(f"{file}: cannot be read now ({error.strerror}); try again") from None
        except MemoryError:
            raise UserError(f"{file}: {limit:,} bytes do not fit into memory") from None
        digest = hashlib.sha256(content).hexdigest()
        if digest != expected["sha256"]:
            raise CorruptFile(
                f"{file}: damaged or tampered with, expected sha256 {expected['sha256'][:16]}…, "
                f"found {digest[:16]}…; use another checkpoint of the run"
            )
        return content

    def in_memory(self, names: Collection[str] | None = None) -> Checkpoint:
        """This checkpoint with its files in memory, each read once and checked; workers without the directory can
        use it.

        `names` limits it to some of the files; the pickled state of formats 1 and 2 is never read. Raises
        `CorruptFile` that names the damaged file.
        """
        selection = self.files.keys() - {PICKLED_STATE} if names is None else self.files.keys() & set(names)
        contents = {name: self.read(name, most_bytes=_most_bytes(name)) for name in sorted(selection)}
        return replace(self, contents={**self.contents, **contents})

    def experiment(self) -> Experiment:
        """The experiment that wrote this checkpoint, migrated if it is old."""
        file, content = self.path / EXPERIMENT, self.read(EXPERIMENT, most_bytes=MAX_BYTES)
        try:
            return Experiment.from_dict(parse_json(content), origin=str(file))
        except ValueError as error:  # also UnicodeDecodeError
            raise CorruptFile(f"{file}: is not JSON ({error})") from None
        except UserError as error:
            message = str(error) if str(error).startswith(str(file)) else f"{file}: {error}"
            raise CorruptFile(message) from None

    def weights(self, expected: Mapping[str, Tensor], *, averaged: bool = False) -> dict[str, Tensor]:
        """The model's tensors on the CPU; raises `CorruptFile` that names the first difference from `expected`.

        Args:
            expected: the model's state_dict, which may be on the meta device. Names, shapes and dtypes must be equal.
            averaged: read the averaged weights instead; raises `UserError` if there are none.
        """
        if averaged and not self.has_averaged_weights:
            raise UserError(f"{self.path}: has no averaged weights; its run trained without them")
        name = AVERAGED if averaged else WEIGHTS
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
        tensors = self._tensors(name, most_bytes=num_bytes + MOST_HEADER_BYTES)
        if self.format_version < 3:  # vae_ray 0.1 had the encoder and the decoder directly in the model
            tensors = {f"network.{key}": tensor for key, tensor in tensors.items()}
        for key in sorted(expected.keys() | tensors.keys()):
            required, stored = _describe(expected.get(key)), _describe(tensors.get(key))
            if required != stored:
                raise CorruptFile(
                    f"{self.path / name}: does not fit the model: {short_repr(key)} should be {required}, is {stored}"
                )
        return tensors

    def check_can_be_continued(self) -> None:
        """Raise `UserError` for a format whose training state is not read."""
        if self.format_version < 3:
            raise UserError(
                f"{self.path}: written by vae_ray 0.1: it can be evaluated and used as --run.initial-weights, "
                "not continued"
            )

    def training_state(self) -> dict[str, Tensor]:
        """The tensors of the optimizer and of the progress, by name, on the CPU; the caller checks that they fit."""
        self.check_can_be_continued()
        return self._tensors(TRAINING_STATE)

    def _tensors(self, name: str, *, most_bytes: int | None = None) -> dict[str, Tensor]:
        """The tensors of a safetensors file, which allocate no more than the file has."""
        content = self.read(name, most_bytes=most_bytes)
        try:
            if int.from_bytes(content[:8], "little") > MOST_HEADER_BYTES:
                raise ValueError(f"its header has more than {MOST_HEADER_BYTES} bytes")
            return safetensors.torch.load(content)
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
            raise CorruptFile(f"{self.path / name}: is not a safetensors file ({short_repr(str(error))})") from None


def _most_bytes(name: str) -> int | None:
    return MAX_BYTES if name == EXPERIMENT else None


def _describe(tensor: Tensor | None) -> str:
    return (
        "absent" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {short_repr(tuple(tensor.shape))}"
    )


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint in directory `path`; raises `CorruptFile` if its manifest is missing or damaged.

    Raises `UserError` for a checkpoint of a newer format and for a manifest that cannot be read at the moment.
    """
    path = Path(path)
    if not os.path.isdir(path):  # unlike Path.is_dir, False for a name that no file system allows
        raise UserError(f"checkpoint {path}: no such directory; give a run directory or RUN/checkpoints/epoch=NNNN")
    file = path / MANIFEST
    try:
        return parse_manifest(path, read_bytes(file, follow_links=False))
    except FileNotFoundError:
        raise CorruptFile(f"checkpoint {path}: has no {MANIFEST}, so it is incomplete or not a checkpoint") from None
    except OSError as error:
        if error.errno in ABSENT:
            raise CorruptFile(f"{file}: cannot be read ({error.strerror})") from None
        raise UserError(f"{file}: cannot be read now ({error.strerror}); try again") from None


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the SHA-256 of its own content: it decides which checkpoint is the newest and the best."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    return {**content, "sha256": hashlib.sha256(canonical).hexdigest()}


def parse_manifest(path: Path, content: bytes) -> Checkpoint:
    """The checkpoint in directory `path` whose manifest is `content`; raises `CorruptFile` and `UserError`."""
    try:
        manifest = parse_json(content)
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {short_repr(manifest['format'])}")
        version = _whole(manifest["format_version"], least=1, most=10**6)
        if version > FORMAT_VERSION:
            raise UserError(
                f"{path}: checkpoint format {version} is newer than this vae_ray reads ({FORMAT_VERSION}); "
                f"install the one that wrote it, {short_repr(manifest.get('written_by', 'unknown'))}, or a newer one"
            )
        if sealed(manifest) != manifest:
            raise ValueError("its content is not what was written")
        return _checked(path, manifest, content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFile(f"{path / MANIFEST}: damaged ({type(error).__name__}: {short_repr(str(error))})") from None


def _checked(path: Path, manifest: dict[str, Any], content: bytes) -> Checkpoint:
    """The checkpoint of a manifest after a check of every value's type and range."""
    channels, height, width = (_whole(n, least=1, most=MOST_PIXELS) for n in manifest["image_shape"])
    if channels * height * width > MOST_PIXELS:
        raise ValueError(f"image_shape {manifest['image_shape']}")
    version, files = manifest["format_version"], manifest["files"]
    for name in sorted(REQUIRED[version] - files.keys()):
        raise ValueError(f"{name} not listed")
    if others := files.keys() - REQUIRED[version] - ({AVERAGED} if version >= 3 else set()):
        raise ValueError(f"lists other files: {sorted(others)}")
    for name, entry in files.items():
        _whole(entry["bytes"])
        if not isinstance(entry["sha256"], str):
            raise ValueError(f"{name} has no checksum")
    scalars = manifest["scalars"] if version >= 3 else {}
    for key, value in scalars.items():
        if type(value) not in (int, float, str, type(None)):
            raise ValueError(f"scalar {key} is {short_repr(value)}")
    metrics = {str(key): _number(value) for key, value in manifest["metrics"].items()}
    step = manifest.get("step")
    if step is None and manifest["selection_metric"] not in metrics:
        raise ValueError(f"{manifest['selection_metric']} not listed")
    return Checkpoint(
        path=path,
        epoch=_whole(manifest["epoch"], least=1),
        step=None if step is None else _whole(step, least=1),
        image_shape=(channels, height, width),
        metrics=metrics,
        selection_metric=manifest["selection_metric"],
        files=files,
        scalars=scalars,
        fingerprints={str(split): str(value) for split, value in manifest.get("fingerprints", {}).items()},
        format_version=version,
        contents={MANIFEST: content},
    )


def _whole(value: Any, *, least: int = 0, most: int = 2**60) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{short_repr(value)} is not an integer from {least} to {most}")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{short_repr(value)} is not a number")
    return float(value)
