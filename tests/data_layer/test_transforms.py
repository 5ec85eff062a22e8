"""Augmentation and random binarization: the same for an image whatever the batch, and random as they say."""

import math

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from vae_ray.data.transforms import (
    Flip,
    Shift,
    _image_keys,
    _random_bits,
    _shifted,
    augment,
    binarize,
    parse_augmentation,
    random_integers,
    uniform,
)
from vae_ray.seeds import stream

N, C, H, W = 37, 3, 10, 14


def images(n: int = N, *, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, C, H, W), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def chi_square_of(counts: Tensor) -> float:
    """The probability of counts at least as uneven, were all cells equally probable."""
    expected = counts.sum() / counts.numel()
    return float(chi2.sf(float(((counts - expected) ** 2 / expected).sum()), counts.numel() - 1))


def correlation(a: Tensor, b: Tensor) -> float:
    """In standard deviations of independent samples."""
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1]) * math.sqrt(a.numel())


# --- the generator


def test_image_keys_are_the_published_outputs_of_splitmix64():
    # https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64, seed 1234567
    expected = [
        *(6457827717110365317, 3203168211198807973, 9817491932198370423),
        *(4593380528125082431, 16408922859458223821),
    ]
    keys = _image_keys(torch.arange(5), 1234567)
    assert [key % 2**64 for key in keys.tolist()] == expected


def python_bits(index: int, position: int, seed: int) -> int:
    """The generator in unbounded integers."""
    key = (seed + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    key = (key ^ (key >> 27)) * 0x94D049BB133111EB % 2**64
    key ^= key >> 31
    x = (position + key) % 2**32
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32 ^ key >> 32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16)


@pytest.mark.parametrize("seed", [0, 1, stream(3, "x"), 2**63 - 1])
def test_bits_are_those_of_unbounded_integers_for_any_seed_and_image_number(seed):
    indices = torch.tensor([0, 1, 59_999, 2**31 + 5, 2**40 + 7])
    bits, _ = _random_bits(indices, 6, seed)
    expected = [[python_bits(i, j, seed) for j in range(6)] for i in indices.tolist()]
    assert [[bit % 2**32 for bit in row] for row in bits.tolist()] == expected
    # the upper 24 bits, of which the first is the sign, moved from [-1/2, 1/2) to [0, 1)
    as_floats = [[(bit >> 8 ^ 1 << 23) / 2**24 for bit in row] for row in expected]
    assert uniform(indices, 6, seed).tolist() == as_floats


def test_uniform_is_uniform_to_the_last_of_its_24_bits():
    values = uniform(torch.arange(2_000), 1_000, stream(1, "test"))
    assert values.dtype == torch.float32
    assert 0 <= values.min() < 2e-6
    assert 1 - 2e-6 < values.max() < 1
    whole = (values.double() * 2**24).long()
    assert torch.equal(whole.double() / 2**24, values.double())
    cells = (values * 256).long().flatten()
    assert chi_square_of(torch.bincount(cells, minlength=256).double()) > 1e-3
    low_cells = (whole % 4096).flatten()
    assert chi_square_of(torch.bincount(low_cells, minlength=4096).double()) > 1e-3
    for bit in range(24):  # a fair coin: within 4.5 standard deviations
        mean = ((whole >> bit) & 1).double().mean().item()
        assert abs(mean - 0.5) < 4.5 * 0.5 / math.sqrt(whole.numel()), bit


def test_pairs_of_neighbouring_positions_and_images_fill_the_square():
    values = (uniform(torch.arange(2_000), 1_000, stream(2, "test")) * 32).long()
    for a, b in ((values[:, ::2], values[:, 1::2]), (values[::2], values[1::2]), (values[:1_000], values[1_000:])):
        assert chi_square_of(torch.bincount((a * 32 + b).flatten(), minlength=1024).double()) > 1e-3


def test_neighbouring_images_positions_epochs_and_seeds_are_uncorrelated():
    indices = torch.arange(1_000)
    values = uniform(indices, 784, stream(0, "binarization", "train", 3))
    others = {
        "next image": uniform(indices + 1, 784, stream(0, "binarization", "train", 3)),
        "next epoch": uniform(indices, 784, stream(0, "binarization", "train", 4)),
        "next seed": uniform(indices, 784, stream(1, "binarization", "train", 3)),
        "other split": uniform(indices, 784, stream(0, "binarization", "test", 3)),
        "seed of the stream + 1": uniform(indices, 784, stream(0, "binarization", "train", 3) + 1),
    }
    for name, other in others.items():
        assert abs(correlation(values, other)) < 4.5, name
        assert abs(correlation((values > 0.5).float(), (other > 0.5).float())) < 4.5, name
    for lag in (1, 2, 28, 392):
        assert abs(correlation(values[:, lag:], values[:, :-lag])) < 4.5, lag


