"""Truth: the same 200 images in every form that a source reads are one data set: pixels, splits, epochs and metrics."""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from tests.conftest import MNIST_ROOT
from tests.data_layer.labelled_pictures import png
from tests.runs import computed
from tests.storage.servers import BUCKET, ObjectStore
from vae_ray import Experiment, UserError, train
from vae_ray.data import cache as dataset_cache
from vae_ray.data import processes
from vae_ray.data.batches import Shards
from vae_ray.data.cache import open_dataset
from vae_ray.data.decoding import ImageRules, decode_image
from vae_ray.data.preparation import PartRecord, Task
from vae_ray.data.processes import run_tasks
from vae_ray.data.splits import Splits
from vae_ray.runs.prepare import prepare

CIFAR10 = MNIST_ROOT / "cifar10-jpeg" / "train"
NUM, NUM_CLASSES = 200, 4
CPU = torch.device("cpu")


class Pictures(NamedTuple):
    files: dict[str, bytes]
    """By path, in order: CLASS/NAME.png."""
    pixels: NDArray[np.uint8]
    """`(200, 3, H, W)`."""
    label: NDArray[np.int64]
    classes: list[str]


def _pictures(files: dict[str, bytes]) -> Pictures:
    classes = sorted({name.partition("/")[0] for name in files})
    label = np.array([classes.index(name.partition("/")[0]) for name in files])
    pixels = np.stack([decode_image(content, ImageRules(channels=3)) for content in files.values()])
    return Pictures(files, pixels, label, classes)


def synthetic() -> Pictures:
    """200 x 3 x 6 x 9 of noise as PNG."""
    noise = np.random.default_rng(11).integers(0, 256, (NUM, 3, 6, 9), dtype=np.uint8)
    names = [f"{'bdca'[row % NUM_CLASSES]}/{row:03d}.png" for row in range(NUM)]
    return _pictures({names[row]: png(noise[row]) for row in np.argsort(names)})


def cifar10() -> Pictures:
    """Fifty JPEGs of each of four classes of CIFAR-10; skips the test where they are absent."""
    folders = sorted(path for path in CIFAR10.glob("*") if path.is_dir())[:NUM_CLASSES]
    paths = [path for folder in folders for path in sorted(folder.glob("*.jpg"))[: NUM // NUM_CLASSES]]
    if len(paths) < NUM:
        pytest.skip("needs ../shared/data/cifar10-jpeg, which is absent")
    return _pictures({f"{path.parent.name}/{path.name}": path.read_bytes() for path in paths})


@pytest.fixture(scope="module", params=[synthetic, cifar10], ids=lambda function: function.__name__)
def pictures(request: pytest.FixtureRequest) -> Pictures:
    """The images of every test."""
    found: Pictures = request.param()
    assert len(found.files) == NUM
    return found


# --- the forms ------------------------------------------------------------------------------------------


def folder(pictures: Pictures, place: Path) -> Path:
    for name, content in pictures.files.items():
        (place / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "images" / name).write_bytes(content)
    return place / "images"


def zipped(pictures: Pictures, place: Path) -> Path:
    with zipfile.ZipFile(place / "images.zip", "w") as archive:
        for name, content in pictures.files.items():
            archive.writestr(name, content)
    return place / "images.zip"


def tarred(pictures: Pictures, place: Path) -> Path:
    with tarfile.open(place / "images.tar", "w") as archive:
        for name, content in pictures.files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return place / "images.tar"


def texts(pictures: Pictures) -> NDArray[np.str_]:
    return np.array(pictures.classes)[pictures.label]


def npz(pictures: Pictures, place: Path) -> Path:
    """Channels last, with the names of the classes as labels."""
    np.savez(place / "images.npz", images=np.moveaxis(pictures.pixels, 1, 3), labels=texts(pictures))
    return place / "images.npz"


def npy(pictures: Pictures, place: Path) -> Path:
    np.save(place / "images.npy", pictures.pixels)
    return place / "images.npy"


def hdf5(pictures: Pictures, place: Path) -> Path:
    h5py = pytest.importorskip("h5py")
    with h5py.File(place / "images.h5", "w") as file:
        file["images"], file["labels"] = pictures.pixels, texts(pictures).astype("S")
    return place / "images.h5"


def parquet(column: Callable[[Pictures], pa.Array]) -> Callable[[Pictures, Path], Path]:
    def written(pictures: Pictures, place: Path) -> Path:
        table = pa.table({"image": column(pictures), "label": pa.array(texts(pictures).tolist())})
        pyarrow.parquet.write_table(table, place / "images.parquet", row_group_size=37)
        return place / "images.parquet"

    return written


def structs(pictures: Pictures) -> pa.Array:
    return pa.array([{"bytes": content, "path": name} for name, content in pictures.files.items()])


def binary(pictures: Pictures) -> pa.Array:
    return pa.array(list(pictures.files.values()))


def tensors(pictures: Pictures) -> pa.Array:
    flat = pa.array(pictures.pixels.reshape(-1))
    shape = pictures.pixels.shape[1:]
    storage = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(shape)))
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.uint8(), shape), storage)


