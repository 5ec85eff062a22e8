"""The sections of an Experiment and the settings of every entry. One sentence a field: meaning, unit, range.

The tables of what the names mean (networks, likelihoods, ...) are in the files that own them; a contract test holds
names here and there equal. This module imports no torch, because `--help` is built from it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from vae_ray.config.fields import (
    Augmentations,
    Channels,
    Choice,
    Colour,
    CpuCount,
    FilePath,
    Float,
    ImageSize,
    ImportPath,
    ImportPaths,
    Int,
    Location,
    Name,
    PixelScale,
    Section,
    UserEntry,
    ValueRange,
    Widths,
    WorkerCount,
    place,
)

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
NAME_RULE = "1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit"

TestFraction = Annotated[Float, Field(gt=0, lt=1)]
TEST_FRACTION: Any = Field(
    0.1,
    description="Images that form the test split where the source has none, as a part of all; chosen by their content, "
    "so that an image stays where it is when others are added.",
)
CACHE_LIMIT: Any = place(
    None,
    ge=1,
    description="GiB of a prepared data set at a URI that this node keeps; the shards needed next are fetched ahead; "
    "null keeps all.",
)

# --- data ----------------------------------------------------------------------------------------------------


class DataConfig(Section):
    """Where images come from: the fields that every source has."""

    cache_dir: FilePath | None = place(
        None,
        description="Directory of the prepared (decoded, memory-mapped) images; null means $VAE_RAY_CACHE, else "
        "~/.cache/vae_ray.",
    )
    num_validation: Int = Field(
        0,
        ge=0,
        description="Training images that form the validation split; drawn by run.seed and, of your own images, by "
        "each image's content. A validation split of the source's own is used instead, and this is set to its size.",
    )
    augment: Augmentations = Field(
        (),
        description="Random changes of training images, anew in every epoch: flip mirrors left and right, shift:4 "
        "moves by up to 4 pixels.",
    )
    binarize: Literal["none", "dynamic", "fixed"] = Field(
        "none",
        description="Make pixels 0 or 1, with their grey level as the probability of 1: dynamic draws anew in every "
        "epoch of training, fixed once.",
    )
    window_mib: Int | None = Field(
        256,
        ge=1,
        description="Training images of more than four windows of so many MiB are read and shuffled window by window, "
        "each of randomly chosen shards; fewer, or null, are shuffled as a whole, which needs memory for all.",
    )


class DigitsData(DataConfig):
    """The handwritten digits that ship inside scikit-learn: no download."""

    source: Literal["digits"] = "digits"


class PublishedData(DataConfig):
    """Published data sets, in the files in which their authors published them."""

    source: Literal["mnist", "fashion_mnist", "kmnist", "cifar10", "svhn"] = "mnist"
    root: Location | None = place(
        None,
        description="Directory of the raw files (of mnist and its replacements also a URI: ROOT/MNIST/raw/..., as "
        "torchvision stores them); null means datasets/ inside data.cache_dir.",
    )
    download: bool = place(True, description="Download raw files that are absent.")


class SpritesData(DataConfig):
    """737,280 binary images of 64x64 pixels with known factors: shape, scale, orientation, position (dSprites)."""

    source: Literal["sprites"] = "sprites"
    root: Location | None = place(
        None, description="The published dsprites .npz, or its directory; null generates the images."
    )
    test_fraction: TestFraction = TEST_FRACTION


class PreparedData(DataConfig):
    """A data set that `vae-ray data prepare` has written."""

    source: Literal["prepared"] = "prepared"
    root: Location | None = place(None, description="Directory or URI of the prepared data set.")
    cache_limit: Float | None = CACHE_LIMIT


class ImagesData(DataConfig):
    """A user's own images."""

    source: Literal["auto", "folder", "arrays", "parquet"] = "auto"
    root: Location | None = place(
        None,
        description="The images: a folder of image files or a .zip or .tar of it, an .npz, .npy or HDF5 file, Parquet "
        "files, or a prepared data set; folders and Parquet also at a URI (s3://, gs://).",
    )
    image_size: ImageSize = Field(
        None, description="Height and width that images are brought to; null: as they are, all of one size."
    )
    fit: Literal["crop", "pad", "stretch"] = Field(
        "crop",
        description="How images of another shape are brought to it: crop cuts the longer side, pad adds borders.",
    )
    channels: Channels = Field(
        "auto", description="1 makes images grey, 3 colour; auto: grey only if every image is grey."
    )
    background: Colour = Field("white", description="Colour behind transparent pixels, and of the borders of fit pad.")
    value_range: ValueRange = Field(
        "auto",
        description="Pixel values that become black and white; auto: the range of the integer type (16 bits: 0,65535), "
        "and 0,1 for floats.",
    )
    test_fraction: TestFraction = TEST_FRACTION
    max_skipped_fraction: Float = place(
        0.01, ge=0, le=1, description="Images that may be unusable, as a part of all; more of them are refused."
    )
    images: Name | None = Field(
        None, description="Name of the array (.npz, HDF5) or Parquet column of images; null finds it."
    )
    labels: Name | None = Field(
        None, description="Name of the array (.npz, HDF5) or Parquet column of labels; null finds it."
    )
    cache_limit: Float | None = CACHE_LIMIT


