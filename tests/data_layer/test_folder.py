"""System and truth: a folder of image files of every kind, in every layout, as a data set and on the command line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import stat
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import pytest
from numpy.typing import NDArray

from tests.data_layer import zoo
from tests.data_layer.labelled_pictures import png
from tests.data_layer.zoo import Zoo, plain
from tests.storage.servers import BUCKET, ObjectStore, filesystem
from vae_ray import Experiment, TrainedVAE, UserError
from vae_ray.cli.main import main
from vae_ray.config.sections.data import ImagesData
from vae_ray.data.cache import open_dataset
from vae_ray.data.dataset import Dataset

NOBODY = 65534


def opened(root: Path | str, cache: Path, **settings: Any) -> Dataset:
    return open_dataset(ImagesData(root=str(root), cache_dir=cache, **settings))


def pixels(dataset: Dataset, split: str) -> NDArray[np.uint8]:
    return dataset.splits[split].first(10**6).numpy()


def skipped_of(dataset: Dataset) -> dict[str, str]:
    lines = (dataset.directory / "skipped.jsonl").read_text().splitlines()
    return {record["name"]: record["reason"] for record in map(json.loads, lines)}


def write(root: Path, *names: str, seed: int = 0) -> Path:
    """A folder of different PNGs of 6x5 pixels, which `names` name, with `/` at its end a directory."""
    random = np.random.default_rng(seed)
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(png(random.integers(0, 256, (3, 6, 5), dtype=np.uint8)))
    return root


def numbered(folder: str, num: int) -> list[str]:
    return [f"{folder}{number:03d}.png" for number in range(num)]


def equal(one: Dataset, other: Dataset) -> bool:
    """Equal images, in the same order, with equal labels."""
    return one.splits.keys() == other.splits.keys() and all(
        np.array_equal(pixels(one, split), pixels(other, split))
        and one.splits[split].fingerprint == other.splits[split].fingerprint
        and one.splits[split].names == other.splits[split].names
        and one.splits[split].counts() == other.splits[split].counts()
        for split in one.splits
    )


# --- one file of every kind -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Zoo]:
    root = tmp_path_factory.mktemp("kinds") / "zoo"
    return root, zoo.add_links_and_pipes(root, root.parent / "outside", zoo.write_files(root))


def assert_is_zoo(dataset: Dataset, kinds: Zoo, *, prefix: str = "train/") -> None:
    """All that can be read has the stated pixels; what cannot is listed with its reason."""
    files = sorted(kinds.readable.values(), key=lambda file: file.name.split("/"))
    images = pixels(dataset, "train")
    assert images.shape == (len(files), 3, zoo.HEIGHT, zoo.WIDTH)
    for file, image in zip(files, images, strict=True):
        difference = np.abs(image.astype(int) - file.pixels).max()
        assert difference <= file.tolerance, file.name
    skipped = skipped_of(dataset)
    assert skipped.keys() == {f"{prefix}{name}" for name in kinds.skipped}
    for name, reason in kinds.skipped.items():
        assert skipped[f"{prefix}{name}"].startswith(reason), name
        assert "\n" not in skipped[f"{prefix}{name}"]
    assert dataset.description.num_skipped == len(kinds.skipped)
    for text in kinds.ignored:
        assert text in dataset.describe()
    assert np.array_equal(pixels(dataset, "test")[:, :, 0, 0], [[100, 0, 0], [0, 100, 0]])


def test_every_kind_of_file_has_its_pixels_or_its_reason(all_kinds: tuple[Path, Zoo], tmp_path: Path) -> None:
    root, kinds = all_kinds
    assert_is_zoo(opened(root, tmp_path, max_skipped_fraction=0.5), kinds)


def test_data_show_names_the_first_five_on_lines_of_their_own(
    all_kinds: tuple[Path, Zoo], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, kinds = all_kinds
    sheet = tmp_path / "sheet.png"
    arguments = ["--data.image-size=null", f"--data.cache-dir={tmp_path}", f"--out={sheet}"]
    assert main(["data", "show", str(root), *arguments]) == 0
    out, _ = capsys.readouterr()
    first, *_, mixed, skipped, file, prepared, written = out.splitlines()
    assert all(line.isprintable() for line in out.splitlines())
    assert first == (
        "zoo (folder of 24 .png, 5 .jpg, 2 .gif, 2 .bmp, 1 .tiff; ignored 6 hidden, 2 .txt, 1 without a suffix, 1 "
        ".csv): 16x24 colour; 21 train, 2 test"
    )
    assert mixed == "25 of 36 images lie beside folders, which are thus not taken for classes"
    assert skipped.removesuffix(file.removeprefix("skipped    ")) == (
        "13 of 36 images are skipped: 'train/0 pipe.png' is a pipe or a device, 'train/bad/bomb.png' has more than "
        "178,956,970 pixels, 'train/bad/empty.png' is empty, 'train/bad/header only.png' is truncated: Truncated File "
        "Read, 'train/bad/new\\nline \\x1b[2J.png' is no image that can be read (none of JPEG, PNG, WEBP, BMP, GIF, "
        "TIFF, PPM) and 8 others; all of them in "
    )
    assert file.startswith("skipped    ")
    assert len(Path(file.removeprefix("skipped    ")).read_text().splitlines()) == len(kinds.skipped)
    assert prepared.startswith("prepared   ")
    assert written == f"sheet      {sheet}"


def test_data_show_keeps_wild_names_of_classes_on_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wild = ["a\nb", "\x1b[31mred", os.fsdecode(b"\xff"), "größe", "[bold]"]
    root = write(
        tmp_path / "i", *(f"{split}/{name}/{n}.png" for name in wild for split in ("train", "test") for n in "12")
    )
    sheet = f"--out={tmp_path / 'sheet.png'}"
    assert main(["data", "show", str(root), f"--data.cache-dir={tmp_path / 'cache'}", sheet]) == 0
    out, _ = capsys.readouterr()
    assert all(line.isprintable() for line in out.splitlines())
    rows = [line.split() for line in out.splitlines()[1:7]]
    assert rows == [
        ["label", "train", "test"],
        ["\\x1b[31mred", "2", "2"],
        ["[bold]", "2", "2"],
        ["a", "b", "2", "2"],
        ["größe", "2", "2"],
        ["\\udcff", "2", "2"],
    ]


def test_too_many_unusable_files_are_refused_by_name(all_kinds: tuple[Path, Zoo], tmp_path: Path) -> None:
    root, _ = all_kinds
    with pytest.raises(
        UserError, match=r"13 of 36 images cannot be used: 'train/0 pipe.png' is a pipe .* and 8 others"
    ):
        opened(root, tmp_path)


def test_a_data_set_of_which_more_was_allowed_to_be_skipped_is_refused_as_well(
    all_kinds: tuple[Path, Zoo], tmp_path: Path
) -> None:
    root, _ = all_kinds
    opened(root, tmp_path, max_skipped_fraction=0.5)
    with pytest.raises(UserError, match=r"13 of 36 images cannot be used.*--data.max-skipped-fraction \(now 0.1\)"):
        opened(root, tmp_path, max_skipped_fraction=0.1)


def test_a_file_that_fails_while_it_is_read_is_skipped_with_the_systems_reason(tmp_path: Path) -> None:
    root = write(tmp_path / "images", *numbered("", 9))
    (root / "fails.png").symlink_to("/proc/self/mem")  # a file for stat; no page is mapped at 0
    dataset = opened(root, tmp_path / "cache", max_skipped_fraction=0.1)
    assert skipped_of(dataset) == {"fails.png": "cannot be read (Input/output error)"}


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that another user can use too."""
    directory = Path("/tmp") / f"vae-ray-open-{os.getpid()}-{time.monotonic_ns()}"
    directory.mkdir(mode=0o777)
    directory.chmod(0o777)
    yield directory
    shutil.rmtree(directory)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Root reads files without permission: be somebody else for the body."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_a_file_without_permission_is_skipped_and_a_folder_refused(open_directory: Path) -> None:
    root = write(open_directory / "images", *numbered("cats/", 9), *numbered("dogs/", 3))
    opened(root, open_directory / "first")  # imports all that nobody may not read where root has installed it
    (root / "cats" / "000.png").chmod(0)
    with as_nobody():
        dataset = opened(root, open_directory / "cache", max_skipped_fraction=0.1)
        assert skipped_of(dataset) == {"cats/000.png": "cannot be read (Permission denied)"}
        shutil.rmtree(open_directory / "cache")
    for folder in (root / "dogs", root):
        folder.chmod(0)
        with as_nobody(), pytest.raises(UserError, match=r"^data.root: \S+ cannot be read \(Permission denied\)"):
            opened(root, open_directory / "cache")
        folder.chmod(0o755)


