"""Truth: the digits are those of scikit-learn, each in one split."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data_layer.stored import labels_of, open_split, pixels_of
from vae_ray import Experiment
from vae_ray.config.sections.data import DigitsData
from vae_ray.data.batches import Shards
from vae_ray.data.splits import Splits


@pytest.fixture
def config(tmp_path: Path) -> DigitsData:
    return DigitsData(cache_dir=tmp_path / "cache")


def test_digits_are_those_of_scikit_learn_each_in_one_split(config: DigitsData) -> None:
    from sklearn.datasets import load_digits

    known = load_digits()
    train, test = open_split(config, "train"), open_split(config, "test")
    assert (len(train), len(test)) == (1438, 359)
    is_test = np.arange(1797) % 5 == 4
    pixels = np.empty((1797, 1, 8, 8), np.uint8)
    labels = np.empty(1797, np.int64)
    for split, chosen in ((train, ~is_test), (test, is_test)):
        pixels[chosen], labels[chosen] = pixels_of(split), labels_of(split)
    # levels 0..16 become 0..255, to the nearest byte
    assert np.abs(pixels[:, 0] * (16 / 255) - known.images).max() <= 0.5 * 16 / 255
    assert np.array_equal(labels, known.target)


def test_first_digit_is_the_known_zero(config: DigitsData) -> None:
    train = open_split(config, "train")
    # scikit-learn's first row: levels 0 0 5 13 9 1 0 0 of 16
    assert pixels_of(train)[0, 0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    assert labels_of(train)[:6].tolist() == [0, 1, 2, 3, 5, 6]
    assert labels_of(open_split(config, "test"))[:3].tolist() == [4, 9, 4]
    assert train.image_shape == (1, 8, 8)


def test_validation_is_taken_from_train_and_never_from_test(config: DigitsData) -> None:
    splits = Splits.open(Experiment(data=config.model_copy(update={"num_validation": 100})))
    split, validation = splits.select("val")
    assert split is splits.train
    assert len(validation) == splits.num_validation == 100
    assert not set(validation.tolist()) & set(splits.select("train")[1].tolist())
    assert splits.select("test")[0] is splits.test
    assert splits.select("test")[1].tolist() == list(range(359))


@pytest.mark.parametrize("binarize", ["none", "fixed", "dynamic"])
def test_runs_of_one_split_seed_have_the_same_images_in_orders_of_their_own(config: DigitsData, binarize: str) -> None:
    data = config.model_copy(update={"num_validation": 100, "binarize": binarize})

    def seen(seed: int, split_seed: int | str) -> list[torch.Tensor]:
        """The indices and images of the validation split, those of training, and the first epoch's order."""
        experiment = Experiment(data=data).with_overrides({"run.seed": seed, "data.split_seed": split_seed})
        splits, alone = Splits.open(experiment), Shards(0, 1, torch.device("cpu"))
        val, train = (splits.loader(name, experiment, alone) for name in ("val", "train"))
        epoch = None if binarize == "none" else 1
        images = [val.images(val.indices), train.images(train.indices, epoch=epoch)]
        return [val.indices, *images, next(train.steps(1, global_batch_size=64))]

    of_one, of_other, of_split_only, of_seed = seen(1, 1), seen(2, 1), seen(1, 2), seen(1, "auto")
    same = [torch.equal(a, b) for a, b in zip(of_one, of_other, strict=True)]
    assert same == [True, True, binarize != "dynamic", False]  # dynamic binarization is drawn anew: by run.seed
    assert all(torch.equal(a, b) for a, b in zip(of_one, of_seed, strict=True)), "auto is run.seed"
    assert not any(torch.equal(a, b) for a, b in zip(of_one, of_split_only, strict=True))


def test_the_mean_training_image_is_that_of_the_images_that_are_trained_on(config: DigitsData) -> None:
    splits = Splits.open(Experiment(data=config.model_copy(update={"num_validation": 100})))
    train = pixels_of(splits.train)[splits.train_indices.numpy()]
    assert len(train) == 1338
    # exact sums of integers; one float64 division each
    np.testing.assert_allclose(splits.mean_training_image(), train.mean(0, dtype=np.float64) / 255, rtol=1e-15)
