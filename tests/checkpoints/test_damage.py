"""A damaged file of a checkpoint is refused by its name; what the files claim is checked before it is used."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.checkpoints.written import change_manifest, load, rewrite, save, state_after
from vae_ray import UserError
from vae_ray.checkpoints.loading import (
    AVERAGED,
    EXPERIMENT,
    FORMAT_VERSION,
    MANIFEST,
    TRAINING_STATE,
    WEIGHTS,
    read_checkpoint,
)
from vae_ray.errors import CorruptFile

FILES = [MANIFEST, EXPERIMENT, WEIGHTS, AVERAGED, TRAINING_STATE]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good checkpoint with every file that one can have."""
    return save(tmp_path, score=105.25, averaged=state_after(1).model.state_dict()).path


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(path: Path, name: str) -> None:
    (path / name).unlink()
    with pytest.raises(CorruptFile, match=name):
        load(path)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_at_any_length_is_named(path: Path, name: str) -> None:
    whole = (path / name).read_bytes()
    for length in {0, 1, len(whole) // 2, len(whole) - 1, *random.Random(1).sample(range(len(whole)), 25)}:
        (path / name).write_bytes(whole[:length])
        with pytest.raises(CorruptFile, match=name):
            load(path)
    (path / name).write_bytes(whole)
    load(path)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_named(path: Path, name: str) -> None:
    """Also in the manifest, which decides which checkpoint is the best and the newest."""
    whole, chance = (path / name).read_bytes(), random.Random(2)
    positions = range(0, len(whole), 3) if name == MANIFEST else chance.sample(range(len(whole)), 25)
    for position in {0, len(whole) - 1, *positions}:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << chance.randrange(7)
        (path / name).write_bytes(damaged)
        with pytest.raises(CorruptFile, match=name):
            load(path)


@pytest.mark.parametrize("name", FILES)
def test_a_link_is_not_followed(path: Path, name: str) -> None:
    (path / name).rename(path.parent / "elsewhere")
    (path / name).symlink_to(path.parent / "elsewhere")
    with pytest.raises(CorruptFile, match=f"{name}: is a link"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=FORMAT_VERSION + 1), "is newer than this vae_ray reads"),
        (lambda m: m.update(format="something else"), "manifest.json: damaged"),
        (lambda m: m.pop("format"), "manifest.json: damaged"),
        (lambda m: m.pop("epoch"), "manifest.json: damaged"),
        (lambda m: m.pop("files"), "manifest.json: damaged"),
        (lambda m: m.pop("scalars"), "manifest.json: damaged"),
        (lambda m: m["scalars"].update(lr_factor=[1.0]), "manifest.json: damaged"),
        (lambda m: m["scalars"].update(lr_factor="x"), "training_state.safetensors: is not this model's"),
        (lambda m: m["scalars"].update(num_averaged=None), "training_state.safetensors: is not this model's"),
        (lambda m: m.update(image_shape=[1, 2]), "manifest.json: damaged"),
        (lambda m: m.update(files=[]), "manifest.json: damaged"),
        (lambda m: m["files"].pop(WEIGHTS), "manifest.json: damaged.*weights.safetensors not listed"),
        (lambda m: m["files"].update({WEIGHTS: {}}), "manifest.json: damaged"),
        (lambda m: m.update(metrics={}), "manifest.json: damaged.*val/nelbo not listed"),
        (lambda m: m.update(image_shape=[1, 4, 6]), "weights.safetensors: does not fit"),
    ],
)
def test_a_manifest_with_correct_checksums_and_wrong_content_is_refused(
    path: Path, change: Callable[[Any], Any], message: str
) -> None:
    change_manifest(path, change)
    with pytest.raises(UserError, match=message):
        load(path)


@pytest.mark.parametrize("content", [b"[]", b"null", b"3", b'"text"', b"{}", b"\xff\xfe", b""])
def test_a_file_that_is_no_manifest_is_refused(path: Path, content: bytes) -> None:
    (path / MANIFEST).write_bytes(content)
    with pytest.raises(CorruptFile, match=r"manifest\.json: damaged"):
        load(path)


MOMENT = "optimizer.model.model.network.encoder.1.weight.exp_avg"
STATES: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "a moment of another shape": lambda state: state.update({MOMENT: torch.zeros(2)}),
    "a moment without a shape": lambda state: state.update({MOMENT: torch.zeros(())}),
    "a moment of integers": lambda state: state.update({MOMENT: torch.zeros_like(state[MOMENT], dtype=torch.int64)}),
    "a missing moment": lambda state: state.pop(MOMENT),
    "a parameter that does not exist": lambda state: state.update({"optimizer.model.model.x.exp_avg": torch.zeros(2)}),
    "a step of two numbers": lambda state: state.update({MOMENT.replace("exp_avg", "step"): torch.zeros(2)}),
    "one more of the optimizer": lambda state: state.update({MOMENT.replace("exp_avg", "more"): torch.zeros(())}),
    "sums without rows": lambda state: state.update({"progress.term_sums": torch.zeros(3, dtype=torch.float64)}),
    "sums of integers": lambda state: state.update({"progress.term_sums": torch.zeros(1, 4, dtype=torch.int64)}),
}


@pytest.mark.parametrize("what", STATES)
def test_a_training_state_that_does_not_fit_the_model_is_refused(path: Path, what: str) -> None:
    tensors = read_checkpoint(path).training_state()
    assert MOMENT in tensors
    STATES[what](tensors)
    rewrite(path, TRAINING_STATE, safetensors.torch.save(tensors))
    with pytest.raises(CorruptFile, match=rf"{TRAINING_STATE}: is not this model's"):
        load(path)


@pytest.mark.parametrize("name", [WEIGHTS, AVERAGED])
@pytest.mark.parametrize(
    "change",
    [
        lambda weights, name: weights.pop(name),
        lambda weights, name: weights.update(more=torch.zeros(1)),
        lambda weights, name: weights.update({name: weights[name].double()}),
        lambda weights, name: weights.update({name: weights[name][:1].contiguous()}),
    ],
    ids=["one missing", "one more", "another dtype", "another shape"],
)
def test_weights_that_do_not_fit_the_model_are_refused(path: Path, name: str, change: Callable[..., Any]) -> None:
    weights = safetensors.torch.load((path / name).read_bytes())
    change(weights, next(iter(weights)))
    rewrite(path, name, safetensors.torch.save(weights))
    with pytest.raises(CorruptFile, match=rf"{name}: does not fit the model"):
        load(path)


def test_a_file_larger_than_the_manifest_claims_is_not_read(path: Path) -> None:
    with (path / WEIGHTS).open("ab") as stream:
        stream.truncate(1 << 40)  # sparse
    with pytest.raises(CorruptFile, match=rf"{WEIGHTS}: truncated or changed"):
        load(path)


@pytest.mark.parametrize("name", FILES)
def test_the_message_is_one_line(path: Path, name: str) -> None:
    for damaged in (b"", b"\n\n", bytes((path / name).stat().st_size)):
        (path / name).write_bytes(damaged)
        with pytest.raises(CorruptFile, match=r"\A[^\n]*\Z"):
            load(path)