# --- layouts --------------------------------------------------------------------------------------------


def test_a_flat_folder_has_no_labels_and_is_split_by_content(tmp_path: Path) -> None:
    dataset = opened(write(tmp_path / "flat", *numbered("", 200)), tmp_path / "cache", test_fraction=0.25)
    assert dataset.splits.keys() == {"train", "test"}
    assert sum(map(len, dataset.splits.values())) == 200
    # 4.5 standard deviations of a binomial distribution
    assert abs(len(dataset.splits["test"]) - 50) < 4.5 * (200 * 0.25 * 0.75) ** 0.5
    assert dataset.splits["train"].names == {}


def test_class_folders_are_labels_in_the_order_of_their_names(tmp_path: Path) -> None:
    root = write(tmp_path / "classes", *numbered("dogs/", 30), *numbered("Cats/", 20), *numbered("ü/deeper/still/", 9))
    dataset = opened(root, tmp_path / "cache")
    assert dataset.splits["train"].names == {"label": ["Cats", "dogs", "ü"]}
    counts = [split.counts()["label"] for split in dataset.splits.values()]
    assert [sum(each[name] for each in counts) for name in ("Cats", "dogs", "ü")] == [20, 30, 9]
    images = np.concatenate([pixels(dataset, split) for split in dataset.splits])
    assert len({image.tobytes() for image in images}) == 59


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Train", "valid", "testing"), ("TRAINING", "dev", "Test")]
)
@pytest.mark.parametrize("above", ["", "only/folder/"])
def test_split_folders_are_splits(names: tuple[str, str, str], above: str, tmp_path: Path) -> None:
    train, val, test = (f"{above}{name}/" for name in names)
    root = write(tmp_path / "flat", *numbered(train, 5), *numbered(val, 3), *numbered(test, 4))
    sizes = {name: len(split) for name, split in opened(root, tmp_path / "cache").splits.items()}
    assert sizes == {"train": 5, "val": 3, "test": 4}
    classes = write(
        tmp_path / "classes",
        *(name for split in (train, val, test) for label in "ba" for name in numbered(f"{split}{label}/", 2)),
        *numbered(f"{test}c/deeper/", 3),
    )
    dataset = opened(classes, tmp_path / "cache")
    assert {name: split.counts()["label"] for name, split in dataset.splits.items()} == {
        "train": {"a": 2, "b": 2, "c": 0},
        "val": {"a": 2, "b": 2, "c": 0},
        "test": {"a": 2, "b": 2, "c": 3},
    }