def prepared(pictures: Pictures, place: Path) -> Path:
    prepare(folder(pictures, place), out=place / "prepared")
    return place / "prepared"


def in_memory(pictures: Pictures, place: Path) -> Path:
    prepare(images=pictures.pixels, labels=texts(pictures), out=place / "prepared")
    return place / "prepared"


FORMS: dict[str, Callable[[Pictures, Path], Path]] = {
    "folder": folder,
    "zip": zipped,
    "tar": tarred,
    "npz": npz,
    "npy": npy,
    "hdf5": hdf5,
    "parquet struct": parquet(structs),
    "parquet binary": parquet(binary),
    "parquet tensor": parquet(tensors),
    "prepared": prepared,
    "in memory": in_memory,
}
UNLABELLED = {"npy"}


def experiment(root: Path | str, place: Path, **data: Any) -> Experiment:
    """One epoch on images at `root`."""
    return Experiment.from_dict(
        {
            "data": {
                "source": "auto",
                "root": str(root),
                "num_validation": 23,
                "cache_dir": str(place / "cache"),
                **data,
            },
            "model": {"network": {"name": "mlp", "hidden": [16]}, "latent_dim": 3},
            "training": {"epochs": 1, "global_batch_size": 32},
            "workers": {"num": 0, "cpus": 1, "device": "cpu"},
            "run": {"storage": str(place / "runs"), "name": "run", "seed": 0},
        }
    )


class Content(NamedTuple):
    """What a run would see of a data set."""

    pixels: dict[str, NDArray[np.uint8]]
    fingerprints: dict[str, str]
    batches: list[NDArray[np.float32]]
    """Of the first epoch, then of the evaluation of each split."""
    labels: list[list[str]]
    """Names of the same images' classes; empty where the form has none."""


def content_of(experiment: Experiment) -> Content:
    splits = Splits.open(experiment)
    batches, labels = [], []
    names = splits.train.names.get("label", [])
    for split in ("train", "val", "test"):
        loader = splits.loader(split, experiment, Shards(0, 1, CPU))
        epoch = loader.training(0, global_batch_size=32) if split == "train" else loader.evaluation(batch_size=50)
        for batch in epoch:
            batches.append(batch.x.numpy())
            labels.append([names[code] for code in batch.labels["label"].tolist()] if names else [])
    pixels = {name: split.first(NUM).numpy() for name, split in splits.dataset.splits.items()}
    return Content(pixels, splits.fingerprints, batches, labels)


def assert_same_content(found: Content, expected: Content, *, is_labelled: bool = True) -> None:
    assert found.fingerprints == expected.fingerprints
    assert found.pixels.keys() == expected.pixels.keys()
    for split, pixels in expected.pixels.items():
        np.testing.assert_array_equal(found.pixels[split], pixels)
    assert len(found.batches) == len(expected.batches)
    for batch, other in zip(found.batches, expected.batches, strict=True):
        np.testing.assert_array_equal(batch, other)
    assert found.labels == (expected.labels if is_labelled else [[] for _ in expected.labels])


@pytest.fixture(scope="module")
def expected(pictures: Pictures, tmp_path_factory: pytest.TempPathFactory) -> Content:
    """That of the folder."""
    place = tmp_path_factory.mktemp("folder")
    return content_of(experiment(folder(pictures, place), place))