class UserData(BaseModel):
    """A user's own source; the keys beside those of `DataConfig` are its keyword settings."""

    model_config = ConfigDict(frozen=True, extra="allow", validate_default=True)

    source: ImportPath
    cache_dir: FilePath | None = DataConfig.model_fields["cache_dir"]  # type: ignore[assignment]
    num_validation: Int = DataConfig.model_fields["num_validation"]  # type: ignore[assignment]
    augment: Augmentations = DataConfig.model_fields["augment"]  # type: ignore[assignment]
    binarize: Literal["none", "dynamic", "fixed"] = DataConfig.model_fields["binarize"]  # type: ignore[assignment]
    window_mib: Int | None = DataConfig.model_fields["window_mib"]  # type: ignore[assignment]
    test_fraction: TestFraction = TEST_FRACTION

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments of the user's function."""
        return dict(self.model_extra or {})


# --- model ---------------------------------------------------------------------------------------------------


class MlpNetwork(Section):
    """Fully connected encoder, and its mirror image as decoder."""

    name: Literal["mlp"] = "mlp"
    hidden: Widths = Field((400, 100), description="Widths of the encoder's hidden layers; the decoder mirrors them.")


class LadderNetwork(Section):
    """Two groups of latent variables; the lower group's prior is computed from the upper (Sønderby et al. 2016)."""

    name: Literal["ladder"] = "ladder"
    hidden: Annotated[Widths, Field(min_length=2, max_length=2)] = Field(
        (256, 256), description="Widths of the two deterministic layers, bottom first."
    )
    top_dim: Int = Field(
        8, ge=1, le=65536, description="Latent dimensions of the top group; model.latent_dim is the lower's."
    )


class StandardPrior(Section):
    """N(0, I)."""

    name: Literal["standard"] = "standard"


class ModelConfig(Section):
    """Network and prior."""

    latent_dim: Int = Field(20, ge=1, le=65536, description="Number of latent dimensions.")
    network: Annotated[MlpNetwork | LadderNetwork | UserEntry, Choice("network")] = Field(
        MlpNetwork(), description="Encoder and decoder."
    )
    prior: Annotated[StandardPrior | UserEntry, Choice("prior")] = Field(
        StandardPrior(), description="Distribution p(z) of the top group."
    )
    initialization: Literal["torch", "he"] = Field(
        "torch", description="Initial weights: torch's own, or he: He's, with a decoder that starts at the mean image."
    )
    encoder_range: Literal["unit", "signed"] = Field(
        "unit", description="Range of pixels fed to the encoder: unit [0, 1] or signed [-1, 1]."
    )