def test_one_folder_that_holds_everything_is_no_class(tmp_path: Path) -> None:
    flat = opened(write(tmp_path / "a", *numbered("photos/2024/", 8)), tmp_path / "cache")
    assert flat.splits["train"].names == {}
    classes = opened(write(tmp_path / "b", *numbered("photos/x/", 8), *numbered("photos/y/", 8)), tmp_path / "cache")
    assert classes.splits["train"].names == {"label": ["x", "y"]}


def test_a_folder_train_alone_is_no_split(tmp_path: Path) -> None:
    dataset = opened(write(tmp_path / "a", *numbered("train/x/", 8), *numbered("train/y/", 8)), tmp_path / "cache")
    assert dataset.splits.keys() == {"train", "test"}
    assert dataset.splits["train"].names == {"label": ["x", "y"]}


def test_class_folders_without_images_are_named(tmp_path: Path) -> None:
    root = write(tmp_path / "a", *numbered("train/x/", 4), *numbered("test/x/", 4), *numbered("train/y/", 4))
    write(root, "train/new\nline/", "test/y/", "test/.hidden/", "train/x/deeper/")
    (root / "train" / "new\nline" / "notes.txt").write_text("soon")
    assert opened(root, tmp_path / "cache").description.warnings == [
        "the class folder test/y/ has no images",
        "the class folder train/new line/ has no images",
    ]


def test_images_beside_class_folders_are_told(tmp_path: Path) -> None:
    dataset = opened(write(tmp_path / "a", *numbered("x/", 8), *numbered("y/", 8), "stray.png"), tmp_path / "cache")
    assert dataset.splits["train"].names == {}
    assert dataset.description.warnings == ["1 of 17 images lie beside folders, which are thus not taken for classes"]


@pytest.mark.parametrize(("name", "said"), [("other/x.png", "other/"), ("stray.png", "files")])
def test_split_folders_beside_others_are_refused(name: str, said: str, tmp_path: Path) -> None:
    root = write(tmp_path / "a", *numbered("train/", 4), *numbered("test/", 4), name)
    with pytest.raises(UserError, match=rf"has images in test/, train/ and beside them in {said}; move"):
        opened(root, tmp_path / "cache")


def test_test_images_are_set_aside_from_train_where_there_are_train_and_val(tmp_path: Path) -> None:
    root = write(tmp_path / "a", *numbered("train/", 30), *numbered("val/", 4))
    splits = opened(root, tmp_path / "cache").splits
    assert len(splits["train"]) + len(splits["test"]) == 30
    assert (len(splits["test"]) > 0, len(splits["val"])) == (True, 4)


def test_splits_without_train_images_are_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "a", *numbered("test/", 4), *numbered("val/", 4))
    with pytest.raises(UserError, match=r"has val and test images but no train images; should have both"):
        opened(root, tmp_path / "cache")


def images_run(root: Path, storage: Path, **overrides: Any) -> list[str]:
    settings = {
        "data.root": root,
        "data.image-size": 8,
        "data.cache-dir": storage / "cache",
        "model.network.hidden": 8,
        "model.latent-dim": 2,
        "training.epochs": 1,
        "training.global-batch-size": 4,
        "workers.num": 0,
        "workers.cpus": 1,
        **{key.replace("__", "."): value for key, value in overrides.items()},
    }
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    return ["train", "images", "--name", "run", "--storage", str(storage / "runs"), *arguments]


