"""A trained VAE, loaded from its directory: everything one does with it afterwards. No Ray anywhere."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vae_ray.arguments import check_choice, check_whole, existing_device, finite_float
from vae_ray.checkpoints.finding import find_checkpoint
from vae_ray.checkpoints.loading import AVERAGED, WEIGHTS, Checkpoint
from vae_ray.config import user_code
from vae_ray.config.experiment import Experiment, is_place_key
from vae_ray.data.batches import Loader
from vae_ray.data.cache import name_of, open_dataset
from vae_ray.data.dataset import Split
from vae_ray.data.images import as_images, as_tensor
from vae_ray.data.splits import Splits, fingerprints_of
from vae_ray.errors import CorruptFile, UserError, one_line
from vae_ray.evaluation.codes import WHAT, Codes, images_digest, write_codes
from vae_ray.evaluation.diagnosis import NUM_IMAGES, find_failures
from vae_ray.evaluation.diagnosis.evidence import gather
from vae_ray.evaluation.diagnosis.findings import Diagnosis, diagnose
from vae_ray.evaluation.evaluation import (
    Evaluation,
    evaluation_of,
    observers_of,
    possible,
    training_observers_of,
)
from vae_ray.evaluation.features import FeatureSpace, feature_space
from vae_ray.evaluation.fitted_priors import FOLDER as PRIORS
from vae_ray.evaluation.fitted_priors import FittedPrior, check_name, compare, top_posteriors
from vae_ray.evaluation.fitted_priors import load as load_prior
from vae_ray.evaluation.fitted_priors import save as save_prior
from vae_ray.evaluation.observations import (
    Observation,
    Piece,
    Progress,
    Run,
    in_order,
    joined,
    no_progress,
    observe,
    observe_here,
    observed,
    pieces,
    spread_pieces,
)
from vae_ray.evaluation.store import owner_of
from vae_ray.evaluation.table import (
    ALL,
    DEFAULT,
    DEFAULT_FEATURES,
    MOST_TRAINING_IMAGES,
    Setting,
    check_features,
    chosen,
)
from vae_ray.models.coordinates import coordinates
from vae_ray.models.interpolation import INTERPOLATIONS
from vae_ray.models.latents import Distribution, Group
from vae_ray.models.noise import BLOCK_ROWS, latent_noise, num_elements
from vae_ray.models.priors.fitting import KINDS, fit_prior
from vae_ray.models.traversal import Traversal, check_means, decode_codes, join_groups, split_groups, traverse
from vae_ray.models.vae import VAE, build_vae, shape_vae
from vae_ray.parallel.group import SingleProcess, shards_of
from vae_ray.storage.locations import absolute, join_location
from vae_ray.storage.reading import short_repr
from vae_ray.training.cpu_settings import cpu_settings

logger = logging.getLogger(__name__)

SplitName = Literal["train", "val", "test"]
Method = Literal["linear", "spherical"]
Weights = Literal["averaged", "last"]
What = Literal["mean", "sample", "all"]

BINARIZATIONS = {
    "none": "none (grey levels)",
    "dynamic": "dynamic (drawn anew in every epoch of training, once in evaluation)",
    "fixed": "fixed (drawn once, by run.seed)",
}
MOST_IMAGES = 1_000_000
"""Of one call that makes images: they are decoded together, and all are in memory."""


class TrainedVAE:
    """A model with its experiment; images are `(N, C, H, W)`: uint8, bool, or floats in [0, 1].

    Load one with `TrainedVAE.load(path)`. Images and codes may be tensors, arrays or nested lists; values out of range
    and empty batches are refused. Methods draw no hidden randomness: where one samples, it takes a seed. A code is the
    z of all latent groups side by side, `(N, latent_dim)`.
    """

    def __init__(
        self,
        model: VAE,
        experiment: Experiment,
        checkpoint: Checkpoint,
        weights: Weights = "last",
        *,
        location: str | None = None,
        fitted_prior: FittedPrior | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.experiment = experiment
        self.checkpoint = checkpoint
        self.weights = weights
        self.location = str(checkpoint.path) if location is None else location
        """Path or URI that it was loaded from: of a run, a sweep or a checkpoint."""
        self.fitted_prior = fitted_prior
        """The prior that the model has instead of its own (`with_prior`)."""

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        weights: Weights | None = None,
        device: str | torch.device = "cpu",
        trust_code: bool = False,
        data: Mapping[str, Any] | None = None,
    ) -> TrainedVAE:
        """The model of a checkpoint directory, or the best one of a run's or a sweep's directory.

        Args:
            path: a directory or URI. Of a run, the best intact checkpoint is loaded, with a warning that names
                damaged ones that would be better.
            weights: "averaged" (`training.ema_decay`) or "last"; None means averaged where there are such.
            device: where the model computes: "cpu", "cuda", "cuda:1", ...
            trust_code: whether code that the checkpoint's experiment names (a user's own network, ...) may be run.
            data: where the run's images are now, by dotted keys, as in `{"data.root": "/data"}`.

        Raises:
            UserError: there is no such checkpoint, it is damaged, it names code and `trust_code` is false, there is no
                such device, or `data` would change what the images are.
        """
        if weights is not None:
            check_choice("weights", weights, get_args(Weights))
        device = existing_device(device)
        checkpoint = find_checkpoint(path)
        experiment = checkpoint.experiment()
        user_code.check_trusted(experiment.user_code(), origin=str(checkpoint.path), trust_code=trust_code)
        experiment = _with_data_elsewhere(experiment, {} if data is None else data)
        averaged = checkpoint.has_averaged_weights if weights is None else weights == "averaged"
        expected = meta_model(experiment, checkpoint).state_dict()
        tensors = checkpoint.weights(expected, averaged=averaged)
        model = build_vae(experiment, checkpoint.image_shape, seed=0)
        model.load_state_dict(tensors)
        location = absolute(path, key="checkpoint")
        return cls(model.to(device), experiment, checkpoint, "averaged" if averaged else "last", location=location)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.model.image_shape

    @property
    def latent_dim(self) -> int:
        """Dimensions of a code: those of all latent groups together."""
        return num_elements(self.model.latent_shapes)

    @torch.inference_mode()
    def generate(
        self,
        num: int,
        *,
        seed: int = 0,
        temperature: float = 1.0,
        label: int | str | None = None,
        prior: str | None = None,
    ) -> Tensor:
        """Means of p(x|z) for `num` z from the prior: images `(num, C, H, W)` in [0, 1].

        The first n of `generate(m)` are `generate(n)`. `temperature` scales the prior's standard deviation. `label` is
        the class, or its name, of all images of a conditional VAE; None gives the classes 0, 1, ... in turn. `prior` is
        the name of one that `fit_prior` has kept; None means the model's own.
        """
        if prior is not None:
            return self.with_prior(prior).generate(num, seed=seed, temperature=temperature, label=label)
        check_whole("num", num, least=1)
        _check_num_images("num", num)
        check_whole("seed", seed, least=0)
        temperature = finite_float("temperature", temperature, least=0)
        noise = latent_noise(self.model.latent_shapes, slice(0, num), seed, "generate", device=self.device)
        condition = self.model.classes_in_turn(num) if label is None else self._condition(num, label, key="label")
        images = self.model.generate(noise, temperature=temperature, condition=condition)
        check_means(images, self.model.likelihood, given=f"temperature: got {temperature:g}")
        return images

    def fit_prior(
        self, kind: Literal["mixture", "flow"], *, components: int | None = None, seed: int = 0, name: str | None = None
    ) -> FittedPrior:
        """Fit a prior of the top group to codes z ~ q(z|x) of the training images and keep it as `RUN/priors/NAME`.

        `record["held_out"]` of the result has the mean log density of codes of test images, in nats per image, under
        it and under the model's own prior. See `vae_ray.models.priors.fitting`.

        Args:
            kind: a "mixture" of diagonal Gaussians, or a "flow".
            components: of a mixture; None chooses by codes held out.
            seed: of the fit.
            name: to use it by, in `with_prior`; None means the kind.

        Raises:
            UserError: there is no run to keep it beside, or the posterior is not Gaussian.
        """
        check_choice("kind", kind, KINDS)
        check_whole("seed", seed, least=0)
        if components is not None:
            check_whole("components", components, least=1)
            if kind != "mixture":
                raise UserError(f"components: got {components}, but only a mixture has components; leave it out")
        name, owner, num_classes = kind if name is None else name, self._owner(), self.model.num_classes
        check_name(name)
        observations = [
            top_posteriors(
                self.model,
                self._evaluation_loader(split, None),
                size=self.experiment.training.evaluation_batch_size,
                precision=self.experiment.training.precision,
            )
            for split in get_args(SplitName)
            if split != "val"
        ]
        (_, posteriors), (arrays, of_test) = observations
        prior, settings = fit_prior(kind, posteriors, num_classes=num_classes, components=components, seed=seed)
        record = {
            "kind": kind,
            "settings": settings,
            "weights": self._fingerprint,
            "epoch": self.checkpoint.epoch,
            "seed": seed,
            "num_codes": len(posteriors.mean),
            "held_out": compare(prior, arrays, of_test, num_classes),
        }
        fitted = FittedPrior(name, prior, record, join_location(owner, PRIORS, name))
        try:
            save_prior(fitted)
        except OSError as error:
            raise UserError(f"prior: {fitted.location} cannot be written ({error.strerror})") from None
        return fitted

    def with_prior(self, name: str) -> TrainedVAE:
        """This model with a prior that `fit_prior` has kept beside its run; raises `UserError` if there is none."""
        fitted = load_prior(self._owner(), name, self.model, weights=self._fingerprint)
        model = self.model.with_prior(fitted.prior.to(self.device))
        return TrainedVAE(
            model, self.experiment, self.checkpoint, self.weights, location=self.location, fitted_prior=fitted
        )

    def _owner(self) -> str:
        owner = owner_of(self.location)
        if owner is None:
            raise UserError(f"prior: {self.location} is a checkpoint without its run, where priors are kept; give RUN")
        return owner

    @torch.inference_mode()
    def groups(self, images: Any, labels: Any = None) -> tuple[Group, ...]:
        """q(z|x) and prior of each latent group, the top one first, with z at the posterior mean."""
        x = self._floats(images)
        return self.model.posteriors(x, self._condition(len(x), labels))

    def posterior(self, images: Any, labels: Any = None) -> Distribution:
        """q(z|x) of a model with one group: `.mean`, `.logvar` `(N, latent_dim)`, `.kl(prior)`, ..."""
        groups = self.groups(images, labels)
        if len(groups) > 1:
            raise UserError(f"posterior: this model has {len(groups)} latent groups; use groups(images)")
        assert groups[0].posterior is not None
        return groups[0].posterior

    def encode(self, images: Any, labels: Any = None) -> Tensor:
        """The posterior mean, `(N, latent_dim)`: a deterministic code of each image, of all latent groups together."""
        return join_groups(tuple(group.z for group in self.groups(images, labels)))

    def representation(self, images: Any, labels: Any = None) -> Tensor:
        """One vector of each image for other models, a classifier for example: `(N, dimensions)`.

        The mean of the posterior, of the top group where there are several; a spatial latent is flattened.
        """
        return self.groups(images, labels)[0].z.flatten(1)

    def decode(self, z: Any, labels: Any = None) -> Tensor:
        """Means of p(x|z), images `(N, C, H, W)` in [0, 1], for codes `(N, latent_dim)`."""
        codes = as_tensor(z, key="z")
        return decode_codes(self.model, codes, self._condition(len(codes) if codes.ndim else 1, labels))

    def reconstruct(self, images: Any, labels: Any = None) -> Tensor:
        """Each image through its posterior mean and back: `(N, C, H, W)` in [0, 1]."""
        return self.decode(self.encode(images, labels), labels)

    @torch.inference_mode()
    def interpolate(
        self,
        start: Any,
        end: Any,
        labels: Any = None,
        end_labels: Any = None,
        *,
        steps: int = 10,
        method: Method = "linear",
    ) -> Tensor:
        """Images `(N, steps, C, H, W)` along paths between the codes of `start` and `end`, each `(N, C, H, W)`.

        A path leads through the noise of which the prior makes z, which is z itself for N(0, I). Of a hierarchy, and
        of a flow, each point is as likely under the prior as its noise is.

        "linear" is a straight line; "spherical" also turns at constant speed (Shoemake 1985), so that
        points stay about as far from the origin as the prior's (White 2016, arXiv:1609.04468). In a conditional VAE a
        path leads from the one-hot `labels` to `end_labels` as well (None: the same), in a straight line.
        """
        check_whole("steps", steps, least=2)
        check_choice("method", method, INTERPOLATIONS)
        end_labels = labels if end_labels is None else end_labels
        a, b = self._coordinates(start, labels), self._coordinates(end, end_labels)
        if len(a) != len(b):
            raise UserError(f"images: got {len(a)} starts and {len(b)} ends, should be as many of each")
        _check_num_images("steps", len(a) * int(steps))
        t = torch.linspace(0, 1, steps)
        path = INTERPOLATIONS[method](a, b, t)
        first, last = self._condition(len(a), labels), self._condition(len(b), end_labels)
        condition = None if first is None or last is None else INTERPOLATIONS["linear"](first, last, t).flatten(0, 1)
        eps = split_groups(path.flatten(0, 1), self.model.latent_shapes)
        images = self.model.decode_coordinates(eps, condition)
        check_means(images, self.model.likelihood, given=f"images: got codes up to {float(path.abs().max()):g}")
        return images.unflatten(0, (-1, steps))

    def traverse(
        self, images: Any, labels: Any = None, *, num_dimensions: int = 10, steps: int = 11, extent: float = 3.0
    ) -> Traversal:
        """What each latent dimension does: images `(dimensions, steps, C, H, W)` along it, the others at 0.

        Of a spatial latent a row moves a whole channel.

        Dimensions are in order of their rate over `images`; `extent` is in standard deviations of the prior. A
        conditional VAE is shown for the label of the first image.
        """
        check_whole("num_dimensions", num_dimensions, least=1)
        check_whole("steps", steps, least=2)
        _check_num_images("steps", min(int(num_dimensions), self.latent_dim) * int(steps))
        extent = finite_float("extent", extent)
        x = self._floats(images)
        condition = self._condition(len(x), labels)
        return traverse(self.model, x, condition, num_dimensions=num_dimensions, steps=steps, extent=extent)

    def evaluate(
        self,
        split: SplitName = "test",
        metrics: str | Sequence[str] = DEFAULT,
        *,
        num_samples: int = 5000,
        num_images: int | None = None,
        features: str = DEFAULT_FEATURES,
        progress: Progress = no_progress,
        run: Run = observe_here,
    ) -> Evaluation:
        """Metrics of a whole split (docs/evaluation.md), `{"test/nelbo": ..., "test/distortion": ..., ...}`.

        Each is a function of what the model says about every image, in the order of the split, with noise that depends
        on the run's seed and on the image's position alone: the same for any number of workers.

        Args:
            split: which images.
            metrics: names of the table `METRICS`, as a list or with commas; "all" leaves out what the model or its
                images do not have, and says so in the warnings.
            num_samples: samples of z for each image, of "nll"; the literature uses 5,000.
            num_images: only the first so many images of the split.
            features: the space of "fid", "kid" and "precision-recall": "classifier", which is trained on the labels of
                the training images, "torchvision:NETWORK:FILE" with weights in safetensors, or
                "package.module:function", images `(n, C, H, W)` in [0, 1] to `(n, F)`.
            progress: called with the number of images so far, and of all.
            run: who observes the images: this process, or Ray workers with
                `vae_ray.distributed.evaluation.on_ray(num_workers)`.

        Raises:
            UserError: an unknown metric or split, or one that this model or its images do not have.
        """
        names, experiment = chosen(metrics), self.experiment
        check_whole("num_samples", num_samples, least=1)
        check_features(features, names)
        loader, seed = self._evaluation_loader(split, num_images), experiment.run.seed
        space = functools.partial(self._feature_space, features)
        setting = Setting(self.model, num_samples, seed, space, split)
        observe_one = functools.partial(
            observe, self.model, loader, slice(0, 1), precision=experiment.training.precision
        )
        names, missing = possible(names, setting, observe_one, required=metrics not in (ALL, [ALL]))
        size = BLOCK_ROWS if "nll" in names else experiment.training.evaluation_batch_size
        own = [Piece(split, rows) for rows in pieces(len(loader.indices), size)]
        loaders: dict[str, Loader] = {split: loader}
        observers, of_training = {str(split): observers_of(names, setting)}, []
        if needed := training_observers_of(names, setting):
            loaders["train"], observers["train"] = self._evaluation_loader("train", None), needed
            most = max(len(loader.indices), MOST_TRAINING_IMAGES)
            of_training = [Piece("train", rows) for rows in spread_pieces(len(loaders["train"].indices), most)]
        prior = None if self.fitted_prior is None else self.fitted_prior.prior
        whole = Observation(experiment, self.model, loaders, [*own, *of_training], observers, prior)
        with cpu_settings(num_threads=torch.get_num_threads(), device=self.device):
            parts = in_order(observed(whole, run, progress))
        arrays, training = (joined(each) if each else {} for each in (parts[: len(own)], parts[len(own) :]))
        labels = self._labels(split, loader) | ({"num_samples": num_samples} if "nll" in names else {})
        return evaluation_of(arrays, names, setting, split=split, labels=labels, warnings=missing, training=training)

    def write_codes(
        self,
        out: str | Path,
        *,
        what: What = "mean",
        split: SplitName | Literal["all"] = "all",
        progress: Progress = no_progress,
        run: Run = observe_here,
    ) -> Codes:
        """Write the codes of all images as Parquet, one row an image; a call that was killed is continued by another.

        Columns: `split`; `number` in the split, from 0; labels and factors; and float32 lists of fixed length: `code`.
        Images are those of the run as evaluation sees them, or others of their shape (`load` with `data`), of which
        none are set aside for validation.

        Args:
            out: a file, if it ends in `.parquet`, or else a directory of them; a path or URI.
            what: "mean" of the posterior, as `encode` gives it; a "sample" z ~ q(z|x) by the run's seed; "all": `code`
                is the mean, and `logvar` (of the top group), `z` (the sample) and `rate` (of it, in nats) are added.
            split: one, or all.
            progress: called with the number of images so far, and of all.
            run: as in `evaluate`.

        Raises:
            UserError: images of another shape, a split that does not exist, or `out` has something else.
        """
        if self.fitted_prior is not None:
            raise UserError("prior: codes do not depend on it; write those of the model as it was loaded")
        check_choice("what", what, WHAT)
        check_choice("split", split, ("all", *get_args(SplitName)))
        dataset, experiment = open_dataset(self.experiment.data), self.experiment
        fingerprints = {name: images.fingerprint for name, images in dataset.splits.items()}
        if self.checkpoint.other_images(dataset.description.image_shape, fingerprints):
            experiment = experiment.with_overrides({"data.num_validation": 0})
        splits = Splits.open(experiment)
        self._check_shape(splits.train)
        if split == "val" and not splits.num_validation:
            raise UserError("split val: these images have no validation split; try test, train or all")
        names = [name for name in get_args(SplitName) if name != "val" or splits.num_validation]
        shards = shards_of(SingleProcess(self.device))
        loaders = {name: splits.loader(name, experiment, shards) for name in names if split in (name, "all")}
        for loader in loaders.values():
            self._check_labels(loader.split)
        how: dict[str, Any] = {"what": what, "weights": self._fingerprint, "run": run, "progress": progress}
        with cpu_settings(num_threads=torch.get_num_threads(), device=self.device):
            return write_codes(self.model, experiment, loaders, str(out), **how)

    @property
    def _fingerprint(self) -> str:
        """SHA-256 of the weights' file."""
        return str(self.checkpoint.files[AVERAGED if self.weights == "averaged" else WEIGHTS]["sha256"])

    def _feature_space(self, spec: str) -> FeatureSpace:
        splits = Splits.open(self.experiment)
        train, test = splits.select("train"), splits.select("test")
        return feature_space(spec, train=train, test=test, seed=self.experiment.split_seed, device=self.device)

    def _evaluation_loader(self, split: SplitName, num_images: int | None) -> Loader:
        """The images of a split, or the first so many; raises `UserError` where there are none, or not so many."""
        check_choice("split", split, get_args(SplitName))
        splits = Splits.open(self.experiment)
        if split == "val" and not splits.num_validation:
            raise UserError("split val: this run had no validation split (data.num_validation 0); try test or train")
        loader = self._loader(splits, split)
        self._check_images(loader.split)
        if num_images is not None:
            check_whole("num_images", num_images, least=1)
            if num_images > len(loader.indices):
                raise UserError(
                    f"num_images: got {num_images}, the split {split!r} has {len(loader.indices)}; leave it out"
                )
            loader.indices = loader.indices[:num_images]
        return loader

    def _labels(self, split: SplitName, loader: Loader) -> dict[str, Any]:
        """What numbers depend on; `vae_ray.report.comparison` says in what they may differ and compare."""
        condition, is_fixed = self.model.condition_on, self.experiment.data.binarize == "fixed"
        binarized = f", binarized by seed {self.experiment.split_seed}" if is_fixed else ""
        return {
            "data": name_of(self.experiment.data),
            "split": split,
            "num_images": len(loader.indices),
            "images": images_digest(loader)[:12] + binarized,
            "seed": self.experiment.run.seed,
            **({} if condition is None else {"condition": condition}),
            "binarization": BINARIZATIONS[self.experiment.data.binarize],
            "likelihood": self.experiment.likelihood.name,
            "support": self.model.likelihood.support,
            "objective": self.experiment.objective.name,
            "beta": self.experiment.flat().get("objective.beta"),
            "z": "sampled",
            "weights": self.weights,
            "epoch": self.checkpoint.epoch,
            **({} if self.fitted_prior is None else {"prior": self.fitted_prior.label}),
        }

    @torch.inference_mode()
    def failures(self) -> list[str]:
        """A line if the model is useless: no informative latent dimension, or not better than the mean image."""
        splits = Splits.open(self.experiment)
        self._check_images(splits.test)
        loader = self._loader(splits, "test")
        indices = loader.indices[:NUM_IMAGES]
        x, condition = loader.images(indices), self.model.condition(loader.labels(indices))
        return find_failures(self.model, x, splits.mean_training_image(), self.experiment, condition)

    def diagnose(self, history: Sequence[Mapping[str, Any]] = ()) -> Diagnosis:
        """What is wrong with the model, with the numbers that show it and what to try (docs/evaluation.md).

        Args:
            history: the records of the run's epochs (`TrainResult.history`); without them nothing is said of curves.
        """
        splits = Splits.open(self.experiment)
        for images in (splits.train, splits.test):
            self._check_images(images)
        train, test = (self._loader(splits, name) for name in ("train", "test"))
        mean_image = splits.mean_training_image()
        return diagnose(
            gather(self.model, self.experiment, train=train, test=test, mean_image=mean_image, history=history)
        )

    def test_images(self, num: int, *, spread: bool = False) -> Tensor:
        """The first `num` test images of the run's data, `(num, C, H, W)` in [0, 1]; all where there are fewer.

        With `spread` as many from all over the split, which may be sorted by class.
        """
        return self.test_examples(num, spread=spread)[0]

    def test_examples(self, num: int, *, spread: bool = False) -> tuple[Tensor, Tensor | None]:
        """Those test images, and the labels `(num,)` that a conditional VAE is given with them; else None."""
        check_whole("num", num, least=1)
        splits = Splits.open(self.experiment)
        self._check_images(splits.test)
        loader = self._loader(splits, "test")
        indices = loader.spread(num) if spread else loader.indices[:num]
        name = self.model.condition_on
        return loader.images(indices).cpu(), None if name is None else loader.labels(indices)[name]

    def targets(self, split: SplitName = "test") -> dict[str, Tensor]:
        """Labels and factors of the images of a split by name, int64 or float64 `(N,)`, in the order of the images."""
        check_choice("split", split, get_args(SplitName))
        images, indices = Splits.open(self.experiment).select(split)
        return {name: values[indices] for name, values in images.columns.items()}

    @property
    def target_names(self) -> dict[str, list[str]]:
        """What the values 0, 1, ... of labels mean, by the labels' name; of those that have names."""
        return Splits.open(self.experiment).dataset.description.names

    def _loader(self, splits: Splits, split: SplitName) -> Loader:
        return splits.loader(split, self.experiment, shards_of(SingleProcess(self.device)))

    def _check_images(self, images: Split) -> None:
        """Raise `UserError` for images of another shape than the model's; warn of others than the run had."""
        self._check_shape(images)
        self._check_labels(images)
        name = self.model.condition_on
        if other := self.checkpoint.other_images(images.image_shape, fingerprints_of(images, name)):
            logger.warning(
                "data.source: %s has %s; these numbers and pictures do not compare with the run's",
                name_of(self.experiment.data),
                other,
            )

    def _check_labels(self, images: Split) -> None:
        """Raise `UserError` if a conditional VAE cannot be given the labels of these images."""
        name, num_classes = self.model.condition_on, self.model.num_classes
        if name is None:
            return
        values = images.columns.get(name)
        if values is None or values.is_floating_point() or not ((values >= 0) & (values < num_classes)).all():
            raise UserError(
                f"data.source: not all {images.name} images have a {name!r} from 0 to {num_classes - 1}, on which this "
                "model is conditional; use images that have it, for example the run's own"
            )

    def _check_shape(self, images: Split) -> None:
        if images.image_shape != self.image_shape:
            other = self.checkpoint.other_images(images.image_shape, {})
            message = f"data.source: {name_of(self.experiment.data)} has {other}"
            raise UserError(f"{message}; use the run's images, for example with --data.root DIR")

    def class_of(self, label: int | str | None, *, key: str = "label") -> int | None:
        """The class that a number or a name stands for; None, and only that, of a model that is not conditional.

        Raises `UserError`, which begins with `key`, for any other.
        """
        condition = self._condition(1, label, key=key)
        return None if condition is None else int(condition.argmax())

    def _condition(self, num: int, labels: Any, *, key: str = "labels") -> Tensor | None:
        """One-hot rows of the labels `(num,)`, or of one for all; raises `UserError` if they do not fit the model."""
        name, num_classes = self.model.condition_on, self.model.num_classes
        if name is None:
            if labels is not None:
                raise UserError(
                    f"{key}: got {short_repr(labels)}, but this model is not conditional; train one with "
                    "--model.condition label"
                )
            return None
        which = "the class of each image, {}, or one for all" if key == "labels" else "a class, {}"
        allowed = "should be " + which.format(f"0 to {num_classes - 1}")
        if labels is None:
            raise UserError(f"{key}: got none, but this model is conditional on {name!r}; {allowed}")
        if isinstance(labels, str):
            names = self.target_names.get(name, [])
            if labels not in names:
                named = f"; their names are {', '.join(names)}" if names else ""
                raise UserError(f"{key}: got {labels!r}, {allowed}{named}")
            labels = names.index(labels)
        classes = as_tensor(labels, key=key)
        is_whole = not classes.is_floating_point() and not classes.is_complex() and classes.dtype != torch.bool
        if not is_whole or classes.shape not in ((), (num,)) or not ((classes >= 0) & (classes < num_classes)).all():
            raise UserError(f"{key}: got {short_repr(labels)}, {allowed}")
        return self.model.one_hot(classes.to(self.device).expand(num))

    def _coordinates(self, images: Any, labels: Any) -> Tensor:
        return join_groups(tuple(map(coordinates, self.groups(images, labels))))

    def _floats(self, images: Any) -> Tensor:
        return as_images(images, self.image_shape).to(self.device)