def test_image_sums_vary_as_those_of_independent_values():
    # If positions were shared between images, or values within one, the sums would vary less or more.
    sums = uniform(torch.arange(20_000), 100, stream(5, "test")).double().sum(1)
    variance = sums.var().item() / (100 / 12)
    assert abs(variance - 1) < 4.5 * math.sqrt(2 / 20_000)


def test_random_integers_are_uniform_and_reach_both_ends():
    values = random_integers(torch.arange(70_000), 3, stream(0, "t"), high=7)
    assert values.unique().tolist() == list(range(7))
    assert chi_square_of(torch.bincount(values.flatten()).double()) > 1e-3


# --- augmentation


def test_augmentations_are_parsed_from_text():
    assert parse_augmentation("flip") == Flip()
    assert parse_augmentation("shift:4") == Shift(4)
    assert parse_augmentation("shift:999") == Shift(999)


@pytest.mark.parametrize(
    "text", ["", "Flip", "flip ", "flip:1", "shift", "shift:0", "shift:-1", "shift:04", "shift:1000"]
)
def test_other_texts_are_refused_with_what_is_allowed(text):
    with pytest.raises(ValueError, match=r"should be flip or shift:K with K from 1 to 999") as error:
        parse_augmentation(text)
    assert repr(text) in str(error.value)


STEPS = [Flip(), Shift(3)]


def transformed(pixels: Tensor, indices: Tensor, *, epoch: int = 2, split: str = "train") -> Tensor:
    augmented = augment(pixels, indices, STEPS, seed=5, epoch=epoch, split=split)
    return binarize(augmented, indices, "dynamic", seed=5, epoch=epoch, split=split)


@pytest.mark.parametrize("sizes", [[37], [1] * 37, [20, 17], [0, 5, 32], [12, 12, 13]])
def test_an_image_is_the_same_in_any_batch_and_any_order(sizes):
    pixels, indices = images(), torch.arange(N) * 1009 + 4
    whole = transformed(pixels, indices)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    parts = [transformed(pixels[part], indices[part]) for part in order.split(sizes)]
    assert torch.equal(torch.cat(parts), whole[order])


def test_epochs_splits_seeds_and_images_differ():
    pixels = images(1, seed=3).expand(N, C, H, W)
    indices = torch.arange(N)
    whole = transformed(pixels, indices)
    assert len(whole.unique(dim=0)) == N
    assert not torch.equal(whole, transformed(pixels, indices, epoch=3))
    assert not torch.equal(whole, transformed(pixels, indices, split="test"))
    assert not torch.equal(whole, transformed(pixels, indices + 1))


def test_a_flip_is_the_exact_mirror_image_of_half_of_the_images():
    pixels = images(4_000)
    flipped = augment(pixels, torch.arange(4_000), [Flip()], seed=0, epoch=0, split="train")
    is_same = (flipped == pixels).flatten(1).all(1)
    is_mirrored = (flipped == pixels.flip(-1)).flatten(1).all(1)
    assert torch.equal(is_same, ~is_mirrored)
    assert abs(is_mirrored.float().mean().item() - 0.5) < 4.5 * 0.5 / math.sqrt(4_000)
    assert flipped.dtype == torch.uint8


def test_a_shift_moves_every_pixel_and_repeats_the_edge():
    pixels = images()
    generator = torch.Generator().manual_seed(2)
    down, right = (torch.randint(-20, 21, (N,), generator=generator) for _ in range(2))  # beyond height and width too
    shifted = _shifted(pixels, down, right, limit=20)
    for n in range(N):
        rows = (torch.arange(H) - down[n]).clamp(0, H - 1)
        columns = (torch.arange(W) - right[n]).clamp(0, W - 1)
        assert torch.equal(shifted[n], pixels[n][:, rows][:, :, columns])