def test_an_own_validation_split_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(
        tmp_path / "a",
        *numbered("train/", 20),
        *numbered(
            "val/",
            7,
        ),
        *numbered("test/", 5),
    )
    assert main(images_run(root, tmp_path)) == 0
    experiment = Experiment.from_file(tmp_path / "runs" / "run" / "experiment.yaml")
    assert experiment.data.num_validation == 7
    model = TrainedVAE.load(tmp_path / "runs" / "run")
    (record,) = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert model.evaluate("val")["val/nelbo"] == pytest.approx(record["val/nelbo"], rel=1e-5)
    capsys.readouterr()
    assert main([*images_run(root, tmp_path / "other"), "--data.num-validation=5"]) == 2
    assert capsys.readouterr().err == (
        "vae-ray: data.num_validation: got 5, but the images have a validation split of 7, which is used; leave it "
        "out\n"
    )
    assert not list((tmp_path / "other" / "runs").glob("*"))


# --- archives -------------------------------------------------------------------------------------------


def packed_zip(root: Path, archive: Path, *, prefix: str = "") -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        for path in sorted(root.rglob("*"), reverse=True):
            target.write(path, f"{prefix}{path.relative_to(root)}")
    return archive


def packed_tar(root: Path, archive: Path, mode: Any = "w") -> Path:
    with tarfile.open(archive, mode) as target:
        target.add(root, arcname=".")
    return archive


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = write(tmp_path / "tree", *numbered("train/x/", 9), *numbered("train/y/", 8), *numbered("test/y/", 7))
    (root / "train" / "x" / "bad.png").write_bytes(b"")
    (root / "train" / "x" / ".DS_Store").write_bytes(b"")
    return root


def members(archive: Path) -> set[str]:
    return {path.name for path in archive.parent.rglob("*")}


@pytest.mark.parametrize("kind", ["zip", "zip with ./", "zip in a folder", "tar"])
def test_an_archive_is_equal_to_the_folder_and_never_extracted(kind: str, tree: Path, tmp_path: Path) -> None:
    expected = opened(tree, tmp_path / "cache", max_skipped_fraction=0.1)
    (tmp_path / "archives").mkdir()
    file = tmp_path / "archives" / f"images.{kind[:3]}"
    prefix = {"zip with ./": "./", "zip in a folder": "tree/"}.get(kind, "")
    archive = packed_tar(tree, file) if kind == "tar" else packed_zip(tree, file, prefix=prefix)
    if prefix == "tree/":  # as macOS writes it
        with zipfile.ZipFile(archive, "a") as target:
            target.writestr("__MACOSX/tree/train/x/._000.png", b"resource fork")
    before = members(archive)
    dataset = opened(archive, tmp_path / "cache", max_skipped_fraction=0.1)
    assert equal(dataset, expected)
    (name,) = skipped_of(dataset)
    assert name.endswith("train/x/bad.png")
    assert dataset.description.warnings == [
        warning.replace("'train", f"'{prefix.removeprefix('./')}train") for warning in expected.description.warnings
    ]
    assert members(archive) == before
    assert all(path.suffix != ".png" for path in dataset.directory.rglob("*"))


def test_the_zoo_in_archives_is_that_of_the_folder(tmp_path: Path) -> None:
    kinds = zoo.write_files(tmp_path / "zoo")
    # a zip holds no names that are not UTF-8
    for name in [name for name in (*kinds.readable, *kinds.skipped) if not name.isascii() and "\\udc" in ascii(name)]:
        (tmp_path / "zoo" / "train" / name).unlink()
        kinds.readable.pop(name, None)
        kinds.skipped.pop(name, None)
    archives = packed_zip(tmp_path / "zoo", tmp_path / "a.zip"), packed_tar(tmp_path / "zoo", tmp_path / "a.tar")
    for archive in archives:
        assert_is_zoo(opened(archive, tmp_path / "cache", max_skipped_fraction=0.5), kinds)


def test_names_outside_of_an_archive_are_ignored_and_written_nowhere(tmp_path: Path) -> None:
    here = tmp_path / "a" / "b"
    here.mkdir(parents=True)
    names = ["../up.png", "/abs.png", "x/../../up too.png", f"{tmp_path}/abs too.png"]
    with zipfile.ZipFile(here / "a.zip", "w") as archive:
        for number, name in enumerate([*names, *numbered("", 5)]):
            archive.writestr(name, plain((number, 0, 0)))
    with tarfile.open(here / "a.tar", "w") as tar:
        for number, name in enumerate([*names, *numbered("", 5)]):
            content = plain((number, 0, 0))
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    for name in ("a.zip", "a.tar"):
        dataset = opened(here / name, tmp_path / "cache")
        assert "5 .png; ignored 4 outside of the archive)" in dataset.describe()
        levels = {int(image[0, 0, 0]) for split in dataset.splits for image in pixels(dataset, split)}
        assert levels == {4, 5, 6, 7, 8}
    assert not list(tmp_path.rglob("*.png"))
    assert not Path("/abs.png").exists()