# --- likelihood ----------------------------------------------------------------------------------------------


class BernoulliLikelihood(Section):
    """Bernoulli with mean sigmoid(logit), one logit a pixel."""

    name: Literal["bernoulli"] = "bernoulli"


class GaussianLikelihood(Section):
    """Normal with mean sigmoid(logit) and one fixed standard deviation."""

    name: Literal["gaussian"] = "gaussian"
    scale: PixelScale = Field(
        0.1, description="Standard deviation of a pixel, in units of the [0, 1] range; at least 0.001."
    )


# --- objective -----------------------------------------------------------------------------------------------


class ConstantSchedule(Section):
    """The value does not change."""

    name: Literal["constant"] = "constant"


class LinearSchedule(Section):
    """The value rises linearly from 0 (KL annealing, Bowman et al. 2016)."""

    name: Literal["linear"] = "linear"
    epochs: Float = Field(5.0, gt=0, description="Epochs until the full value is reached.")


BetaSchedule = Annotated[ConstantSchedule | LinearSchedule, Choice("schedule")]


class ElboObjective(Section):
    """distortion + beta * rate (Higgins et al. 2017)."""

    name: Literal["elbo"] = "elbo"
    beta: Float = Field(1.0, ge=0, description="Weight of the rate (KL); 1 gives the negative ELBO.")
    beta_schedule: BetaSchedule = Field(ConstantSchedule(), description="How beta changes over the run.")


class MmdObjective(Section):
    """distortion + beta * rate + weight * MMD²(q(z), p(z)) over the global batch (Zhao et al. 2019, InfoVAE)."""

    name: Literal["mmd"] = "mmd"
    beta: Float = Field(0.0, ge=0, description="Weight of the rate (KL); 0 leaves the posterior to the MMD alone.")
    weight: Float = Field(1000.0, ge=0, description="Weight of MMD², in nats.")


# --- optimization and training -------------------------------------------------------------------------------


class OptimConfig(Section):
    """Stochastic optimisation."""

    optimizer: Literal["adam", "adamw"] = Field("adam", description="Update rule.")
    lr: Float = Field(1e-3, gt=0, description="Peak learning rate, for the mean gradient of the global batch.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Decay of the learning rate to zero over all steps of the run."
    )
    warmup_steps: Int = Field(0, ge=0, description="Steps over which the learning rate first rises linearly from zero.")
    weight_decay: Float = Field(0.0, ge=0, description="Weight decay (L2 for adam, decoupled for adamw).")
    grad_clip: Float | None = Field(
        None, gt=0, description="Largest allowed global 2-norm of the gradient; null leaves it as it is."
    )


class StopOnNonfinite(Section):
    """The run stops; the batch is saved in nonfinite/."""

    name: Literal["stop"] = "stop"


class SkipNonfinite(Section):
    """The batch is left out; it is saved in nonfinite/."""

    name: Literal["skip"] = "skip"
    limit: Int = place(3, ge=0, description="Batches left out before the run stops.")


class RollBackOnNonfinite(Section):
    """The run goes back to its last checkpoint and continues with a smaller learning rate."""

    name: Literal["rollback"] = "rollback"
    limit: Int = place(3, ge=0, description="Rollbacks before the run stops.")
    lr_factor: Float = place(0.5, gt=0, le=1, description="Factor of the learning rate after each rollback.")