def test_the_folder_holds_the_images_in_the_order_of_their_names(pictures: Pictures, expected: Content) -> None:
    assert {name: len(pixels) for name, pixels in expected.pixels.items()}.keys() == {"train", "test"}
    rows = {image.tobytes(): row for row, image in enumerate(pictures.pixels)}
    assert len(rows) == NUM
    order = {name: [rows[image.tobytes()] for image in pixels] for name, pixels in expected.pixels.items()}
    assert all(numbers == sorted(numbers) for numbers in order.values())
    assert sorted(order["train"] + order["test"]) == list(range(NUM))
    # 4.5 standard deviations of a binomial distribution around a tenth
    assert abs(len(order["test"]) - 20) < 4.5 * (NUM * 0.1 * 0.9) ** 0.5
    for batch, labels in zip(expected.batches, expected.labels, strict=True):
        images = np.rint(batch * 255).astype(np.uint8)
        assert labels == [pictures.classes[pictures.label[rows[image.tobytes()]]] for image in images]


@pytest.mark.parametrize("form", [name for name in FORMS if name != "folder"])
def test_every_form_is_the_same_data_set(form: str, pictures: Pictures, expected: Content, tmp_path: Path) -> None:
    found = content_of(experiment(FORMS[form](pictures, tmp_path), tmp_path))
    assert_same_content(found, expected, is_labelled=form not in UNLABELLED)


def test_prepared_at_a_uri_is_the_same_data_set(
    store: ObjectStore, pictures: Pictures, expected: Content, tmp_path: Path
) -> None:
    uri = f"s3://{BUCKET}/prepared-{pictures.pixels.shape[-1]}"
    prepare(folder(pictures, tmp_path), out=uri)
    assert_same_content(content_of(experiment(uri, tmp_path)), expected)


def test_a_users_own_function_is_the_same_data_set(
    pictures: Pictures, expected: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"own_images_{pictures.pixels.shape[-1]}"
    np.save(tmp_path / "pixels.npy", pictures.pixels)
    np.save(tmp_path / "label.npy", pictures.label)
    (tmp_path / f"{name}.py").write_text(
        "import numpy as np\n\n\n"
        "def images(place):\n"
        "    pixels, label = np.load(place + '/pixels.npy'), np.load(place + '/label.npy')\n"
        "    for start in range(0, len(pixels), 37):\n"
        "        yield pixels[start : start + 37], label[start : start + 37]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    base = experiment(tmp_path, tmp_path).to_dict()
    data = {"source": f"{name}:images", "place": str(tmp_path), "num_validation": 23, "cache_dir": str(tmp_path / "c")}
    own = Experiment.from_dict({**base, "data": data})
    assert_same_content(content_of(own), expected, is_labelled=False)
    splits = Splits.open(own)
    for split in ("train", "test"):  # codes without names
        rows = {image.tobytes(): row for row, image in enumerate(pictures.pixels)}
        codes = [pictures.label[rows[image.tobytes()]] for image in expected.pixels[split]]
        assert splits.dataset.splits[split].columns["label"].tolist() == codes
    sys.modules.pop(name, None)


def test_a_run_on_three_forms_has_equal_metrics_to_the_bit(pictures: Pictures, tmp_path: Path) -> None:
    records = []
    for form in ("folder", "parquet struct", "in memory"):
        place = tmp_path / form
        place.mkdir()
        train(experiment(FORMS[form](pictures, place), place))
        records.append(computed(place / "runs" / "run"))
    assert records[0] == records[1] == records[2]
    assert {"train/nelbo", "val/nelbo", "test/nelbo"} <= records[0][0].keys()


PIXELS = np.zeros((6, 4, 5), np.uint8)
BY_SPLIT = {"train": PIXELS, "test": PIXELS}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"images": PIXELS, "labels": np.arange(5)}, r"^labels: got shape \(5,\) for 6 images, should be \(6,\)"),
        ({"images": [[1, 2], [3]]}, r"^images: got a list that is no array of numbers \(.*inhomogeneous"),
        ({"images": np.ma.masked_array(PIXELS, PIXELS > 3)}, r"^images: got a masked array"),
        ({"images": {"a": PIXELS}}, r"^images: got a dict with the keys \['a'\], should be an array, or a dict with"),
        (
            {"images": BY_SPLIT, "labels": np.arange(6)},
            r"^labels: got ndarray for images of the splits \['train', 'test'",
        ),
        (
            {"images": BY_SPLIT, "labels": {"train": np.arange(6)}},
            r"^labels: got a dict with the keys \['train'\] for images of the splits",
        ),
        ({}, r"^prepare: got root and images, or neither"),
    ],
)
def test_arrays_that_are_no_images_with_labels_are_refused(
    arguments: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said) as refusal:
        prepare(out=tmp_path / "out", **arguments)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_images_without_a_label_are_counted_nowhere(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 5), dtype=np.uint8)
    labels = np.array(["b", "a"] * 3)
    np.savez(tmp_path / "x.npz", train_images=images[:6], test_images=images[6:], train_labels=labels)
    dataset = open_dataset(experiment(tmp_path / "x.npz", tmp_path).data)
    assert dataset.splits["train"].counts() == {"label": {"a": 3, "b": 3}}
    assert dataset.splits["test"].counts() == {"label": {"a": 0, "b": 0}}


