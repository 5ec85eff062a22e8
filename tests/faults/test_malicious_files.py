"""Files made by someone who knows the formats and means harm: refused in one line, nothing run, nothing allocated.

Every checkpoint here is sealed anew, with correct sizes and checksums. Memory is measured in a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vae_ray
from tests.checkpoints.written import EXPERIMENT, change_manifest, load, rewrite
from tests.data_layer.stored import open_split, pixels_of
from tests.faults.conftest import Count
from tests.faults.file_operations import SERVER
from tests.faults.test_damaged_files import sweep_in
from tests.faults.test_kills_at_every_operation import saved
from vae_ray import Experiment, TrainedVAE, UserError
from vae_ray.checkpoints.loading import MANIFEST, TRAINING_STATE, WEIGHTS
from vae_ray.cli.main import main
from vae_ray.config.sections.data import PublishedData
from vae_ray.tuning.records import read_trials
from vae_ray.tuning.space import SearchSpace

pytestmark = pytest.mark.faults

MOST_MEMORY_BYTES = 200 << 20
"""Above what a process has that has imported torch: far below what the hostile headers ask for."""
MARKER = "was-here"


def used(path: str) -> None:
    """Everything that is ever done with a checkpoint."""
    TrainedVAE.load(path)
    load(Path(path))


def _bounded(path: str, answer: Any) -> None:
    """Use a checkpoint with little memory left to allocate, and tell how it ended."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + MOST_MEMORY_BYTES, resource.RLIM_INFINITY))
    signal.alarm(30)
    try:
        used(path)
        answer.send("it was loaded")
    except UserError as error:
        answer.send(f"UserError: {error}")
    except BaseException as error:
        answer.send(f"{type(error).__name__}: {error}")


def what_happens(path: Path) -> str:
    ours, theirs = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_bounded, args=(str(path), theirs))
    process.start()
    theirs.close()
    try:
        said = str(ours.recv())
    except EOFError:
        said = "it died"
    process.join()
    return said


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.target,))


