"""Priors that were fitted after training are kept beside their run: `priors/NAME/`, tensors and what they are."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from vae_ray.data.batches import Loader
from vae_ray.errors import CorruptFile, UserError, one_line
from vae_ray.evaluation.observations import Arrays, EvaluationBatch, joined, observe, pieces
from vae_ray.evaluation.result import means
from vae_ray.models.latents import DiagonalGaussian
from vae_ray.models.priors import Prior
from vae_ray.models.priors.fitting import Posteriors, empty_prior, log_density
from vae_ray.models.vae import VAE
from vae_ray.storage.directory import open_directory
from vae_ray.storage.locations import join_location
from vae_ray.storage.records import verify, with_checksum

FOLDER, TENSORS, RECORD = "priors", "prior.safetensors", "prior.json"
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
MOST_CODES = 100_000
"""Images whose codes are used, from all over the split."""


class FittedPrior(NamedTuple):
    """A prior that was fitted, and what it was fitted to."""

    name: str
    prior: Prior
    record: dict[str, Any]
    """`kind`, `settings`, `weights`, `epoch`, `seed`, `num_codes`, and `held_out`: see `compare`."""
    location: str
    """Path or URI of its directory."""

    @property
    def label(self) -> str:
        """As evaluations name it."""
        kind = self.record["kind"]
        return f"{kind}, fitted" if self.name == kind else f"{kind} {self.name}, fitted"


def posterior_of_top(batch: EvaluationBatch) -> dict[str, Tensor]:
    """Of the top group: `mean` and `logvar` of q(z|x), a sample `z`, `(n, *shape)`; its `log_prior` in nats."""
    z, posterior, prior = batch.output.groups[0]
    if not isinstance(posterior, DiagonalGaussian):
        raise UserError(f"fit-prior: needs a Gaussian posterior, this model's is {type(posterior).__name__}")
    return {"mean": posterior.mean, "logvar": posterior.logvar, "z": z, "log_prior": prior.log_prob(z)}


def top_posteriors(model: VAE, loader: Loader, *, size: int, precision: str) -> tuple[Arrays, Posteriors]:
    """What is observed of the images, at most `MOST_CODES` of them, and their posteriors."""
    loader.indices = loader.spread(MOST_CODES)
    rows = pieces(len(loader.indices), size)
    arrays = joined([observe(model, loader, piece, [posterior_of_top], precision=precision) for piece in rows])
    name = model.condition_on
    classes = None if name is None else loader.labels(loader.indices)[name]
    return arrays, Posteriors(torch.from_numpy(arrays["mean"]), torch.from_numpy(arrays["logvar"]), classes)


def compare(prior: Prior, arrays: Arrays, posteriors: Posteriors, num_classes: int) -> dict[str, Any]:
    """Mean log density of codes z ~ q(z|x) in nats per image under the fitted prior, the model's own, and by how much
    more; with standard errors over images.

    The difference is that of the ELBO, and of -marginal_kl, of the same images.
    """
    condition = posteriors.condition(torch.arange(len(arrays["z"])), num_classes)
    fitted = log_density(prior, torch.from_numpy(arrays["z"]), condition)
    own = arrays["log_prior"].astype(np.float64)
    values, errors = means({"fitted": fitted, "own": own, "gain": fitted - own})
    return {"nats": values, "standard_errors": errors, "num_images": len(own)}


def check_name(name: str) -> None:
    """Raise `UserError` for what cannot be a directory's name."""
    if not re.fullmatch(NAME, name):
        raise UserError(f"prior: got {name!r}, should be a name of letters, digits, '.', '_' and '-'")


def save(fitted: FittedPrior) -> None:
    """Write the prior's files; raises `OSError`."""
    directory = open_directory(fitted.location, key="checkpoint")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in fitted.prior.state_dict().items()}
    content = safetensors.torch.save(tensors)
    directory.write(TENSORS, content)
    record = {**fitted.record, "sha256": hashlib.sha256(content).hexdigest()}
    directory.write(RECORD, (json.dumps(with_checksum(record), indent=2) + "\n").encode())


def load(owner: str, name: str, model: VAE, *, weights: str) -> FittedPrior:
    """The prior `name` of the run or sweep `owner`, on the CPU.

    Raises `UserError` if there is none, or if it was fitted to codes of other weights; `CorruptFile` if it is damaged.
    """
    check_name(name)
    location = join_location(owner, FOLDER, name)
    directory = open_directory(location, key="prior")
    try:
        record, content = directory.read(RECORD), directory.read(TENSORS)
    except OSError as error:
        raise UserError(f"prior: {location} cannot be read ({one_line(error)[:200]})") from None
    again = f"fit it again: vae-ray fit-prior {owner} --kind mixture --name {name}"
    if record is None or content is None:
        raise UserError(f"prior: got {name!r}, but {owner} has none of that name; {again.replace(' again', '', 1)}")
    try:
        found = verify(json.loads(record))
        if hashlib.sha256(content).hexdigest() != found["sha256"]:
            raise ValueError(f"{TENSORS} is not what was written")
        prior = empty_prior(found["kind"], found["settings"], model.latent_shapes[0], model.num_classes)
        if found["weights"] == weights:
            prior.load_state_dict(safetensors.torch.load(content))
    except (ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        raise CorruptFile(f"{location}: damaged ({one_line(error)[:200]}); {again}") from None
    if found["weights"] != weights:
        raise UserError(f"prior: {name!r} was fitted to other weights, of epoch {found['epoch']}; {again}")
    return FittedPrior(name, prior.eval().requires_grad_(False), found, location)