def test_links_and_devices_in_archives_are_skipped_by_name(tmp_path: Path) -> None:
    root = write(tmp_path / "images", *numbered("", 5))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(root, arcname=".")
        for name, kind in (
            ("soft.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("pipe.png", tarfile.FIFOTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    assert skipped_of(opened(tmp_path / "a.tar", tmp_path / "cache", max_skipped_fraction=0.5)) == {
        "hard.png": "is a link, which is not followed in an archive",
        "pipe.png": "is a pipe, a device or a sparse file",
        "soft.png": "is a link, which is not followed in an archive",
    }
    with zipfile.ZipFile(packed_zip(root, tmp_path / "a.zip"), "a") as archive:
        link = zipfile.ZipInfo("soft.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    assert skipped_of(opened(tmp_path / "a.zip", tmp_path / "cache", max_skipped_fraction=0.5)) == {
        "soft.png": "is a link, which is not followed in an archive"
    }


def test_damaged_encrypted_and_compressed_archives_are_refused(tree: Path, tmp_path: Path) -> None:
    whole = packed_zip(tree, tmp_path / "whole.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.zip").write_bytes(b"")
    (tmp_path / "text.tar").write_text("words " * 1000)
    (tmp_path / "empty.tar").write_bytes(b"")
    encrypted = bytearray(whole)
    for match in re.finditer(rb"PK\x01\x02", whole):  # the flag of each member in the directory
        encrypted[match.start() + 8] |= 1
    (tmp_path / "encrypted.zip").write_bytes(encrypted)
    for mode in ("gz", "bz2", "xz"):
        packed_tar(tree, tmp_path / f"a.tar.{mode}", f"w:{mode}")
    refusals = {
        "cut.zip": r"cut.zip cannot be read as a .zip \(File is not a zip file\)",
        "empty.zip": r"empty.zip cannot be read as a .zip",
        "text.tar": r"text.tar cannot be read as a .tar",
        "empty.tar": r"empty.tar cannot be read as a .tar",
        "encrypted.zip": r"at least 18 of 25 images cannot be used: 'train/x/000.png' is encrypted, .* others",
        **{
            f"a.tar.{mode}": rf"a.tar.{mode} cannot be read as a .tar .* compressed one cannot be read in parts"
            for mode in ("gz", "bz2", "xz")
        },
    }
    for name, expected in refusals.items():
        with pytest.raises(UserError, match=f"^data.root: .*{expected}") as refusal:
            opened(tmp_path / name, tmp_path / "cache")
        assert "\n" not in str(refusal.value)


def test_damaged_members_of_archives_are_skipped(tree: Path, tmp_path: Path) -> None:
    (tree / "train" / "x" / "bad.png").unlink()
    whole = bytearray(packed_zip(tree, tmp_path / "a.zip").read_bytes())
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        member = archive.getinfo("train/y/003.png")
    whole[member.header_offset + 30 + len(member.filename) + member.compress_size // 2] ^= 0xFF
    (tmp_path / "a.zip").write_bytes(whole)
    (name, reason), *others = skipped_of(opened(tmp_path / "a.zip", tmp_path / "c", max_skipped_fraction=0.1)).items()
    assert (name, others) == ("train/y/003.png", [])
    assert reason.startswith("cannot be read (")


def test_an_archive_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    """A tar whose members have equal names, sizes and times: as reproducible builds write them."""
    for number in (1, 2):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for row in range(4):
                content = plain((row, 0, number), "BMP")
                member = tarfile.TarInfo(f"{row}.bmp")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for row in range(4):
                archive.writestr(zipfile.ZipInfo(f"{row}.bmp"), plain((row, 0, number), "BMP"))
        for name in ("a.tar", "a.zip"):
            dataset = opened(tmp_path / name, tmp_path / "cache")
            assert set(pixels(dataset, "train")[:, 2, 0, 0].tolist()) == {number}


# --- few images, and none -------------------------------------------------------------------------------


def test_few_images_are_never_without_a_test_image_or_refused(tmp_path: Path) -> None:
    for num in (2, 3):
        dataset = opened(write(tmp_path / str(num), *numbered("", num)), tmp_path / "cache", test_fraction=0.01)
        assert {name: len(split) for name, split in dataset.splits.items()} == {"train": num - 1, "test": 1}
    with pytest.raises(UserError, match=r"one \(folder of 1 .png\) has one usable image; at least 2 are needed"):
        opened(write(tmp_path / "one", "x.png"), tmp_path / "cache")
    with pytest.raises(UserError, match=r"none has no images, it has nothing; should have .jpg"):
        opened(write(tmp_path / "none", "empty/"), tmp_path / "cache")


def test_the_one_usable_image_is_told_with_what_is_wrong_with_the_others(tmp_path: Path) -> None:
    root = write(tmp_path / "a", "1.png")
    (root / "2.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"has one usable image; at least 2 are needed, .*; '2.png' is empty$"):
        opened(root, tmp_path / "cache", max_skipped_fraction=1)


@pytest.mark.parametrize("max_bytes", [1, 700, 1 << 24])
def test_sums_are_those_of_the_images_of_parts_of_any_number_of_rows(
    max_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of grey and of colour, in parts of one image, of a few, and in one part; nothing else is left."""
    monkeypatch.setattr("vae_ray.data.preparation.LARGE_SET_SHARD_BYTES", max_bytes)
    root = write(tmp_path / "a", *numbered("train/c", 40), *numbered("test/c", 40))
    for number in range(30):
        (root / "train" / f"a{number}.png").write_bytes(png(np.full((1, 6, 5), 255 - number, np.uint8)))
    dataset = opened(root, tmp_path / "cache")
    for split in ("train", "test"):
        expected = pixels(dataset, split).sum(0, dtype=np.int64)
        assert np.array_equal(dataset.sum_of_images(split).numpy(), expected)
    names = {path.name for path in dataset.directory.iterdir()}
    assert names == {"dataset.json", *(file.name for file in dataset.description.files)}


def test_duplicates_in_train_and_test_are_counted(tmp_path: Path) -> None:
    root = write(
        tmp_path / "a",
        *numbered("train/", 12),
        *numbered(
            "test/",
            5,
        ),
        seed=3,
    )
    for name in ("001", "002", "004"):
        shutil.copyfile(root / "train" / f"{name}.png", root / "test" / f"{name}.png")
    (warning,) = opened(root, tmp_path / "cache").description.warnings
    assert warning.startswith("3 of the 5 test images are training images too, pixel by pixel")


def test_equal_images_are_in_one_split(tmp_path: Path) -> None:
    root = write(tmp_path / "a", *numbered("", 40))
    for name in numbered("", 40):
        shutil.copyfile(root / name, root / f"copy of {name}")
    dataset = opened(root, tmp_path / "cache", test_fraction=0.3)
    assert dataset.description.warnings == []
    assert len(dataset.splits["test"]) % 2 == 0
    assert 0 < len(dataset.splits["test"]) < 40


def test_several_sizes_are_refused_with_their_numbers_unless_one_is_given(tmp_path: Path) -> None:
    root = write(tmp_path / "a", *numbered("", 5))
    for number, shape in enumerate([(3, 4, 9)] * 3 + [(1, 7, 7)]):
        (root / f"other{number}.png").write_bytes(png(np.full(shape, number, np.uint8)))
    with pytest.raises(UserError, match=r"\(height x width\): 6x5 \(5\), 4x9 \(3\), 7x7 \(1\); give one, for example"):
        opened(root, tmp_path / "cache")
    dataset = opened(root, tmp_path / "cache", image_size=(3, 5))
    assert dataset.description.image_shape == (3, 3, 5)


# --- the cache ------------------------------------------------------------------------------------------


def keys_of(root: Path, cache: Path, **settings: Any) -> str:
    return opened(root, cache, **settings).description.key


def test_a_change_of_any_file_makes_a_new_data_set(tmp_path: Path) -> None:
    root, cache = write(tmp_path / "a", *numbered("", 12)), tmp_path / "cache"
    keys = [keys_of(root, cache)]
    assert keys_of(root, cache) == keys[0]
    assert len(list(cache.glob("a-*/"))) == 1
    status = (root / "003.png").stat()
    (root / "003.png").write_bytes(plain((1, 1, 200)))
    keys.append(keys_of(root, cache, image_size=6))
    (root / "003.png").write_bytes(plain((1, 1, 201)))
    keys.append(keys_of(root, cache, image_size=6))
    os.utime(root / "005.png", ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    keys.append(keys_of(root, cache, image_size=6))
    write(root, "new.png", seed=9)
    keys.append(keys_of(root, cache, image_size=6))
    (root / "007.png").rename(root / "renamed.png")
    keys.append(keys_of(root, cache, image_size=6))
    (root / "renamed.png").unlink()
    keys.append(keys_of(root, cache, image_size=6))
    assert len(set(keys)) == 7
    (root / "notes.txt").write_text("no image")
    assert keys_of(root, cache, image_size=6) == keys[-1]


def test_every_key_that_changes_pixels_makes_a_new_data_set_and_no_other_does(tmp_path: Path) -> None:
    root, cache = write(tmp_path / "a", *numbered("", 12)), tmp_path / "cache"
    base: dict[str, Any] = {"image_size": 6}
    changed = [
        {"image_size": 4},
        {"image_size": (6, 4)},
        {"fit": "pad"},
        {"channels": 1},
        {"channels": 3},
        {"background": "black"},
        {"background": "#102030"},
        {"value_range": (0, 300)},
        {"test_fraction": 0.5},
    ]
    keys = [keys_of(root, cache, **base | change) for change in ({}, *changed)]
    assert len(set(keys)) == len(changed) + 1
    others = [{"max_skipped_fraction": 0.5}, {"num_validation": 3}, {"augment": "flip"}, {"binarize": "dynamic"}]
    assert {keys_of(root, cache, **base | change) for change in others} == {keys[0]}
    assert len(list(cache.glob("a-*/"))) == len(set(keys))


def test_an_image_keeps_its_split_when_others_are_added(tmp_path: Path) -> None:
    root = write(tmp_path / "a", *numbered("m", 60))
    before = opened(root, tmp_path / "cache", test_fraction=0.3)
    write(root, *numbered("a", 30), *numbered("z", 30), seed=1)
    (root / "m000.png").rename(root / "q.png")
    after = opened(root, tmp_path / "cache", test_fraction=0.3)
    for split in ("train", "test"):
        small, large = (set(dataset.splits[split].digests.tolist()) for dataset in (before, after))
        assert small < large


def test_data_clean_removes_what_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    old, used = (opened(write(tmp_path / name, *numbered("", 5), seed=n), cache) for n, name in enumerate("ab"))
    unfinished = opened(write(tmp_path / "c.d", *numbered("", 5), seed=7), cache).directory
    (unfinished / "dataset.json").unlink()
    foreign = cache / "my own files"
    foreign.mkdir()
    os.utime(old.directory, (time.time() - 31 * 86_400,) * 2)
    command = ["data", "clean", f"--data.cache-dir={cache}"]
    assert main([*command, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer["deleted"]) == {str(old.directory), str(unfinished)}
    assert answer["kept"] == [str(used.directory)]
    assert not old.directory.exists()
    assert not unfinished.exists()
    assert foreign.exists()
    assert main([*command, "--unused-days", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["kept", "cache"]
    assert main([*command, "--unused-days", "0"]) == 0
    assert capsys.readouterr().out.startswith(f"deleted    {used.directory} (")
    assert not list(cache.glob("*-*"))
    assert equal(opened(tmp_path / "b", cache), used)
    assert opened(tmp_path / "a", cache).splits["train"].fingerprint == old.splits["train"].fingerprint


# --- an object store ------------------------------------------------------------------------------------


def test_a_folder_at_a_uri_is_equal_to_the_local_one(store: ObjectStore, tree: Path, tmp_path: Path) -> None:
    write(tree, "test/x/größe 猫 and spaces.png", seed=4)
    pyarrow.fs.copy_files(str(tree), f"{BUCKET}/{tree.name}", destination_filesystem=filesystem())
    expected = opened(tree, tmp_path / "cache", max_skipped_fraction=0.1)
    dataset = opened(f"s3://{BUCKET}/{tree.name}", tmp_path / "cache", max_skipped_fraction=0.1)
    assert equal(dataset, expected)
    assert skipped_of(dataset) == skipped_of(expected)
    with pytest.raises(UserError, match=r"nothing has no images"):
        opened(f"s3://{BUCKET}/nothing", tmp_path / "cache")


# --- mistakes on the command line -----------------------------------------------------------------------


ONE_LINE = [
    ("EMPTY", "EMPTY has no images, it has nothing; should have .jpg, .png, .tif or the like"),
    ("TEXTS", "TEXTS has no images, it has 2 .txt, 1 hidden; should have .jpg, .png, .tif or the like"),
    ("ONE", "ONE (folder of 1 .png) has one usable image; at least 2 are needed, one to test with"),
    ("FEW", "training.global_batch_size: got 4, should be at most the 2 training images"),
    ("ABSENT", "ABSENT', which does not exist; should be a folder or a file of images"),
    ("TEXTS/1.txt", "TEXTS/1.txt is a file of no known kind; should be a folder of images"),
    (None, "data.root: is missing, data.source auto needs it; for example --data.root photos/"),
    ("", "data.root: got ''"),
    ("s3:/x", "data.root: got 's3:/x', should begin with s3:// if it is a URI"),
]


@pytest.mark.parametrize(("root", "said"), ONE_LINE)
def test_what_cannot_be_trained_on_is_one_line_and_leaves_nothing(
    root: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "EMPTY/", "ONE/x.png", *numbered("FEW/", 3))
    (tmp_path / "TEXTS").mkdir()
    for name in ("1.txt", "2.txt", ".hidden"):
        (tmp_path / "TEXTS" / name).write_text("words")
    arguments = [each for each in images_run(Path("X"), tmp_path) if not each.startswith("--data.root")]
    assert main([*arguments, *([] if root is None else [f"--data.root={root}"])]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vae-ray: ")
    assert err.count("\n") == 1
    assert said in err
    assert not list((tmp_path / "runs").glob("*"))


DATA_MISTAKES = [
    (["show"], "data.root: is missing"),
    (["show", "ABSENT"], "data.root: got 'ABSENT', which does not exist"),
    (["show", "x" * 5000], "cannot be read (File name too long)"),
    (["show", "PHOTOS", "--data.root=ONE"], "--data.root: got 'ONE' beside ROOT 'PHOTOS'; give one"),
    (["show", "PHOTOS", "--image-size=8"], "did you mean 'data.image_size'?"),
    (["show", "PHOTOS", "--optim.lr=1"], "vae-ray data takes the keys --data.KEY"),
    (["show", "PHOTOS", "--out=x.jpg"], "--out: got 'x.jpg', should end in .png"),
    (["show", "PHOTOS", "--unused-days=3"], "argument --unused-days: is not one of data show; clean has it"),
    (["show", "PHOTOS", "--data.cache-dir=ONE/x.png"], "data.cache_dir"),
    (["show", "PHOTOS", "--data.images=x"], "data.images: names an array or a column, but PHOTOS is a folder"),
    (["show", "PHOTOS", "--data.source=prepared"], "no prepared data set, it has no dataset.json"),
    (["show", "s3://"], "data.root: got 's3://', which names no bucket; should be for example s3://BUCKET/images"),
    (["prepare", "PHOTOS"], "--out: is missing"),
    (["prepare", "ABSENT", "--out=p"], "data.root: got 'ABSENT', which does not exist"),
    (["prepare", "PHOTOS", "--out=PHOTOS"], "PHOTOS', which has other files (000.png, ...); choose a new directory"),
    (["prepare", "PHOTOS", "--out=ONE/x.png/y"], "cannot be written (Not a directory); make it writable, or choose"),
    (["prepare", "PHOTOS", "--data.source=prepared", "--out=p"], "data.source: got 'prepared', but PHOTOS has to be"),
    (["clean", "PHOTOS"], "argument 'PHOTOS': vae-ray data clean takes no ROOT"),
    (["clean", "--out=x"], "argument --out: is not one of data clean; show and prepare have it"),
    (["clean", "--unused-days=-1"], "got '-1', should be a whole number, at least 0"),
    (["clean", "--data.cache-dir=ONE/x.png"], "ONE/x.png is a file, should be a directory"),
]


@pytest.mark.parametrize(
    ("arguments", "said"), DATA_MISTAKES, ids=lambda each: " ".join(each)[:60] if isinstance(each, list) else ""
)
def test_a_mistake_with_vae_ray_data_is_one_line_and_leaves_nothing(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "ONE/x.png", *numbered("PHOTOS/", 3))
    before = sorted(tmp_path.rglob("*"))
    assert main(["data", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_given_in_place_of_an_experiment_are_told_where_they_belong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, *numbered("PHOTOS/", 3))
    for arguments, said in (
        (["train", "PHOTOS"], "experiment 'PHOTOS': is a directory; for images there, use images --data.root PHOTOS"),
        (["train", "images", "PHOTOS"], "argument 'PHOTOS' does not exist; for images there, use --data.root PHOTOS"),
        (["train", "digits", "--data.root=PHOTOS"], "have; for example --data.source auto"),
    ):
        assert main(arguments) == 2
        assert said in capsys.readouterr().err


def test_what_is_prepared_is_not_prepared_again_nor_over_anything_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, *numbered("PHOTOS/", 9))
    command = ["data", "prepare", "PHOTOS", "--out=p", "--data.cache-dir=cache"]
    assert [main(command), main(command)] == [0, 0]
    *_, last = capsys.readouterr().out.splitlines()
    assert last.split("  ")[-1].strip() == "vae-ray train images --data.root p"
    content = {path: path.read_bytes() for path in (tmp_path / "p").iterdir()}
    for arguments, said in (
        ([*command, "--data.image-size=8"], "which has another data set; choose a new directory, or delete it"),
        (["data", "prepare", "p", "--out=q"], "data.root: p is prepared already; train with --data.root p"),
    ):
        assert main(arguments) == 2
        assert said in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "p").iterdir()} == content
    assert not (tmp_path / "q").exists()
    assert main(["data", "show", "p", "--data.image-size=8"]) == 2
    assert "data.image_size: got 8, but p was prepared with 64; prepare the images again" in capsys.readouterr().err
    assert main(["data", "show", "p", "--data.image-size=64"]) == 0