def header(entries: Any, *, body: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def tensor(shape: list[int], end: int = 4, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("name", [WEIGHTS, TRAINING_STATE, "experiment.json", MANIFEST])
def test_a_pickle_in_place_of_any_file_is_refused_and_runs_nothing(
    name: str, protocol: int, tmp_path: Path, fault_counts: Count
) -> None:
    saved(str(tmp_path), 1, 1.0)
    path, marker = tmp_path / "epoch=0001", tmp_path / MARKER
    content = pickle.dumps({"optimizer": Payload(str(marker))}, protocol)
    if name == MANIFEST:
        (path / name).write_bytes(content)
    else:
        rewrite(path, name, content)
    said = what_happens(path)
    assert said.startswith(f"UserError: {path / name}: "), said
    assert not marker.exists()
    pickle.loads(content)
    assert marker.exists(), "the payload works where it is let"
    fault_counts("malicious file", tried=1, survived=1, note="pickles")


def test_no_module_can_read_a_pickle() -> None:
    package = Path(vae_ray.__file__).parent
    calls = re.compile(
        r"\b(import|from) (pickle|cloudpickle|dill|marshal|shelve)\b"
        r"|(?<!safetensors\.)\btorch\.load\(|\bnp\.load\((?!.*allow_pickle=False\))"
    )
    assert [str(file) for file in package.rglob("*.py") if calls.search(file.read_text())] == []


HEADERS: dict[str, bytes] = {
    "a header of 2^63 bytes": header({}, length=1 << 63),
    "a header longer than the file": header({}, length=1 << 20),
    "no header": b"",
    "a header cut short": b"\x01\x02",
    "a shape of 2^40": header({"network.encoder.1.weight": tensor([1 << 20, 1 << 20])}, body=bytes(4)),
    "an overflowing shape": header({"network.encoder.1.weight": tensor([1 << 62, 1 << 62])}, body=bytes(4)),
    "a negative shape": header({"network.encoder.1.weight": tensor([-1, 4])}, body=bytes(4)),
    "offsets outside of the file": header({"network.encoder.1.weight": tensor([6, 20], end=1 << 40)}, body=bytes(480)),
    "a header that nests": header(b"[" * 100_000),
    "a header of a million keys": header({str(number): tensor([]) for number in range(50_000)}),
    "a list": header([]),
    "no numbers": header({"network.encoder.1.weight": {"dtype": "F32", "shape": "big", "data_offsets": [0, 4]}}),
    "a key twice": header(b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, "a": 1}'),
    "NaN": header(b'{"a": NaN}'),
}


@pytest.mark.parametrize("name", [WEIGHTS, TRAINING_STATE])
@pytest.mark.parametrize("what", HEADERS)
def test_a_hostile_header_of_tensors_is_refused_before_it_is_believed(
    what: str, name: str, tmp_path: Path, fault_counts: Count
) -> None:
    saved(str(tmp_path), 1, 1.0)
    path = tmp_path / "epoch=0001"
    rewrite(path, name, HEADERS[what])
    said = what_happens(path)
    assert said.startswith(f"UserError: {path / name}: "), said
    assert "\n" not in said
    assert len(said) < 2000
    fault_counts("malicious file", tried=1, survived=1, note="headers of tensors")


MANIFESTS: dict[str, Callable[[Any], None]] = {
    "a file of a petabyte": lambda m: m["files"][WEIGHTS].update(bytes=1 << 50),
    "a negative size": lambda m: m["files"][WEIGHTS].update(bytes=-1),
    "true for a size": lambda m: m["files"][WEIGHTS].update(bytes=True),
    "a file above": lambda m: m["files"].update({"../../etc/passwd": m["files"][WEIGHTS]}),
    "an absolute file": lambda m: m["files"].update({"/etc/passwd": m["files"][WEIGHTS]}),
    "one file too many": lambda m: m["files"].update({"more.bin": m["files"][WEIGHTS]}),
    "images of a terapixel": lambda m: m.update(image_shape=[1, 1 << 20, 1 << 20]),
    "images of no pixel": lambda m: m.update(image_shape=[1, 0, 5]),
    "images of text": lambda m: m.update(image_shape="abc"),
    "images of another shape": lambda m: m.update(image_shape=[1, 4, 6]),
    "images of 2^64": lambda m: m.update(image_shape=[1, 4, 1 << 64]),
    "a negative epoch": lambda m: m.update(epoch=-1),
    "an epoch of text": lambda m: m.update(epoch="1"),
    "metrics of text": lambda m: m.update(metrics={"val/nelbo": "best"}),
    "metrics of lists": lambda m: m.update(metrics={"val/nelbo": [1]}),
    "a list of metrics": lambda m: m.update(metrics=[1, 2]),
    "a checksum of a number": lambda m: m["files"][WEIGHTS].update(sha256=5),
    "no files": lambda m: m.update(files=None),
    "a version of text": lambda m: m.update(format_version="1; rm -rf /"),
    "a negative version": lambda m: m.update(format_version=-1),
    "scalars of lists": lambda m: m["scalars"].update(lr_factor=[1.0]),
    "scalars of text": lambda m: m["scalars"].update(lr_factor="x"),
    "a list of scalars": lambda m: m.update(scalars=[1]),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_hostile_manifest_is_refused(what: str, tmp_path: Path, fault_counts: Count) -> None:
    saved(str(tmp_path), 1, 1.0)
    path = tmp_path / "epoch=0001"
    change_manifest(path, MANIFESTS[what])
    said = what_happens(path)
    assert said.startswith(f"UserError: {path}/"), said
    assert "\n" not in said
    fault_counts("malicious file", tried=1, survived=1, note="manifests")


EXPERIMENTS: dict[str, bytes] = {
    "a network of 17 gigabytes": json.dumps({"model": {"hidden": [65536, 65536]}}).encode(),
    "a network of 256 layers": json.dumps({"model": {"hidden": [65536] * 256}}).encode(),
    "too many layers": json.dumps({"model": {"hidden": [1] * 100_000}}).encode(),
    "a wide latent space": json.dumps({"model": {"hidden": [65536], "latent_dim": 65536}}).encode(),
    "deep nesting": b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a huge number": b'{"model": {"latent_dim": ' + b"9" * 100_000 + b"}}",
    "infinity": b'{"optim": {"lr": Infinity}}',
    "a name that leads out": json.dumps({"run": {"name": "../../up"}}).encode(),
    "a key twice": b'{"model": {"hidden": [6]}, "model": {"hidden": [6]}}',
    "no UTF-8": b'{"model": "\xff\xfe"}',
    "a path of zeros": json.dumps({"run": {"storage": "a\0b"}}).encode(),
    "megabytes of text": json.dumps({"run": {"storage": "a" * (1 << 21)}}).encode(),
}


@pytest.mark.parametrize("what", EXPERIMENTS)
def test_a_hostile_experiment_of_a_checkpoint_is_refused_before_a_model_is_built(
    what: str, tmp_path: Path, fault_counts: Count
) -> None:
    saved(str(tmp_path), 1, 1.0)
    path = tmp_path / "epoch=0001"
    rewrite(path, "experiment.json", EXPERIMENTS[what])
    said = what_happens(path)
    assert said.startswith(f"UserError: {path}/"), said
    assert "\n" not in said
    assert len(said) < 2000
    fault_counts("malicious file", tried=1, survived=1, note="experiments")


def test_the_good_checkpoint_is_loaded_within_the_same_memory(tmp_path: Path) -> None:
    saved(str(tmp_path), 1, 1.0)
    assert what_happens(tmp_path / "epoch=0001") == "it was loaded"


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS, TRAINING_STATE, "experiment.json"])
def test_a_link_in_a_checkpoint_is_not_followed(name: str, tmp_path: Path, fault_counts: Count) -> None:
    saved(str(tmp_path), 1, 1.0)
    path, elsewhere = tmp_path / "epoch=0001", tmp_path / "elsewhere"
    shutil.move(path / name, elsewhere)
    (path / name).symlink_to(elsewhere)
    said = what_happens(path)
    assert said.startswith("UserError: ")
    assert name in said
    assert "is a link" in said
    fault_counts("malicious file", tried=1, survived=1, note="links")