# --- random folders -------------------------------------------------------------------------------------

MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]
SIZES = st.integers(1, 11)
BACKGROUND = (0x10, 0x20, 0x30)
run_in_processes = processes._run_in_processes


def random_file(mode: str, height: int, width: int, seed: int) -> bytes:
    """A PNG of noise."""
    random = np.random.default_rng(seed)
    if mode == "I;16":
        picture = Image.fromarray(random.integers(0, 65536, (height, width)).astype(np.uint16))
    else:
        colours = Image.fromarray(random.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
        picture = colours.convert("RGB").convert(mode) if mode in ("1", "L", "P") else colours.convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


FOLDERS = given(
    st.lists(st.tuples(st.sampled_from(MODES), SIZES, SIZES), min_size=5, max_size=9),
    st.tuples(SIZES, SIZES),
    st.sampled_from(["crop", "pad", "stretch"]),
    st.sampled_from(["auto", 1, 3]),
)


def assert_prepared_is_decoded(
    place: Path, files: list[tuple[str, int, int]], rules: ImageRules, *, num_processes: int
) -> None:
    """Files that are training and test images, in parts of two, prepared by so many processes."""
    contents = [random_file(*each, seed) for seed, each in enumerate(files)]
    for number, content in enumerate(contents):
        for split in ("train", "test"):
            (place / "images" / split).mkdir(parents=True, exist_ok=True)
            (place / "images" / split / f"{number:02d}.png").write_bytes(content)
    pools: list[int] = []

    def in_processes(tasks: Iterator[Task], num: int) -> Iterator[PartRecord]:
        pools.append(num)
        return run_in_processes(tasks, num)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "ALONE_SECONDS", 0.0)
        patch.setattr("vae_ray.data.preparation.MIN_PART_ROWS", 2)
        patch.setattr(processes, "_run_in_processes", in_processes)
        patch.setattr(dataset_cache, "run_here", lambda tasks: run_tasks(tasks, num_processes=num_processes))
        keys = {"image_size": rules.size, "fit": rules.fit, "channels": rules.channels, "background": "#102030"}
        dataset = open_dataset(experiment(place / "images", place, **keys).data)
    assert pools == ([2] if num_processes == 2 else [])
    decoded = [decode_image(content, rules) for content in contents]
    shape = dataset.description.image_shape
    assert shape[0] == max(map(len, decoded))
    for split in ("train", "test"):
        pixels = dataset.splits[split].first(NUM).numpy()
        np.testing.assert_array_equal(pixels, np.stack([np.broadcast_to(image, shape) for image in decoded]))


@FOLDERS
@settings(max_examples=40)
def test_a_data_set_has_what_decode_image_gives_for_each_file(
    tmp_path_factory: pytest.TempPathFactory, files: Any, size: tuple[int, int], fit: Any, channels: Any
) -> None:
    rules = ImageRules(size, fit, channels, BACKGROUND)
    assert_prepared_is_decoded(tmp_path_factory.mktemp("random"), files, rules, num_processes=1)


@FOLDERS
@settings(max_examples=6, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_two_processes_decode_the_same_in_the_same_order(
    tmp_path_factory: pytest.TempPathFactory, files: Any, size: tuple[int, int], fit: Any, channels: Any
) -> None:
    rules = ImageRules(size, fit, channels, BACKGROUND)
    assert_prepared_is_decoded(tmp_path_factory.mktemp("random"), files, rules, num_processes=2)
