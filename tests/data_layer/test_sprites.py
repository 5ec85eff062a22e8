"""Sprites: every combination of the factors once, whole, at its place; and the published file without its pickle."""

import hashlib
import itertools
import math
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from vae_ray.data.decoding import ImageRules
from vae_ray.data.sources.sprites import (
    FACTORS,
    NUM_SPRITES,
    PUBLISHED_NAME,
    SIZES,
    Sprites,
    _canvases,
    _order,
    draw,
)
from vae_ray.errors import UserError

NUM_PUBLISHED = 4_500
"""Of the fake published file; more than are unpacked at once."""


def codes(shape: int, scale: int, orientation: int, x: int = 0, y: int = 0) -> np.ndarray:
    return np.array([[shape, scale, orientation, x, y]])


# --- drawing


def test_there_are_as_many_as_published():
    assert SIZES == (3, 6, 40, 32, 32)
    assert Sprites().num_images == NUM_SPRITES == 737_280


def test_the_areas_are_those_of_the_shapes():
    square, ellipse = (2 * 11.4) ** 2, math.pi * 16 * 8
    x, y = np.meshgrid(np.linspace(-1.5, 1.5, 3001), np.linspace(-1.5, 1.5, 3001))
    heart = ((x**2 + y**2 - 1) ** 3 <= x**2 * y**3).mean() * 9 * 12.3**2
    for shape, area in enumerate((square, ellipse, heart)):
        for scale, size in enumerate(FACTORS["scale"]):
            drawn = np.concatenate([draw(codes(shape, scale, orientation)) for orientation in range(39)])
            mean = (drawn > 0).sum(axis=(1, 2)).mean()  # pixels at the edge average out over orientations
            assert mean == pytest.approx(area * size**2, rel=0.01)


def test_no_shape_is_cut_off_at_any_position():
    ends = np.array([(x, y) for x in (0, 31) for y in (0, 31)])
    for shape in range(3):
        for orientation in range(40):
            rows = np.column_stack([np.tile([shape, 5, orientation], (4, 1)), ends])
            areas = (draw(rows) > 0).sum(axis=(1, 2))
            assert (areas == (draw(codes(shape, 5, orientation, 15, 17)) > 0).sum()).all()


def test_a_position_is_one_whole_pixel_and_grows_right_and_down():
    for shape, scale, orientation in ((0, 5, 3), (1, 2, 17), (2, 0, 30)):
        (first,) = draw(codes(shape, scale, orientation, 4, 20))
        (right,) = draw(codes(shape, scale, orientation, 7, 20))
        (down,) = draw(codes(shape, scale, orientation, 4, 22))
        assert np.array_equal(right, np.roll(first, 3, axis=1))
        assert np.array_equal(down, np.roll(first, 2, axis=0))


def test_a_heart_has_its_point_below_and_its_notch_above():
    (heart,) = draw(codes(2, 5, 0, 16, 16)) > 0
    rows, columns = heart.any(1).nonzero()[0], heart.any(0).nonzero()[0]
    middle = (columns[0] + columns[-1]) // 2
    assert heart[rows[-1]].sum() <= 2  # the point
    assert not heart[rows[0], middle]  # the notch
    lobes = heart[rows[0] + 1].nonzero()[0]
    assert lobes[0] < middle < lobes[-1]
    widest = heart.sum(1).argmax()
    assert widest < (rows[0] + rows[-1]) / 2  # above the middle


def test_the_ellipse_turns_clockwise():
    (ellipse,) = draw(codes(1, 5, 3, 15, 15)) > 0  # 27.7 degrees
    y, x = ellipse.nonzero()
    assert np.corrcoef(x, y)[0, 1] > 0.5  # y grows downwards: the right end is the lower one
    angle = 0.5 * math.atan2(2 * np.cov(x, y)[0, 1], np.var(x) - np.var(y))
    assert angle == pytest.approx(3 * 2 * math.pi / 39, abs=0.02)


def test_only_the_last_orientation_equals_another():
    sprites = _canvases().reshape(3, 6, 40, -1)
    assert np.array_equal(sprites[:, :, 39], sprites[:, :, 0])
    assert len(np.unique(sprites.reshape(720, -1), axis=0)) == 3 * 6 * 39