# --- what people write ----------------------------------------------------------------------------------

LAUGHS = b"a: &a [lol,lol,lol,lol,lol,lol,lol,lol,lol]\n" + b"".join(
    b"%c: &%c [%s]\n" % (98 + n, 98 + n, b",".join([b"*%c" % (97 + n)] * 9)) for n in range(20)
)
MERGES = b"a: &a {x: 1}\n" + b"".join(
    b"%c: &%c {<<: [%s]}\n" % (98 + n, 98 + n, b",".join([b"*%c" % (97 + n)] * 9)) for n in range(20)
)
YAMLS: dict[str, bytes] = {
    "a Python call": b"run: !!python/object/apply:os.system ['touch was-here']",
    "a Python object": b"run: !!python/object:vae_ray.config.experiment.RunConfig {}",
    "a Python name": b"run: !!python/name:os.system",
    "a Python module": b"run: !!python/module:os",
    "a tag of its own": b"run: !mine {}",
    "a billion laughs": LAUGHS,
    "a billion merges": MERGES,
    "an alias of itself": b"run: &a [*a]",
    "a mapping of itself": b"run: &a {name: *a}",
    "deep lists": b"run: " + b"[" * 50_000,
    "deep mappings": b"run: " + b"{a: " * 50_000,
    "deep indentation": b"".join(b" " * n + b"a:\n" for n in range(1000)),
    "a huge number": b"run: {seed: " + b"9" * 100_000 + b"}",
    "a huge hexadecimal number": b"run: {seed: 0x" + b"f" * 100_000 + b"}",
    "a key twice": b"run: {seed: 1, seed: 2}",
    "a section twice": b"run: {seed: 1}\nrun: {seed: 2}",
    "not UTF-8": b"run: {name: \xff\xfe}",
    "control characters": b"run: {name: a\x01b}",
    "an impossible date": b"run: {name: !!timestamp 2020-13-45}",
    "not a number": b"optim: {lr: .nan}",
    "infinity": b"optim: {lr: .inf}",
    "two documents": b"run: {}\n---\nrun: {}",
    "megabytes": b"# " + b"x" * (2 << 20),
    "binary": b"run: {name: !!binary AAECAw==}",
    "a set": b"run: !!set {name, seed}",
    "keys that are lists": b"? [a, b]\n: c",
    "keys that are mappings": b"? {a: b}\n: c",
    "a number without digits": b'run: {seed: !!int ""}',
    "an unknown anchor": b"run: *nowhere",
    "a path of zeros": b'run: {storage: "a\\0b"}',
    "a name that leads out": b"run: {name: ../../up}",
    "an absolute name": b"run: {name: /etc/passwd}",
    "a hidden name": b"run: {name: .ssh}",
}