def test_shifts_are_uniform_over_all_offsets():
    limit, n = 2, 50_000
    pixels = torch.zeros(1, 1, 9, 11, dtype=torch.uint8)
    pixels[0, 0, 4, 5] = 1
    shifted = augment(pixels.expand(n, 1, 9, 11), torch.arange(n), [Shift(limit)], seed=1, epoch=0, split="train")
    place = shifted.flatten(1).int().argmax(1)
    offsets = (place // 11 - 4 + limit) * 5 + place % 11 - 5 + limit
    assert chi_square_of(torch.bincount(offsets, minlength=25).double()) > 1e-3
    assert len(offsets.unique()) == 25


def test_steps_are_applied_in_their_order_and_draw_independently():
    pixels, indices = images(), torch.arange(N)
    seed = [stream(7, "augmentation", "train", 1, number) for number in range(2)]
    expected = Shift(3)(Flip()(pixels, indices, seed[0]), indices, seed[1])
    assert torch.equal(augment(pixels, indices, STEPS, seed=7, epoch=1, split="train"), expected)
    assert not torch.equal(augment(pixels, indices, STEPS[::-1], seed=7, epoch=1, split="train"), expected)
    twice = augment(pixels, indices, [Flip(), Flip()], seed=7, epoch=1, split="train")
    assert not torch.equal(twice, pixels)  # the second is not the first undone


def test_the_input_is_left_as_it_was():
    pixels, indices = images(), torch.arange(N)
    before, floats = pixels.clone(), pixels / 255
    transformed(pixels, indices)
    levels = binarize(floats, indices, "none", seed=0, epoch=0, split="train")
    binarize(floats, indices, "fixed", seed=0, epoch=0, split="train")
    assert torch.equal(pixels, before)
    assert torch.equal(levels, before / 255)


def test_an_empty_shard_stays_empty():
    nothing, none = torch.zeros(0, C, H, W, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
    assert transformed(nothing, none).shape == (0, C, H, W)


# --- binarization


def test_level_0_is_never_1_and_level_255_always():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2, 1).expand(3_000, 2, 2, 500)
    for given in (pixels, pixels.float() / 255):
        binary = binarize(given, torch.arange(3_000), "dynamic", seed=0, epoch=0, split="train")
        assert torch.equal(binary, pixels.float() / 255)


def test_a_pixel_is_1_with_the_probability_of_its_level():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    n = 20_000
    binary = binarize(levels.expand(n, 1, 16, 16), torch.arange(n), "fixed", seed=0, epoch=None, split="train")
    assert binary.unique().tolist() == [0.0, 1.0]
    assert binary.dtype == torch.float32
    probability = levels.double() / 255
    deviation = (probability * (1 - probability) / n).sqrt()
    assert ((binary.double().mean(0) - probability).abs() <= 4.5 * deviation).all()  # binomial, 256 tests


def test_the_mean_over_epochs_approaches_the_grey_level():
    pixels, indices, epochs = images(8), torch.arange(8), 2_000
    total = sum(binarize(pixels, indices, "dynamic", seed=3, epoch=e, split="train") for e in range(epochs))
    probability = pixels.double() / 255
    deviation = (probability * (1 - probability) / epochs).sqrt()
    assert ((total.double() / epochs - probability).abs() <= 5 * deviation).all()  # binomial, 3,360 tests


def test_dynamic_differs_by_epoch_and_fixed_does_not():
    pixels, indices = images(), torch.arange(N)
    dynamic = [binarize(pixels, indices, "dynamic", seed=0, epoch=e, split="train") for e in (0, 1)]
    fixed = [binarize(pixels, indices, "fixed", seed=0, epoch=e, split="train") for e in (0, 1, None)]
    assert not torch.equal(*dynamic)
    assert torch.equal(fixed[0], fixed[1])
    assert torch.equal(fixed[0], fixed[2])


def test_in_evaluation_dynamic_is_fixed():
    pixels, indices = images(), torch.arange(N)
    evaluated = binarize(pixels, indices, "dynamic", seed=0, epoch=None, split="test")
    assert torch.equal(evaluated, binarize(pixels, indices, "fixed", seed=0, epoch=None, split="test"))


def test_grey_levels_as_bytes_and_as_floats_give_the_same_pixels():
    pixels, indices = images(), torch.arange(N)
    for how in ("none", "fixed", "dynamic"):
        a, b = (binarize(x, indices, how, seed=0, epoch=1, split="train") for x in (pixels, pixels.float() * (1 / 255)))
        assert torch.equal(a, b)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_the_bits_of_the_cpu():
    pixels, indices = images(), torch.arange(N)
    assert torch.equal(transformed(pixels.cuda(), indices.cuda()).cpu(), transformed(pixels, indices))
