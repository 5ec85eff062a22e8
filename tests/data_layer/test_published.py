"""CIFAR-10 and SVHN: exact pixels and labels from small files of the published form, and what is refused."""

import functools
import hashlib
import io
import logging
import pickle
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from vae_ray.data.decoding import ImageRules
from vae_ray.data.sources import published as published_sources
from vae_ray.data.sources.published import CIFAR10, SVHN, Cifar10, PublishedFile, Svhn, download_file
from vae_ray.errors import UserError

ROWS = 7
"""Of a batch of the small CIFAR-10."""
SVHN_SIZES = {"train": 23, "test": 11}
ARCHIVE_ORDER = ("data_batch_1.bin", "data_batch_4.bin", "test_batch.bin", "data_batch_5.bin")


def cifar_rows() -> np.ndarray:
    """(6, ROWS, 3073): five training batches and the test batch."""
    rows = np.random.default_rng(0).integers(0, 256, (6, ROWS, 3073), dtype=np.uint8)
    rows[:, :, 0] = np.arange(6 * ROWS).reshape(6, ROWS) % 10
    return rows


def archive_of(rows: np.ndarray) -> bytes:
    """A .tar.gz, in another order than that of the batches, as in the published one."""
    content, buffer = dict(zip(Cifar10.batches, rows, strict=True)), io.BytesIO()
    names = [*ARCHIVE_ORDER, "readme.html", "data_batch_3.bin", "data_batch_2.bin"]
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in names:
            data = content[name].tobytes() if name in content else b"<html>"
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def published_as(content: bytes, url: str) -> PublishedFile:
    return PublishedFile(url, len(content), hashlib.sha256(content).hexdigest())


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The content of a small CIFAR-10 that is, for the test, the published one."""
    content = archive_of(cifar_rows())
    monkeypatch.setattr(Cifar10, "rows_per_batch", ROWS)
    monkeypatch.setattr(published_sources, "CIFAR10", published_as(content, CIFAR10.url))
    return content


@pytest.fixture
def svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of a small SVHN in `tmp_path` that is, for the test, the published one."""
    generator = np.random.default_rng(1)
    arrays, published = {}, {}
    for split, num in SVHN_SIZES.items():
        pixels = generator.integers(0, 256, (32, 32, 3, num), dtype=np.uint8)
        labels = (np.arange(num, dtype=np.uint8) % 10 + 1)[:, None]
        arrays[split] = {"X": pixels, "y": labels}
        file = tmp_path / SVHN[split].name
        scipy.io.savemat(file, arrays[split], do_compression=True)
        published[split] = published_as(file.read_bytes(), SVHN[split].url)
    monkeypatch.setattr(Svhn, "sizes", SVHN_SIZES)
    monkeypatch.setattr(published_sources, "SVHN", published)
    return arrays


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of an HTTP server, and the directory that it serves."""
    directory = tmp_path_factory.mktemp("served")

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    handler = functools.partial(Handler, directory=str(directory))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", directory
        http.shutdown()
        thread.join()


def read_all(source: Cifar10 | Svhn, num_rows: int, rules: ImageRules | None = None) -> dict[str, tuple]:
    """Pixels and labels by split, after checks that hold for every source."""
    rows: dict[str, list] = {"train": [], "test": []}
    for part in source.parts(num_rows):
        assert part.num <= num_rows
        part = pickle.loads(pickle.dumps(part))
        rows[part.split].append(source.read(part, rules or ImageRules()))
        assert len(rows[part.split][-1].images) == part.num
    labels = {split: np.concatenate([part.columns["label"] for part in parts]) for split, parts in rows.items()}
    images = {split: np.stack([image for part in parts for image in part.images]) for split, parts in rows.items()}
    return {split: (images[split], labels[split]) for split in rows}


# --- the published numbers


def test_the_published_files_are_those_of_tensorflow_datasets():
    assert CIFAR10[1:] == (170_052_171, "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")
    assert SVHN["train"][1:] == (182_040_794, "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8")
    assert SVHN["test"][1:] == (64_275_384, "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b")


def test_the_sources_have_the_published_numbers_of_images(tmp_path):
    for source, train, test in ((Cifar10(tmp_path, False), 50_000, 10_000), (Svhn(tmp_path, False), 73_257, 26_032)):
        sizes = {"train": 0, "test": 0}
        for part in source.parts(999):
            assert part.split is not None
            sizes[part.split] += part.num
        assert sizes == {"train": train, "test": test}
        assert source.num_images == train + test
        assert source.native_shape() == (3, 32, 32)


# --- CIFAR-10


@pytest.mark.parametrize("form", ["archive", "extracted"])
def test_cifar10_has_the_pixels_of_its_batches_in_order(tmp_path, archive, form):
    file = tmp_path / CIFAR10.name
    file.write_bytes(archive)
    if form == "extracted":
        with tarfile.open(file) as opened:
            opened.extractall(tmp_path, filter="data")
        file.unlink()
    source = Cifar10(tmp_path, download=False)
    assert source.in_process
    assert source.fingerprint()
    rows = cifar_rows()
    for num_rows in (5, 1000):
        splits = read_all(source, num_rows)
        for split, expected in (("train", rows[:5]), ("test", rows[5:])):
            pixels, labels = splits[split]
            assert np.array_equal(pixels, expected[:, :, 1:].reshape(-1, 3, 32, 32))
            assert np.array_equal(labels, expected[:, :, 0].reshape(-1))
            assert labels.dtype == np.int64
    assert not (tmp_path / "cifar-10-batches-bin").exists() or form == "extracted"


def test_cifar10_obeys_the_rules(tmp_path, archive):
    (tmp_path / CIFAR10.name).write_bytes(archive)
    pixels, _ = read_all(Cifar10(tmp_path, False), 9, ImageRules(size=(8, 12), channels=1))["train"]
    assert pixels.shape == (5 * ROWS, 1, 8, 12)


def test_the_real_cifar10_jpegs_have_the_names_of_the_labels(mnist_root):
    directory = mnist_root / "cifar10-jpeg" / "train"
    if not directory.is_dir():
        pytest.skip("needs ../shared/data/cifar10-jpeg")
    assert sorted(path.name for path in directory.iterdir() if path.is_dir()) == Cifar10.names["label"]


def test_a_damaged_batch_or_archive_is_refused_with_its_name(tmp_path, archive, monkeypatch):
    file = tmp_path / CIFAR10.name
    rows = cifar_rows()
    wrong_label = rows.copy()
    wrong_label[3, 2, 0] = 10
    damaged = bytearray(archive)
    damaged[len(archive) // 2] ^= 16
    for content, reason in (
        (
            archive_of(rows[:, 1:]),
            rf"data_batch_1.bin: truncated or damaged, expected {7 * 3073} bytes, found {6 * 3073}",
        ),
        (archive_of(wrong_label), "data_batch_4.bin has the label 10, should be 0 to 9"),
        (bytes(damaged), "CRC check failed"),  # one flipped bit in pixels that could not be compressed
        (archive[:-9_000], "damaged"),
        (b"no archive" * 9, "damaged"),
        (tar_without_batches(), "has no cifar-10-batches-bin/data_batch_1.bin"),
    ):
        file.write_bytes(content)
        monkeypatch.setattr(published_sources, "CIFAR10", published_as(content, CIFAR10.url))
        with pytest.raises(UserError, match=reason) as error:
            read_all(Cifar10(tmp_path, False), 100)
        assert "\n" not in str(error.value)
        assert str(tmp_path) in str(error.value)


def tar_without_batches() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        link = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"  # a link is no batch
        archive.addfile(link)
    return buffer.getvalue()


def test_extracted_batches_of_another_size_or_missing_are_refused(tmp_path, archive):
    directory = tmp_path / "cifar-10-batches-bin"
    directory.mkdir()
    for name, batch in zip(Cifar10.batches, cifar_rows(), strict=True):
        (directory / name).write_bytes(batch.tobytes())
    source = Cifar10(tmp_path, download=False)
    before = source.fingerprint()
    (directory / "data_batch_2.bin").write_bytes(b"\1" * 3073)
    with pytest.raises(UserError, match=r"data_batch_2.bin: truncated or damaged, expected 21511 bytes, found 3073"):
        source.fingerprint()
    (directory / "data_batch_2.bin").write_bytes(b"\1" * 21511)
    assert source.fingerprint() != before
    (directory / "test_batch.bin").unlink()
    with pytest.raises(UserError, match=r"test_batch.bin is missing"):
        source.fingerprint()


@pytest.mark.parametrize("name", ["cifar-10-batches-py", "cifar-10-python.tar.gz"])
def test_the_python_version_is_never_read_and_the_message_says_what_to_fetch(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"{name} is the Python version: pickles.* put {CIFAR10.url} into {tmp_path}"):
        Cifar10(tmp_path, download=False).fingerprint()


# --- SVHN


def test_svhn_has_the_pixels_of_its_files_and_ten_is_the_digit_zero(tmp_path, svhn):
    source = Svhn(tmp_path, download=False)
    assert source.fingerprint()
    assert source.names["label"] == list("0123456789")
    for split, (pixels, labels) in read_all(source, 4).items():
        given = svhn[split]
        for n in range(SVHN_SIZES[split]):
            for channel in range(3):
                assert np.array_equal(pixels[n, channel], given["X"][:, :, channel, n])
        expected = [0 if label == 10 else label for label in given["y"][:, 0]]
        assert labels.tolist() == expected
        assert labels.dtype == np.int64


def test_damaged_or_other_matlab_files_are_refused(tmp_path, svhn, monkeypatch):
    file, good = tmp_path / SVHN["train"].name, svhn["train"]
    content = file.read_bytes()
    cases = {
        "X is uint8 of shape \\(32, 32, 3, 22\\)": {"X": good["X"][..., 1:], "y": good["y"]},
        "X is float64": {"X": good["X"] / 2, "y": good["y"]},
        "y of shape \\(22,\\)": {"X": good["X"], "y": good["y"][1:]},
        "y is uint8 from 0 to 9": {"X": good["X"], "y": good["y"] - 1},
        "no variable 'y'": {"X": good["X"]},
    }
    written: dict[str, bytes] = {}
    for reason, arrays in cases.items():
        scipy.io.savemat(tmp_path / "case.mat", arrays)
        written[reason] = (tmp_path / "case.mat").read_bytes()
    written |= {"damaged": content[:-1000], "damaged ": b"MATLAB 7.3", "damaged  ": b"\0" * 300}
    for reason, case in written.items():
        file.write_bytes(case)
        train = published_as(case, SVHN["train"].url)
        monkeypatch.setattr(published_sources, "SVHN", published_sources.SVHN | {"train": train})
        source = Svhn(tmp_path, False)
        with pytest.raises(UserError, match=reason.strip()) as error:
            source.read(next(source.parts(5)), ImageRules())
        assert str(error.value).startswith(str(file))
        assert "\n" not in str(error.value)


# --- presence and content


def test_other_content_of_the_published_size_is_read_with_a_warning(tmp_path, archive, svhn, monkeypatch, caplog):
    (tmp_path / CIFAR10.name).write_bytes(archive)
    read_all(Cifar10(tmp_path, False), 100)
    read_all(Svhn(tmp_path, False), 100)
    assert not caplog.records
    other = published_sources.CIFAR10._replace(sha256="0" * 64)
    monkeypatch.setattr(published_sources, "CIFAR10", other)
    read_all(Cifar10(tmp_path, False), 100)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{CIFAR10.name}: is not the published file (sha256 {hashlib.sha256(archive).hexdigest()}, not 000" in (
        record.getMessage()
    )


def test_a_file_of_another_size_is_refused_with_both_sizes(tmp_path):
    for name, source, expected in (
        (CIFAR10.name, Cifar10(tmp_path, True), 170_052_171),
        (SVHN["train"].name, Svhn(tmp_path, True), 182_040_794),
    ):
        (tmp_path / name).write_bytes(b"half of it")
        with pytest.raises(UserError, match=rf"{name}: .*expected {expected} bytes, found 10;"):
            source.fingerprint()


def test_a_missing_file_is_named_with_where_to_get_it_and_where_to_put_it(tmp_path):
    for source, name, url in (
        (Cifar10(tmp_path / "no", False), CIFAR10.name, CIFAR10.url),
        (Svhn(tmp_path / "no", False), SVHN["train"].name, SVHN["train"].url),
    ):
        with pytest.raises(UserError, match=r"is missing and data.download is false") as error:
            source.fingerprint()
        assert str(tmp_path / "no" / name) in str(error.value)
        assert f"DIR holds {name} from {url}" in str(error.value)


def test_missing_files_are_downloaded_once_and_leave_nothing_else(tmp_path, archive, server, monkeypatch):
    url, served = server
    (served / CIFAR10.name).write_bytes(archive)
    monkeypatch.setattr(published_sources, "CIFAR10", published_as(archive, f"{url}/{CIFAR10.name}"))
    root = tmp_path / "new" / "directory"
    source = Cifar10(root, download=True)
    first = source.fingerprint()
    (served / CIFAR10.name).unlink()
    assert source.fingerprint() == first
    assert [path.name for path in root.iterdir()] == [CIFAR10.name]
    assert np.array_equal(read_all(source, 50)["test"][1], cifar_rows()[5, :, 0])


def test_downloaded_content_other_than_the_published_is_not_kept(tmp_path, server):
    url, served = server
    expected = published_as(b"right" * 1000, f"{url}/file.mat")
    for content in (b"wrong" * 1000, b"right" * 999, b"right" * 1001 + b"x" * 5_000_000, b""):
        (served / "file.mat").write_bytes(content)
        with pytest.raises(OSError, match=r"the published file has 5000 with"):
            download_file(tmp_path / "file.mat", expected)
        assert not list(tmp_path.iterdir())
    (served / "file.mat").write_bytes(b"right" * 1000)
    download_file(tmp_path / "file.mat", expected)
    assert (tmp_path / "file.mat").read_bytes() == b"right" * 1000


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/x.mat", "{server}/absent.mat"])
def test_a_failed_download_is_one_line_with_the_file_and_the_reason(tmp_path, server, address, monkeypatch):
    train = SVHN["train"]._replace(url=address.format(server=server[0]))
    monkeypatch.setattr(published_sources, "SVHN", SVHN | {"train": train})
    with pytest.raises(UserError, match=r"is missing and could not be downloaded \(.*(refused|404).*\)") as error:
        Svhn(tmp_path, download=True).fingerprint()
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_sources_import_no_torch_and_parse_matlab_files_only_where_needed():
    code = (
        "import sys, vae_ray.data.sources.published, vae_ray.data.sources.sprites; "
        "print([name for name in ('torch', 'scipy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