class TrainingConfig(Section):
    """The loop."""

    epochs: Int = Field(10, ge=1, description="Passes over the training split.")
    global_batch_size: Int = Field(
        64,
        ge=1,
        description="Images a step, over all workers together; the last batch of an epoch may be smaller.",
    )
    evaluation_batch_size: Int = place(
        1000,
        ge=1,
        description="Images a step of evaluation, over all workers together; sets memory, not the metrics.",
    )
    test_every_epochs: Int = Field(
        1,
        ge=0,
        description="Evaluate the test split every so many epochs; 0 only once, for the best checkpoint.",
    )
    patience_epochs: Int | None = Field(
        None,
        ge=1,
        description="Stop when the selection metric has not improved for so many epochs; null trains all epochs.",
    )
    ema_decay: Float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay per step of an exponential moving average of the weights, which is then evaluated, pictured "
        "and loaded; null keeps none.",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Precision of matrix products; bfloat16 is autocast, weights stay float32."
    )
    nonfinite: Annotated[StopOnNonfinite | SkipNonfinite | RollBackOnNonfinite, Choice("policy")] = place(
        StopOnNonfinite(), description="What to do if the loss or its gradient is not finite."
    )


class WorkersConfig(Section):
    """Who computes."""

    num: WorkerCount = place(
        "auto",
        description="Ray Train workers; 0 trains in this process without Ray; a range such as 2..8 starts with as many "
        "as the cluster has room for and follows it as nodes join and leave; auto: this process where one process can "
        "use the machine, else one worker per GPU, or per node of a Ray cluster without GPUs.",
    )
    cpus: CpuCount = place(
        "auto",
        description="CPU cores, and torch threads, of each worker; auto shares the cores out, and gives a small "
        "network one thread.",
    )
    gpus: Int = place(1, ge=1, description="GPUs reserved for each worker that trains on one; it uses the first.")
    device: Literal["auto", "cpu", "cuda"] = place(
        "auto", description="cuda, cpu, or auto: cuda if there is a GPU for every worker."
    )
    max_failures: Int = place(
        3,
        ge=0,
        description="How often lost Ray workers are replaced, continuing from the last checkpoint; preemptions do not "
        "count.",
    )

    @property
    def min(self) -> int:
        """The smallest number of workers that can train; 0 without Ray. `num` must be resolved (not "auto")."""
        assert self.num != "auto", "workers.num is resolved by training.placement before it is used"
        return self.num[0] if isinstance(self.num, tuple) else int(self.num)

    @property
    def max(self) -> int:
        """The largest number of workers that can train; 0 without Ray. `num` must be resolved (not "auto")."""
        assert self.num != "auto", "workers.num is resolved by training.placement before it is used"
        return self.num[1] if isinstance(self.num, tuple) else int(self.num)

    @property
    def num_threads(self) -> int:
        """torch threads of each worker; one while `cpus` is still "auto"."""
        return self.cpus if isinstance(self.cpus, int) else 1


class RunConfig(Section):
    """The run as a whole."""

    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)] | None = place(
        None, description="Directory of the run inside run.storage; null means SOURCE-DATE-TIME."
    )
    storage: Location = place(
        "runs",
        description="Directory that holds all runs, or a URI (s3://BUCKET/runs, gs://...); "
        "on several nodes one that all of them see.",
    )
    seed: Int = Field(0, ge=0, lt=2**63, description="Seed of weights, order of images and latent noise.")
    initial_weights: Location | None = Field(
        None, description="Checkpoint, run or sweep whose weights training starts from; shapes must agree."
    )
    checkpoints_kept: Int = place(1, ge=1, description="Best checkpoints kept; the last is kept besides.")
    checkpoint_every_steps: Int | None = place(
        None,
        ge=0,
        description="Steps of the run between checkpoints inside an epoch, of which the newest is kept until the "
        "epoch's own is written; null or 0: only at the end of epochs.",
    )
    callbacks: ImportPaths = place(
        (),
        description="A user's own callbacks, MODULE:NAME,...; called on rank 0 as a run and its epochs begin and end.",
    )


Data = Annotated[
    DigitsData | PublishedData | SpritesData | ImagesData | PreparedData | UserData,
    Choice("data source", tag="source"),
]
Likelihood = Annotated[BernoulliLikelihood | GaussianLikelihood | UserEntry, Choice("likelihood")]
Objective = Annotated[ElboObjective | MmdObjective | UserEntry, Choice("objective")]
