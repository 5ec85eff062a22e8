"""Files made by someone who knows the formats and means harm: refused in one line, nothing run, nothing allocated.

Every checkpoint here is sealed anew, with correct sizes and checksums. Memory is measured in a process of its own.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.conftest import Count
from tests.faults.file_operations import SERVER
from tests.faults.test_damaged_files import sweep_in
from tests.faults.test_kills_at_every_operation import saved
from tests.test_checkpoints import rewritten
from vae_ray import Experiment, TrainedVAE, UserError
from vae_ray.checkpoints.loading import MANIFEST, TRAINING_STATE, WEIGHTS, read_checkpoint, sealed
from vae_ray.cli.main import main
from vae_ray.training.optimization import build_optimizer
from vae_ray.tuning.records import read_trials
from vae_ray.tuning.space import SearchSpace

pytestmark = pytest.mark.faults

MOST_MEMORY_BYTES = 200 << 20
"""Above what a process has that has imported torch: far below what the hostile headers ask for."""
MARKER = "was-here"


def used(path: str) -> None:
    """Everything that is ever done with a checkpoint."""
    model = TrainedVAE.load(path)
    optimizer = build_optimizer(model.experiment.optim, list(model.model.parameters()))
    read_checkpoint(path).load_into(model.model, optimizer)


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

    def __init__(self, name: str, *arguments: Any) -> None:
        self.call = (getattr(__import__(name.rpartition(".")[0]), name.rpartition(".")[2]), arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def pickled(value: Any) -> bytes:
    """A training state that holds `value`, in the zip of torch.save."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def with_pickle(content: bytes, data: bytes, *, compression: int = zipfile.ZIP_STORED, more: bytes = b"") -> bytes:
    """The same zip with another data.pkl."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, data if entry.filename.endswith("/data.pkl") else old.read(entry.filename))
        if more:
            new.writestr("archive/data/99", more)
    return buffer.getvalue()


def encrypted(content: bytes) -> bytes:
    """The same zip, whose parts say that they are encrypted."""
    marked = bytearray(content)
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = marked.find(signature)
        while at >= 0:
            marked[at + flags] |= 1
            at = marked.find(signature, at + 1)
    return bytes(marked)


def header(entries: Any, *, body: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def tensor(shape: list[int], end: int = 4, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


def optimizer_state(path: Path) -> Any:
    return torch.load(path / TRAINING_STATE, weights_only=True)


def changed_state(path: Path, change: Callable[[Any], None]) -> bytes:
    state = optimizer_state(path)
    change(state["optimizer"])
    return pickled(state)


STATES: dict[str, Callable[[Path, Path], bytes]] = {
    # each makes a training state from a good checkpoint and the file that a payload would create
    "a function is called": lambda path, marker: pickled({"optimizer": Payload("builtins.open", str(marker), "w")}),
    "a shell is started": lambda path, marker: pickled({"optimizer": Payload("os.system", f"touch {marker}")}),
    "eval": lambda path, marker: pickled({"optimizer": Payload("builtins.eval", f"open({str(marker)!r}, 'w')")}),
    "a plain pickle": lambda path, marker: pickle.dumps({"optimizer": Payload("os.system", f"touch {marker}")}, 2),
    "a terabyte of zeros": lambda path, marker: pickled({"optimizer": Payload("builtins.bytearray", 1 << 40)}),
    "four gigabytes of zeros": lambda path, marker: pickled({"optimizer": Payload("builtins.bytearray", 1 << 32)}),
    "a compressed bomb": lambda path, marker: with_pickle(
        (path / TRAINING_STATE).read_bytes(), b"\x80\x02N.", compression=zipfile.ZIP_DEFLATED, more=bytes(1 << 28)
    ),
    "a global by the stack": lambda path, marker: with_pickle(
        (path / TRAINING_STATE).read_bytes(), b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R."
    ),
    "an instance by the old way": lambda path, marker: with_pickle(
        (path / TRAINING_STATE).read_bytes(), b"(S'touch " + str(marker).encode() + b"'\nios\nsystem\n."
    ),
    "encrypted parts": lambda path, marker: encrypted((path / TRAINING_STATE).read_bytes()),
    "one number seen as many": lambda path, marker: changed_state(
        path, lambda state: state["state"][0].update(exp_avg=torch.zeros(1).expand(1 << 16, 1 << 16))
    ),
    "a moment of another shape": lambda path, marker: changed_state(
        path, lambda state: state["state"][0].update(exp_avg=torch.zeros(3, 3))
    ),
    "a moment that repeats one number": lambda path, marker: changed_state(
        path, lambda state: state["state"][0].update(exp_avg=torch.zeros(1).expand_as(state["state"][0]["exp_avg"]))
    ),
    "state of a parameter that is not there": lambda path, marker: changed_state(
        path, lambda state: state["state"].update({10**6: {}})
    ),
    "no groups": lambda path, marker: changed_state(path, lambda state: state.update(param_groups=[])),
    "a list": lambda path, marker: pickled([1, 2, 3]),
    "nothing": lambda path, marker: pickled({}),
    "deep nesting": lambda path, marker: with_pickle(
        (path / TRAINING_STATE).read_bytes(), b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    ),
}


@pytest.mark.parametrize("what", STATES)
def test_a_hostile_training_state_is_refused_and_runs_nothing(what: str, tmp_path: Path, fault_counts: Count) -> None:
    saved(str(tmp_path), 1, 1.0)
    path, marker = tmp_path / "epoch=0001", tmp_path / MARKER
    rewritten(path, TRAINING_STATE, STATES[what](path, marker))
    said = what_happens(path)
    assert said.startswith(f"UserError: {path / TRAINING_STATE}: "), said
    assert "\n" not in said
    assert not marker.exists()
    fault_counts("malicious file", tried=1, survived=1, note="training states")


HEADERS: dict[str, bytes] = {
    "a header of 2^63 bytes": header({}, length=1 << 63),
    "a header longer than the file": header({}, length=1 << 20),
    "no header": b"",
    "a header cut short": b"\x01\x02",
    "a shape of 2^40": header({"encoder.1.weight": tensor([1 << 20, 1 << 20])}, body=bytes(4)),
    "an overflowing shape": header({"encoder.1.weight": tensor([1 << 62, 1 << 62])}, body=bytes(4)),
    "a negative shape": header({"encoder.1.weight": tensor([-1, 4])}, body=bytes(4)),
    "offsets outside of the file": header({"encoder.1.weight": tensor([6, 20], end=1 << 40)}, body=bytes(480)),
    "a header that nests": header(b"[" * 100_000),
    "a header of a million keys": header({str(number): tensor([]) for number in range(50_000)}),
    "a list": header([]),
    "no numbers": header({"encoder.1.weight": {"dtype": "F32", "shape": "big", "data_offsets": [0, 4]}}),
    "a key twice": header(b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, "a": 1}'),
    "NaN": header(b'{"a": NaN}'),
    "a pickle": pickle.dumps(Payload("os.system", "true"), 2),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_hostile_header_of_weights_is_refused_before_it_is_believed(
    what: str, tmp_path: Path, fault_counts: Count
) -> None:
    saved(str(tmp_path), 1, 1.0)
    path = tmp_path / "epoch=0001"
    rewritten(path, WEIGHTS, HEADERS[what])
    said = what_happens(path)
    assert said.startswith(f"UserError: {path / WEIGHTS}: "), said
    assert "\n" not in said
    fault_counts("malicious file", tried=1, survived=1, note="weights")


def resealed(path: Path, change: Callable[[Any], None]) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(sealed(manifest)))


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
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_hostile_manifest_is_refused(what: str, tmp_path: Path, fault_counts: Count) -> None:
    saved(str(tmp_path), 1, 1.0)
    path = tmp_path / "epoch=0001"
    resealed(path, MANIFESTS[what])
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
    rewritten(path, "experiment.json", EXPERIMENTS[what])
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
    "an impossible date": b"run: {name: 2020-13-45}",
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
    from vae_ray.config.experiment import DataConfig
    from vae_ray.data.arrow_store import open_split

    mnist_raw(tmp_path / "MNIST" / "raw")
    processed = tmp_path / "MNIST" / "processed"
    processed.mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((torch.zeros(3, 6, 5, dtype=torch.uint8), torch.zeros(3, dtype=torch.long)), processed / name)
    config = DataConfig(source="mnist", root=str(tmp_path), download=False, cache_dir=tmp_path / "cache")
    assert int(open_split(config, "test").pixels.sum()) > 0
    fault_counts("malicious file", tried=1, survived=1, note="raw files")


def test_a_hostile_experiment_does_not_hide_in_a_good_checkpoint(tmp_path: Path) -> None:
    """The experiment of a checkpoint says what the network was; it starts nothing and writes nowhere."""
    saved(str(tmp_path), 1, 1.0)
    path = tmp_path / "epoch=0001"
    hostile = Experiment.from_dict({"model": {"hidden": [6]}, "run": {"storage": str(tmp_path / "x"), "name": "y"}})
    rewritten(path, "experiment.json", json.dumps(hostile.to_dict()).encode())
    used(str(path))
    assert not (tmp_path / "x").exists()