@pytest.mark.parametrize("what", YAMLS)
def test_hostile_yaml_is_one_line_and_exit_code_2(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault_counts: Count
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_bytes(YAMLS[what])
    assert main(["train", "x.yaml", "--workers.num=0"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert len(err) < 2000
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]
    with contextlib.suppress(UserError):  # as a search space, and as a sweep's description
        SearchSpace.load("x.yaml")
        pytest.fail("it was read")
    fault_counts("malicious file", tried=2, survived=2, note="YAML")


@pytest.mark.parametrize("make", [os.mkfifo, lambda file: file.symlink_to("/dev/zero"), Path.mkdir])
def test_what_is_no_file_is_refused_and_not_waited_for(
    make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str], fault_counts: Count
) -> None:
    make(tmp_path / "x.yaml")
    signal.alarm(20)
    assert main(["train", str(tmp_path / "x.yaml")]) == 2
    assert main(["sweep", "digits", "--search", str(tmp_path / "x.yaml")]) == 2
    signal.alarm(0)
    assert capsys.readouterr().err.count("\n") == 2
    fault_counts("malicious file", tried=2, survived=2, note="pipes and devices")


# --- runs and sweeps ------------------------------------------------------------------------------------

NAMES = ["../../up", "/etc", "..", ".", "", "a/b", ".hidden", "a\0b", "a\nb", "x" * 300, 7, None, ["0001"], "０００１"]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_trial_whose_name_leads_out_of_the_sweep_is_refused(name: Any, tmp_path: Path, fault_counts: Count) -> None:
    directory = sweep_in(tmp_path / "sweep")
    directory.append_to_journal({"trial": name, "event": "proposed", "overrides": {}})
    with pytest.raises(UserError, match=r"trials\.jsonl: damaged") as refusal:
        read_trials(directory)
    assert "\n" not in str(refusal.value)
    fault_counts("malicious file", tried=1, survived=1, note="names of trials")


@pytest.mark.parametrize("key", ["run.storage", "run.name", "data.cache_dir", "data.root", "workers.num"])
def test_a_proposal_cannot_say_where_a_trial_runs(key: str, tmp_path: Path, fault_counts: Count) -> None:
    directory = sweep_in(tmp_path / "sweep")
    directory.append_to_journal({"trial": "0099", "event": "proposed", "overrides": {key: "/tmp/elsewhere"}})
    with pytest.raises(UserError, match=r"trials\.jsonl: damaged"):
        read_trials(directory)
    fault_counts("malicious file", tried=1, survived=1, note="proposals")


def test_a_trial_that_is_a_link_is_refused(tmp_path: Path, fault_counts: Count) -> None:
    directory = sweep_in(tmp_path / "sweep")
    (directory.path / "trials").mkdir()
    (directory.path / "trials" / "0001").symlink_to(tmp_path)
    with pytest.raises(UserError, match="0001"):
        read_trials(directory)
    fault_counts("malicious file", tried=1, survived=1, note="links")


@pytest.mark.parametrize("linked", ["", "checkpoints", "images", "tensorboard"])
def test_a_run_that_is_a_link_is_not_written_through(
    linked: str, tmp_path: Path, fault_counts: Count, capsys: pytest.CaptureFixture[str]
) -> None:
    outside, run = tmp_path / "outside", tmp_path / "runs" / "mine"
    outside.mkdir()
    (run / linked).parent.mkdir(parents=True)
    (run / linked).symlink_to(outside)
    arguments = [
        "train",
        "digits",
        "--workers.num=0",
        "--name",
        "mine",
        "--storage",
        str(tmp_path / "runs"),
        "--resume",
    ]
    assert main(arguments) == 2
    assert "is a link" in capsys.readouterr().err
    assert list(outside.iterdir()) == []
    fault_counts("malicious file", tried=1, survived=1, note="links")


def test_a_checkpoint_that_is_a_link_is_not_a_run_s_own(tmp_path: Path, fault_counts: Count) -> None:
    saved(str(tmp_path / "elsewhere"), 1, 1.0)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "epoch=0001").symlink_to(tmp_path / "elsewhere" / "epoch=0001")
    with pytest.raises(UserError, match="no complete checkpoint"):
        TrainedVAE.load(run)
    fault_counts("malicious file", tried=1, survived=1, note="links")