def test_pixels_and_order_are_those_of_the_drawing_version():
    # a change of these makes prepared sets differ: raise DRAWING_VERSION
    assert hashlib.sha256(_canvases().tobytes()).hexdigest()[:16] == "3234594c4e7e6e18"
    assert _order(NUM_SPRITES)[:4].tolist() == [125674, 436028, 227828, 625170]


# --- the source


def test_every_combination_comes_once():
    source = Sprites()
    seen = np.zeros(SIZES, np.int64)
    for part in source.parts(200_000):
        rows = _order(NUM_SPRITES)[slice(*part.payload)]
        assert part.split is None
        assert len(rows) == part.num
        np.add.at(seen.reshape(-1), rows, 1)
    assert (seen == 1).all()


def test_rows_have_the_pixels_of_their_codes_in_any_process_and_part():
    source = pickle.loads(pickle.dumps(Sprites()))
    assert len(pickle.dumps(source)) < 500
    assert not source.in_process
    parts = list(source.parts(300))[:3]
    rows = [source.read(part, ImageRules()) for part in parts]
    whole = source.read(next(iter(Sprites().parts(900))), ImageRules())
    assert np.array_equal(np.stack(whole.images), np.concatenate([np.stack(part.images) for part in rows]))
    given = np.stack([whole.columns[name] for name in FACTORS], axis=1)
    assert given.dtype == np.int64
    assert np.array_equal(np.stack(whole.images)[:, 0], draw(given))
    assert np.unique(np.stack(whole.images)).tolist() == [0, 255]


def test_a_part_holds_all_values_of_all_factors():
    rows = Sprites().read(next(Sprites().parts(2_000)), ImageRules())
    for size, (name, column) in zip(SIZES, rows.columns.items(), strict=True):
        counts = np.bincount(column, minlength=size)
        assert counts.min() > 0, name


def test_the_rules_are_obeyed():
    part = next(Sprites().parts(7))
    resized = Sprites().read(part, ImageRules(size=(20, 32), channels=3)).images
    assert [image.shape for image in resized] == [(3, 20, 32)] * 7


def test_a_stride_leaves_the_values_between_out_and_side_32_every_other_row_and_column():
    stride = (2, 3, 13, 8, 16)
    source = Sprites(side=32, stride=stride)
    assert source.native_shape() == (1, 32, 32)
    assert source.num_images == 2 * 2 * 4 * 4 * 2
    rows = source.read(next(source.parts(1_000)), ImageRules())
    codes = np.stack([rows.columns[name] for name in FACTORS], axis=1)
    wanted = itertools.product(*(range(0, size, step) for size, step in zip(SIZES, stride, strict=True)))
    assert sorted(map(tuple, codes.tolist())) == list(wanted)
    assert np.array_equal(np.stack(rows.images)[:, 0], draw(codes)[:, ::2, ::2])
    fingerprints = {Sprites(side=side, stride=each).fingerprint() for side in (32, 64) for each in (stride, (1,) * 5)}
    assert len(fingerprints) == 4


def test_what_it_says_of_itself():
    source = Sprites()
    assert source.native_shape() == (1, 64, 64)
    assert source.fingerprint() == "sprites-1"
    assert source.names == {"shape": ["square", "ellipse", "heart"]}
    assert source.describe().startswith("737,280 sprites, generated")


# --- the published file


