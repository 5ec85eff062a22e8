"""A trained VAE, loaded from its directory: everything one does with it afterwards. No Ray anywhere."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vae_ray.checkpoints.loading import MANIFEST, Checkpoint, complete_checkpoints, read_checkpoint
from vae_ray.checkpoints.quarantine import best_intact_checkpoint
from vae_ray.config.experiment import Experiment
from vae_ray.data.arrow_store import open_split
from vae_ray.data.splits import Splits
from vae_ray.errors import UserError
from vae_ray.evaluation.elbo import evaluate_split
from vae_ray.models.latents import DiagonalGaussian
from vae_ray.models.likelihoods import LIKELIHOODS
from vae_ray.models.traversal import Traversal
from vae_ray.models.traversal import traverse as traverse_dimensions
from vae_ray.models.vae import VAE
from vae_ray.parallel.group import SingleProcess
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.seeds import generator
from vae_ray.storage.locations import cache_root, is_uri, with_timeout
from vae_ray.storage.mirror import Mirror

BEST = "best"
"""In a sweep's directory, its winner's checkpoint."""

SplitName = Literal["train", "val", "test"]
Method = Literal["linear", "spherical"]


class TrainedVAE:
    """A model with its experiment; images are `(N, C, H, W)`, floats in [0, 1] or uint8.

    Load one with `TrainedVAE.load(path)`. Methods draw no hidden randomness: where one samples, it takes a seed.
    """

    def __init__(self, model: VAE, experiment: Experiment, checkpoint: Checkpoint) -> None:
        self.model = model.eval().requires_grad_(False)
        self.experiment = experiment
        self.checkpoint = checkpoint
        self._likelihood = LIKELIHOODS[experiment.model.likelihood](experiment.model)

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "cpu") -> TrainedVAE:
        """The model of a checkpoint directory, or the best one of a run's or a sweep's directory.

        Raises `UserError` if it is missing, incomplete, truncated or not what was written. Of a run, the best
        checkpoint that is whole is taken, with a warning that names the damaged ones.
        """
        checkpoint = find_checkpoint(path)
        return cls(checkpoint.build_model().to(device), checkpoint.experiment(), checkpoint)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.model.image_shape

    @property
    def latent_dim(self) -> int:
        return self.model.latent_dim

    @torch.inference_mode()
    def generate(self, num: int, *, seed: int = 0) -> Tensor:
        """Means of p(x|z) for `num` z ~ N(0, I): images `(num, C, H, W)` in [0, 1]."""
        if num < 1:
            raise UserError(f"num: got {num}, should be at least 1")
        return self.decode(torch.randn(num, self.latent_dim, generator=generator(seed, "generate")))

    @torch.inference_mode()
    def posterior(self, images: Tensor) -> DiagonalGaussian:
        """q(z|x) with mu and logvar `(N, latent_dim)`."""
        return self.model.encode(self._pixels(images))

    def encode(self, images: Tensor) -> Tensor:
        """The posterior mean, `(N, latent_dim)`: a deterministic code of each image."""
        return self.posterior(images).mu

    @torch.inference_mode()
    def decode(self, z: Tensor) -> Tensor:
        """Means of p(x|z), images `(N, C, H, W)` in [0, 1], for z `(N, latent_dim)`."""
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise UserError(f"z: got shape {tuple(z.shape)}, should be (N, {self.latent_dim})")
        return self._likelihood.mean(self.model.decode(z.to(self.device)))

    def reconstruct(self, images: Tensor) -> Tensor:
        """Each image through its posterior mean and back: `(N, C, H, W)` in [0, 1]."""
        return self.decode(self.encode(images))

    def interpolate(self, start: Tensor, end: Tensor, *, steps: int = 10, method: Method = "linear") -> Tensor:
        """Images `(N, steps, C, H, W)` along paths between the codes of `start` and `end`, each `(N, C, H, W)`.

        "linear" is a straight line; "spherical" also turns at constant speed (Shoemake 1985), so that
        points stay about as far from the origin as the prior's (White 2016, arXiv:1609.04468).
        """
        if steps < 2:
            raise UserError(f"steps: got {steps}, should be at least 2, the two ends")
        if method not in INTERPOLATIONS:
            raise UserError(f"method: got {method!r}, should be one of {', '.join(INTERPOLATIONS)}")
        if len(start) != len(end):
            raise UserError(f"images: got {len(start)} starts and {len(end)} ends, should be as many of each")
        path = INTERPOLATIONS[method](self.encode(start), self.encode(end), torch.linspace(0, 1, steps))
        return self.decode(path.flatten(0, 1)).unflatten(0, (-1, steps))

    def traverse(self, images: Tensor, *, num_dimensions: int = 10, steps: int = 11, extent: float = 3.0) -> Traversal:
        """What each latent dimension does: images `(dimensions, steps, C, H, W)` along it, the others at 0.

        Dimensions in order of their rate over `images`; `extent` in standard deviations of the prior.
        """
        for name, value, least in (("num_dimensions", num_dimensions, 1), ("steps", steps, 2)):
            if value < least:
                raise UserError(f"{name}: got {value}, should be at least {least}")
        x = self._pixels(images)
        return traverse_dimensions(
            self.model, self._likelihood, x, num_dimensions=num_dimensions, steps=steps, extent=extent
        )

    def evaluate(self, split: SplitName = "test") -> dict[str, float]:
        """`{"test/nelbo": ..., "test/distortion": ..., "test/rate": ..., "test/loss": ...}` in nats.

        Over every image of the split once, with one sampled z each, as in training.
        """
        if split == "val" and not self.experiment.data.num_validation:
            raise UserError("split val: this run had no validation split (data.num_validation 0); try test or train")
        splits = Splits.open(self.experiment)
        return evaluate_split(self.model, self.experiment, splits, split, SingleProcess(self.device))

    def labels(self, split: SplitName = "test") -> dict[str, Any]:
        """What must be equal for two systems' numbers to be comparable."""
        return {
            "data": self.experiment.data.source,
            "split": split,
            "binarization": "none (grey levels)",
            "likelihood": self.experiment.model.likelihood,
            "beta": self.experiment.objective.beta,
            "importance_samples": 1,
            "z": "sampled",
            "epoch": self.checkpoint.epoch,
        }

    def test_images(self, num: int) -> Tensor:
        """The first `num` test images of the run's data, `(num, C, H, W)` in [0, 1]."""
        return open_split(self.experiment.data, "test").pixels[:num].float() / 255

    def _pixels(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or tuple(images.shape[1:]) != self.image_shape:
            raise UserError(f"images: got shape {tuple(images.shape)}, should be (N, {self.image_shape})")
        scaled = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        return scaled.to(self.device)


def find_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`, or the best one of the run or sweep whose directory `path` is; it may be a URI."""
    if is_uri(path):
        return _fetched_checkpoint(str(path))
    return _local_checkpoint(Path(path), fetch=lambda checkpoint: None)


def _local_checkpoint(path: Path, *, fetch: Callable[[Path], None]) -> Checkpoint:
    run = RunDirectory(path)
    if not os.path.isdir(run.checkpoints):
        return read_checkpoint(path / BEST if os.path.isdir(path / BEST) else path)
    best = best_intact_checkpoint(complete_checkpoints(run.checkpoints), fetch=fetch)
    if best is None:
        raise UserError(f"run {path}: has no complete checkpoint yet; train it with --resume")
    return best


def _fetched_checkpoint(uri: str) -> Checkpoint:
    """The same of a URI: manifests first, then the files of the one that is wanted, kept in the cache for next time."""
    copy = cache_root() / "copies" / hashlib.sha256(uri.encode()).hexdigest()[:16] / "reader"
    mirror = Mirror(copy, uri, key="checkpoint")
    manifests = re.compile(rf"(({BEST}|checkpoints/[^/]+)/)?{MANIFEST}")
    try:
        with_timeout(mirror.listing)
        mirror.pull(lambda name: manifests.fullmatch(name) is not None)
        if not copy.exists():
            raise UserError(
                f"checkpoint {uri}: there is none; give the URI of a run, a sweep or RUN/checkpoints/epoch=NNNN"
            )

        def pull(checkpoint: Path) -> None:
            folder = checkpoint.relative_to(copy).as_posix()
            mirror.pull(lambda name: folder == "." or name.startswith(f"{folder}/"))

        chosen = _local_checkpoint(copy, fetch=pull).path
        pull(chosen)
    except OSError as error:
        raise UserError(f"checkpoint {uri}: cannot be read ({' '.join(str(error).split())[:200]})") from None
    return read_checkpoint(chosen)


def _linear(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """`(N, steps, latent_dim)` on the straight line from a to b, both `(N, latent_dim)`."""
    return torch.lerp(a[:, None], b[:, None], t[None, :, None].to(a))


def _spherical(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """`(N, steps, latent_dim)` on the great arc from a to b; a straight line where they are parallel."""
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1).clamp(-1, 1)
    omega = torch.acos(cosine)[:, None, None]
    t = t[None, :, None].to(a)
    # slerp(a, b, t) = sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b
    sine = torch.sin(omega)
    arc = (torch.sin((1 - t) * omega) * a[:, None] + torch.sin(t * omega) * b[:, None]) / sine
    return torch.where(sine.abs() < 1e-4, torch.lerp(a[:, None], b[:, None], t), arc)


INTERPOLATIONS = {"linear": _linear, "spherical": _spherical}