def test_a_pickle_beside_the_raw_files_is_never_opened(
    tmp_path: Path, fault_counts: Count, mnist_raw: Callable[[Path], None]
) -> None:
    """torchvision's reader prefers MNIST/processed/*.pt to the raw files."""
    mnist_raw(tmp_path / "MNIST" / "raw")
    processed = tmp_path / "MNIST" / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(3, 6, 5, dtype=torch.uint8), torch.zeros(3, dtype=torch.long)), processed / name)
    config = PublishedData(root=str(tmp_path), download=False, cache_dir=tmp_path / "cache")
    assert (pixels_of(open_split(config, "test")) > 0).any()
    fault_counts("malicious file", tried=1, survived=1, note="raw files")


HOSTILE_DESCRIPTIONS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another directory": lambda d: d["shards"]["train"][0].__setitem__(0, "../outside.arrow"),
    "an absolute path": lambda d: d["others"][0].__setitem__(0, "/etc/passwd"),
    "a huge image": lambda d: d.__setitem__("image_shape", [1, 100_000, 100_000]),
    "a negative shape": lambda d: d.__setitem__("image_shape", [1, -8, -8]),
    "another shape": lambda d: d.__setitem__("image_shape", [1, 4, 16]),
    "two dimensions": lambda d: d.__setitem__("image_shape", [8, 8]),
    "more rows": lambda d: d["shards"]["train"][0].__setitem__(1, 10**12),
    "fewer rows": lambda d: d["shards"]["train"][0].__setitem__(1, 3),
    "another file's checksum": lambda d: d["shards"]["train"][0].__setitem__(3, "00000000"),
    "no test images": lambda d: d["shards"].pop("test"),
    "another split": lambda d: d["shards"].__setitem__("other", d["shards"]["test"]),
    "splits exchanged": lambda d: d.__setitem__("shards", {**d["shards"], "train": d["shards"]["test"]}),
    "no shards": lambda d: d.pop("shards"),
    "shards of text": lambda d: d.__setitem__("shards", "all"),
    "a newer version": lambda d: d.__setitem__("version", 99),
    "a list": lambda d: d.__setitem__("names", [1]),
}


@pytest.mark.parametrize("what", HOSTILE_DESCRIPTIONS)
def test_a_hostile_description_of_a_prepared_data_set_is_refused(
    what: str, tmp_path: Path, fault_counts: Count, capsys: pytest.CaptureFixture[str]
) -> None:
    from vae_ray import prepare
    from vae_ray.storage.records import verify, with_checksum

    prepare(images=np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8), out=tmp_path / "set")
    file = tmp_path / "set" / "dataset.json"
    content = verify(json.loads(file.read_text()))
    HOSTILE_DESCRIPTIONS[what](content)
    file.write_text(json.dumps(with_checksum(content)))
    small = ["--model.network.hidden", "8", "--training.global-batch-size", "8", "--data.num-validation", "2"]
    arguments = ["--data.root", str(tmp_path / "set"), "--storage", str(tmp_path / "runs"), "--training.epochs", "1"]
    assert main(["train", "images", *arguments, *small]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "set") in error
    assert len([line for line in error.splitlines() if line.startswith("vae-ray: ")]) == 1
    fault_counts("malicious file", tried=1, survived=1, note="prepared data sets")


def test_a_hostile_experiment_does_not_hide_in_a_good_checkpoint(tmp_path: Path) -> None:
    """The experiment of a checkpoint says what the network was; it starts nothing and writes nowhere."""
    saved(str(tmp_path), 1, 1.0)
    path = tmp_path / "epoch=0001"
    hostile = Experiment.from_dict({**EXPERIMENT.to_dict(), "run": {"storage": str(tmp_path / "x"), "name": "y"}})
    rewrite(path, "experiment.json", json.dumps(hostile.to_dict()).encode())
    used(str(path))
    assert not (tmp_path / "x").exists()