class Exploit:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A file like the published one, with images that differ and a pickle that would create `tmp_path`/ran."""
    generator = np.random.default_rng(0)
    imgs = generator.integers(0, 2, (NUM_PUBLISHED, 64, 64), dtype=np.uint8)
    classes = np.column_stack([np.zeros(NUM_PUBLISHED, np.int64), generator.integers(0, 3, (NUM_PUBLISHED, 5))])
    file = tmp_path / PUBLISHED_NAME
    metadata = np.array(Exploit(tmp_path / "ran"), dtype=object)
    np.savez_compressed(file, metadata=metadata, imgs=imgs, latents_classes=classes, latents_values=classes / 2)
    return file


def test_the_published_file_gives_its_images_and_classes_and_runs_no_code(published):
    for root in (published, published.parent):
        source = Sprites(root)
        assert source.num_images == NUM_PUBLISHED
        assert source.in_process
        parts = list(source.parts(1_999))
        assert [part.num for part in parts] == [1_999, 1_999, 502]
        rows = [source.read(part, ImageRules()) for part in parts]
        with np.load(published) as archive:
            order = _order(NUM_PUBLISHED)
            images = np.concatenate([np.stack(part.images) for part in rows])
            assert np.array_equal(images[:, 0], archive["imgs"][order] * 255)
            for number, name in enumerate(FACTORS, start=1):
                column = np.concatenate([part.columns[name] for part in rows])
                assert np.array_equal(column, archive["latents_classes"][order, number])
    assert not (published.parent / "ran").exists()
    with np.load(published, allow_pickle=True) as archive:
        archive["metadata"]  # the trap is one
    assert (published.parent / "ran").exists()


def test_the_fingerprint_of_a_file_changes_with_it(published):
    before = Sprites(published).fingerprint()
    content = published.read_bytes()
    published.unlink()
    published.write_bytes(content + b"\0")
    assert Sprites(published.parent).fingerprint() != before != Sprites().fingerprint()


def test_a_missing_file_is_refused_with_its_name(tmp_path):
    for root in (tmp_path, tmp_path / "no"):
        with pytest.raises(UserError, match=rf"data.root: got '{root}', should be {PUBLISHED_NAME}"):
            Sprites(root)


def read_first(file: Path) -> None:
    source = Sprites(file)
    source.read(next(source.parts(5)), ImageRules())


def saved(file: Path, **arrays: np.ndarray) -> Path:
    np.savez_compressed(file, **arrays)
    return file


@pytest.mark.parametrize(
    ("imgs", "classes", "reason"),
    [
        (np.zeros((5, 64, 64), np.uint8), None, "latents_classes"),
        (np.zeros((5, 64, 64), np.uint8), np.zeros((4, 6), np.int64), r"latents_classes is int64 \(4, 6\)"),
        (np.zeros((5, 64, 64), np.uint8), np.zeros((5, 6)), r"latents_classes is float64"),
        (np.zeros((5, 64, 64), np.uint8), np.array([[None] * 6] * 5), "allow_pickle"),
        (np.full((5, 64, 64), 2, np.uint8), np.zeros((5, 6), np.int64), "imgs has the value 2, should be 0 and 1"),
        (np.zeros((5, 64, 63), np.uint8), None, r"imgs is uint8 \(5, 64, 63\), should be uint8"),
        (np.zeros((5, 64, 64), np.int64), None, r"imgs is int64"),
        (np.zeros((0, 64, 64), np.uint8), None, r"imgs is uint8 \(0, 64, 64\)"),
        (np.asfortranarray(np.zeros((5, 64, 64), np.uint8)), None, r"imgs is uint8"),
    ],
)
def test_other_arrays_are_refused_with_what_they_are(tmp_path, imgs, classes, reason):
    arrays = {"imgs": imgs} | ({} if classes is None else {"latents_classes": classes})
    file = saved(tmp_path / PUBLISHED_NAME, **arrays)
    with pytest.raises(UserError, match=reason) as error:
        read_first(file)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


def test_damaged_files_are_refused_in_one_line(published):
    content = published.read_bytes()
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 255
    for bad in (b"", b"PK\x03\x04", content[:-100], bytes(damaged)):
        published.write_bytes(bad)
        with pytest.raises(UserError, match="or is damaged") as error:
            read_first(published)
        assert "\n" not in str(error.value)


def test_a_header_that_claims_more_than_there_is_allocates_nothing(tmp_path):
    file = saved(tmp_path / PUBLISHED_NAME, imgs=np.zeros((5, 64, 64), np.uint8))
    with zipfile.ZipFile(file) as archive:
        content = archive.read("imgs.npy")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("imgs.npy", content.replace(b"(5, 64, 64)", b"(700,64,64)"))
    with pytest.raises(UserError, match=r"imgs has 20480 bytes for pixels of shape \(700, 64, 64\)"):
        Sprites(file)
