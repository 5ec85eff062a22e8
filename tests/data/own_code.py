"""A user's own code, of every kind; tests copy this file to where a user would have it."""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vae_ray.models.latents import DiagonalGaussian
from vae_ray.models.likelihoods import Bernoulli, Likelihood
from vae_ray.models.priors import Prior
from vae_ray.objectives.elbo import Elbo


def tiny(*, image_shape, latent_dim, num_params, width=16, normalization=nn.Identity, extra=0):
    num_pixels, params_shape = math.prod(image_shape), (num_params + extra, *image_shape[1:])
    encoder = nn.Sequential(
        nn.Flatten(), nn.Linear(num_pixels, width), normalization(width), nn.ReLU(), nn.Linear(width, 2 * latent_dim)
    )
    decoder = nn.Sequential(nn.Linear(latent_dim, math.prod(params_shape)), nn.Unflatten(1, params_shape))
    return encoder, decoder


def with_batch_norm(**given):
    return tiny(**given, normalization=nn.BatchNorm1d)


def with_a_parameter_too_many(**given):
    return tiny(**given, extra=1)


def with_a_wrong_encoder(**given):
    encoder, decoder = tiny(**given)
    return nn.Sequential(encoder, nn.Linear(3, 4)), decoder


def with_a_narrow_encoder(*, image_shape, latent_dim, num_params):
    _, decoder = tiny(image_shape=image_shape, latent_dim=latent_dim, num_params=num_params)
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(image_shape), latent_dim)), decoder


def that_fails(**given):
    return 1 / 0


def that_exits(**given):
    sys.exit(0)


class Failing4th(nn.Flatten):
    """Fails in its fourth pass."""

    num_passes = 0

    def forward(self, x):
        self.num_passes += 1
        if self.num_passes == 4:
            self.fail()
        return super().forward(x)

    def fail(self):
        raise ValueError("boom")


class Exiting4th(Failing4th):
    def fail(self):
        sys.exit(0)


class FailingEvaluation(nn.Flatten):
    def forward(self, x):
        return super().forward(x) if self.training else 1 / 0


def that_fails_later(first=Failing4th, **given):
    encoder, decoder = tiny(**given)
    encoder[0] = first()
    return encoder, decoder


def that_exits_later(**given):
    return that_fails_later(Exiting4th, **given)


def that_fails_in_evaluation(**given):
    return that_fails_later(FailingEvaluation, **given)


def that_exits_in_a_pass(**given):
    encoder, decoder = that_exits_later(**given)
    encoder[0].num_passes = 3
    return encoder, decoder


def frozen(**given):
    return tuple(part.requires_grad_(False) for part in tiny(**given))


class WithoutWeights(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return x.new_zeros(len(x), *self.shape)


def without_weights(*, image_shape, latent_dim, num_params):
    return WithoutWeights(2 * latent_dim), WithoutWeights(num_params, *image_shape[1:])


def no_network(**given):
    return "tiny"


def that_reads_its_weights(**given):
    encoder, decoder = tiny(**given)
    scale = 1 / encoder[1].weight.abs().max().item()
    with torch.no_grad():
        encoder[1].weight.mul_(scale)
    return encoder, decoder


class Moving(Prior):
    def __init__(self, latent_shape, start=0.0):
        super().__init__(latent_shape)
        self.center = nn.Parameter(torch.full(latent_shape, start))

    def forward(self, num, like):
        mean = self.center.expand(num, *self.latent_shape)
        return DiagonalGaussian(mean, torch.zeros_like(mean))


class OneDimensional(Prior):
    def forward(self, num, like):
        return DiagonalGaussian(torch.zeros(num, 1), torch.zeros(num, 1))


class Absent(Prior):
    def forward(self, num, like):
        return None


class WithoutMean(Likelihood):
    def log_prob(self, params, x):
        return -(params - x).square().flatten(1).sum(1)


class Weighted(Bernoulli):
    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor

    def log_prob(self, params, x):
        return self.factor * super().log_prob(params, x)


class Reporting(Elbo):
    terms = ("half_rate",)

    def losses(self, output, x, likelihood, settings, batch):
        losses = super().losses(output, x, likelihood, settings, batch)
        return losses._replace(terms={**losses.terms, "half_rate": losses.terms["rate"] / 2})


class ByRow(Elbo):
    def losses(self, output, x, likelihood, settings, batch):
        losses = super().losses(output, x, likelihood, settings, batch)
        return losses._replace(loss={"model": losses.terms["loss"]})


class Detached(Elbo):
    def losses(self, output, x, likelihood, settings, batch):
        losses = super().losses(output, x, likelihood, settings, batch)
        return losses._replace(loss={"model": losses.loss["model"].detach()})


class WithoutLosses(Elbo):
    def losses(self, output, x, likelihood, settings, batch):
        return 3


class WithoutTerms(Elbo):
    terms = ("forgotten",)


def stripes(num=400):
    pixels = np.zeros((num, 1, 6, 8), np.uint8)
    pixels[:, :, ::2] = np.arange(num, dtype=np.uint8)[:, None, None, None]
    return {"train": pixels, "test": pixels[:50]}


def on_fire():
    raise OSError("disk on fire")


def two_sizes():
    return {"train": np.zeros((90, 1, 6, 8), np.uint8), "test": np.zeros((9, 1, 6, 9), np.uint8)}


def channels_last():
    return {split: np.full((150, 8, 6, 1), 9, np.uint8) for split in ("train", "test")}


def exiting_source():
    sys.exit(0)


def floats():
    return {"train": np.zeros((9, 1, 6, 8)), "test": np.zeros((9, 1, 6, 8))}


def ragged():
    return {"train": [np.zeros((1, 6, 8), np.uint8), np.zeros((1, 6, 9), np.uint8)], "test": []}


def too_few_labels():
    return {split: (np.zeros((90, 1, 6, 8), np.uint8), [1, 2]) for split in ("train", "test")}


def in_blocks(num=4, rows=30):
    for number in range(num):
        pixels = np.full((rows, 1, 6, 8), 9 * number, np.uint8)
        pixels[:, 0, 0, 0] = np.arange(rows)
        yield pixels, np.arange(rows) % 3


def without_test():
    return {"train": np.zeros((90, 1, 6, 8), np.uint8)}


class Diary:
    def run_began(self, run_dir, experiment):
        self.file = Path(run_dir, "diary.txt")
        self.file.write_text(f"began {experiment.training.epochs}\n")

    def epoch_ended(self, record, decode):
        self.write(f"epoch {record['epoch']} {tuple(decode(torch.zeros(2, 5)).shape)}")

    def run_ended(self, run_dir):
        self.write("ended")

    def write(self, line):
        with self.file.open("a") as stream:
            print(line, file=stream)


class Failing:
    def epoch_ended(self, record, decode):
        raise ValueError("the disk of the diary is full")


class Exiting:
    def epoch_ended(self, record, decode):
        sys.exit(0)


class WithoutGradients:
    def epoch_ended(self, record, decode):
        torch.set_grad_enabled(False)
