"""Section `data`: where images come from, and what is done to them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from vae_ray.config.fields import (
    Augmentations,
    Channels,
    Choice,
    Colour,
    FilePath,
    Float,
    ImageSize,
    ImportPath,
    Int,
    Location,
    Name,
    Section,
    Seed,
    SpriteSide,
    ValueRange,
    Widths,
    place,
)

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
        description="Training images that form the validation split; drawn by data.split_seed and, of your own images, "
        "by each image's content. A validation split of the source's own is used instead, and this is set to its size.",
    )
    split_seed: Seed | Literal["auto"] = Field(
        "auto",
        description="Seed of the validation split, and of binarization that is drawn once; auto: run.seed. With a "
        "number runs of other seeds have the same images.",
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
    image_size: SpriteSide = Field(64, description="Height and width; 32 takes every other row and column.")
    stride: Annotated[Widths, Field(min_length=5, max_length=5)] = Field(
        (1, 1, 1, 1, 1),
        description="Of shape, scale, orientation, x and y every so many values are used: 1,2,4,2,2 leaves 23,040 "
        "images.",
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
    split_seed: Seed | Literal["auto"] = DataConfig.model_fields["split_seed"]  # type: ignore[assignment]
    augment: Augmentations = DataConfig.model_fields["augment"]  # type: ignore[assignment]
    binarize: Literal["none", "dynamic", "fixed"] = DataConfig.model_fields["binarize"]  # type: ignore[assignment]
    window_mib: Int | None = DataConfig.model_fields["window_mib"]  # type: ignore[assignment]
    test_fraction: TestFraction = TEST_FRACTION

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments of the user's function."""
        return dict(self.model_extra or {})


Data = Annotated[
    DigitsData | PublishedData | SpritesData | ImagesData | PreparedData | UserData,
    Choice("data source", tag="source"),
]