def _with_data_elsewhere(experiment: Experiment, places: Mapping[str, Any]) -> Experiment:
    """The experiment with its images in other places; raises `UserError` for keys that say something else."""
    if not isinstance(places, Mapping):
        raise UserError(f'data: got {short_repr(places)}, should be a mapping, as in {{"data.root": "/data"}}')
    flat = experiment.flat()
    allowed = [key for key in flat if key.startswith("data.") and is_place_key(key)]
    for key, value in places.items():
        name = str(key).replace("-", "_")
        if name not in allowed and (name not in flat or flat[name] != value):
            source = experiment.data.source
            raise UserError(f"{key}: got {short_repr(value)}, but of {source} only {', '.join(allowed)} can differ")
    return experiment.with_overrides(places)


def _check_num_images(name: str, num: int) -> None:
    """Raise `UserError` for more images than one call can make."""
    if num > MOST_IMAGES:
        raise UserError(f"{name}: asks for {num} images, should be at most {MOST_IMAGES}: they are in memory together")


def meta_model(experiment: Experiment, checkpoint: Checkpoint) -> VAE:
    """The model that a checkpoint's experiment describes, without memory for its weights: to compare them with.

    Raises `CorruptFile` if there can be no such network.
    """
    try:
        return shape_vae(experiment, checkpoint.image_shape)
    except (RuntimeError, OverflowError, MemoryError) as error:  # more numbers than there can be
        reason = one_line(error)[:200]
        raise CorruptFile(
            f"{checkpoint.path / WEIGHTS}: experiment.json describes no possible network ({reason})"
        ) from None
