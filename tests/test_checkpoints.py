"""Contract: a checkpoint comes back to the bit or is refused with the name of the damaged file; it never runs code."""

import contextlib
import hashlib
import io
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vae_ray import Experiment, UserError
from vae_ray.checkpoints.loading import (
    EXPERIMENT,
    FORMAT_VERSION,
    MANIFEST,
    TRAINING_STATE,
    WEIGHTS,
    Checkpoint,
    Progress,
    all_checkpoints,
    best_checkpoint,
    complete_checkpoints,
    read_checkpoint,
    sealed,
)
from vae_ray.checkpoints.saving import prune_checkpoints, save_checkpoint
from vae_ray.config.experiment import OptimConfig
from vae_ray.models.vae import VAE, build_vae
from vae_ray.training.optimization import build_optimizer

SHAPE = (1, 4, 5)
EXPERIMENT_GIVEN = Experiment.from_dict({"model": {"hidden": [6], "latent_dim": 3}, "optim": {"lr": 0.01}})
FILES = [MANIFEST, EXPERIMENT, WEIGHTS, TRAINING_STATE]


def fresh(seed: int = 1) -> tuple[VAE, torch.optim.Optimizer]:
    model = build_vae(EXPERIMENT_GIVEN.model, SHAPE, seed=seed)
    return model, build_optimizer(OptimConfig(lr=0.01), model.parameters())


def step(model: VAE, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    forward = model(torch.rand(7, *SHAPE, generator=generator), torch.randn(7, 3, generator=generator))
    forward.logits.square().sum().backward()
    optimizer.step()


def save(directory: Path, *, epoch: int = 1, score: float = 5.0, **metrics: float) -> Checkpoint:
    model, optimizer = fresh()
    for seed in range(3):
        step(model, optimizer, seed)
    return save_checkpoint(
        directory,
        epoch=epoch,
        model=model,
        optimizer=optimizer,
        experiment=EXPERIMENT_GIVEN,
        metrics={"val/nelbo": score, **metrics},
        selection_metric="val/nelbo",
    )


def load_all(path: Path) -> None:
    """Everything that is ever read from a checkpoint."""
    checkpoint = read_checkpoint(path)
    model, optimizer = checkpoint.build_model(), fresh()[1]
    optimizer = build_optimizer(OptimConfig(lr=0.01), model.parameters())
    checkpoint.load_into(model, optimizer)


def rewritten(path: Path, name: str, content: bytes) -> None:
    """Replace a file and its checksum: what someone does who means harm."""
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / name).write_bytes(content)
    (path / MANIFEST).write_text(json.dumps(sealed(manifest)))


# --- coming back ----------------------------------------------------------------------------------------


def test_weights_optimizer_and_what_follows_come_back_to_the_bit(tmp_path: Path) -> None:
    model, optimizer = fresh()
    for seed in range(3):
        step(model, optimizer, seed)
    checkpoint = save_checkpoint(
        tmp_path,
        epoch=12,
        model=model,
        optimizer=optimizer,
        experiment=EXPERIMENT_GIVEN,
        metrics={"val/nelbo": 0.1 + 0.2},
        selection_metric="val/nelbo",
    )
    assert checkpoint.path == tmp_path / "epoch=0012"
    restored, restored_optimizer = fresh(seed=99)
    read_checkpoint(checkpoint.path).load_into(restored, restored_optimizer)
    for again in range(3):  # as restored, and after more steps of Adam, which depend on its moments
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), restored.parameters(), strict=True))
        step(model, optimizer, 10 + again)
        step(restored, restored_optimizer, 10 + again)


def test_experiment_epoch_shape_and_metrics_come_back(tmp_path: Path) -> None:
    found = read_checkpoint(save(tmp_path, epoch=7, score=1 / 3).path)
    assert found.experiment() == EXPERIMENT_GIVEN
    assert (found.epoch, found.image_shape, found.score) == (7, SHAPE, 1 / 3)


def test_saving_again_replaces_the_checkpoint_of_that_epoch(tmp_path: Path) -> None:
    save(tmp_path, score=5.0)
    save(tmp_path, score=4.0)
    (found,) = complete_checkpoints(tmp_path)
    assert found.score == 4.0
    load_all(found.path)
    assert sorted(path.name for path in found.path.iterdir()) == sorted(FILES)


def save_inside(directory: Path, *, epoch: int, step: int, progress: Progress | None = None) -> Checkpoint:
    """A checkpoint inside an epoch, as training writes it every so many steps."""
    model, optimizer = fresh()
    return save_checkpoint(
        directory,
        epoch=epoch,
        step=step,
        model=model,
        optimizer=optimizer,
        experiment=EXPERIMENT_GIVEN,
        metrics={"seconds": 1.5},
        selection_metric="val/nelbo",
        progress=progress,
    )


def test_progress_inside_an_epoch_comes_back_to_the_bit(tmp_path: Path) -> None:
    sums = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    path = save_inside(tmp_path, epoch=8, step=412, progress=Progress(0.1, 2, sums)).path
    assert path.name == "epoch=0008-step=000412"
    found = read_checkpoint(path)
    assert (found.epoch, found.step, found.epochs_done, found.position) == (8, 412, 7, (7, 412))
    model, optimizer = fresh(seed=99)
    lr_factor, num_nonfinite, term_sums = found.load_into(model, optimizer)
    assert (lr_factor, num_nonfinite) == (0.1, 2)
    assert term_sums is not None
    assert torch.equal(term_sums, sums)


@pytest.mark.parametrize(
    "progress",
    [{"term_sums": [1.0]}, {"term_sums": torch.zeros(2, 3, dtype=torch.float64)}, {"lr_factor": "x"}, {"other": 1}, 3],
    ids=str,
)
def test_progress_of_another_form_is_refused(tmp_path: Path, progress: Any) -> None:
    path = save(tmp_path).path
    state = torch.load(path / TRAINING_STATE, weights_only=True)
    buffer = io.BytesIO()
    torch.save({**state, "progress": progress}, buffer)
    rewritten(path, TRAINING_STATE, buffer.getvalue())
    with pytest.raises(UserError, match=r"training_state\.pt: is not this model's training state"):
        load_all(path)


def test_a_checkpoint_of_format_1_loads(tmp_path: Path) -> None:
    """As the first release wrote it: no step, no progress."""
    path = save(tmp_path, epoch=7).path
    state = torch.load(path / TRAINING_STATE, weights_only=True)
    buffer = io.BytesIO()
    torch.save({"optimizer": state["optimizer"]}, buffer)
    rewritten(path, TRAINING_STATE, buffer.getvalue())
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["step"]
    manifest["format_version"] = 1
    (path / MANIFEST).write_text(json.dumps(sealed(manifest)))
    found = read_checkpoint(path)
    model, optimizer = fresh(seed=99)
    assert found.load_into(model, optimizer) == Progress(1.0, 0, None)
    assert found.position == (7, 0)
    assert [checkpoint.path for checkpoint in complete_checkpoints(tmp_path)] == [path]


# --- damage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = save(tmp_path).path
    (path / name).unlink()
    with pytest.raises(UserError, match=name):
        load_all(path)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_at_any_length_is_named(tmp_path: Path, name: str) -> None:
    path = save(tmp_path).path
    whole = (path / name).read_bytes()
    lengths = {0, 1, len(whole) // 2, len(whole) - 1, *random.Random(1).sample(range(len(whole)), 25)}
    for length in sorted(lengths):
        (path / name).write_bytes(whole[:length])
        with pytest.raises(UserError, match=name):
            load_all(path)
    (path / name).write_bytes(whole)
    load_all(path)


@pytest.mark.parametrize("name", [EXPERIMENT, WEIGHTS, TRAINING_STATE])
def test_a_flipped_bit_anywhere_is_named(tmp_path: Path, name: str) -> None:
    path = save(tmp_path).path
    whole = (path / name).read_bytes()
    chance = random.Random(2)
    for position in {0, len(whole) - 1, *chance.sample(range(len(whole)), 25)}:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << chance.randrange(8)
        (path / name).write_bytes(damaged)
        with pytest.raises(UserError, match=name):
            load_all(path)


def test_a_flipped_bit_anywhere_in_the_manifest_is_refused(tmp_path: Path) -> None:
    """The manifest decides which checkpoint is best and newest, so its own numbers must be those written."""
    path = save(tmp_path, score=105.25).path
    whole = (path / MANIFEST).read_bytes()
    chance, accepted = random.Random(3), []
    for position in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << chance.randrange(7)
        (path / MANIFEST).write_bytes(damaged)
        with contextlib.suppress(UserError):
            load_all(path)
            accepted.append(bytes(damaged[max(0, position - 20) : position + 20]))
    assert accepted == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(format_version=FORMAT_VERSION + 1), "is newer than this vae_ray reads"),
        (lambda m: m.update(format="something else"), "manifest.json: damaged"),
        (lambda m: m.pop("format"), "manifest.json: damaged"),
        (lambda m: m.pop("epoch"), "manifest.json: damaged"),
        (lambda m: m.pop("files"), "manifest.json: damaged"),
        (lambda m: m.update(image_shape=[1, 2]), "manifest.json: damaged"),
        (lambda m: m.update(files=[]), "manifest.json: damaged"),
        (lambda m: m["files"].pop(WEIGHTS), "manifest.json: damaged.*weights.safetensors not listed"),
        pytest.param(lambda m: m["files"].update({WEIGHTS: {}}), "weights.safetensors|manifest.json"),
        pytest.param(lambda m: m.update(metrics={}), "manifest.json: damaged"),
        (lambda m: m.update(image_shape=[1, 4, 6]), "weights.safetensors: does not fit"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_manifest_of_another_format_is_refused(tmp_path: Path, change: Callable[[Any], Any], said: str) -> None:
    path = save(tmp_path).path
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(sealed(manifest)))  # as someone would who knows the format
    with pytest.raises(UserError, match=said):
        load_all(path)


@pytest.mark.parametrize("content", [b"[]", b"null", b"3", b'"text"', b"{}", b"\xff\xfe", b""])
def test_a_manifest_that_is_not_one_is_refused(tmp_path: Path, content: bytes) -> None:
    path = save(tmp_path).path
    (path / MANIFEST).write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        load_all(path)


# --- harm -----------------------------------------------------------------------------------------------


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (open, (str(self.target), "w"))


def with_payload(directory: Path, name: str, packed: str) -> tuple[Path, Path]:
    """A checkpoint whose file `name`, with a correct checksum, would create the second path if unpickled."""
    path, target = save(directory).path, directory / "was-here"
    buffer = io.BytesIO()
    if packed == "torch.save":
        torch.save({"optimizer": Payload(target)}, buffer)
    else:
        pickle.dump({"optimizer": Payload(target)}, buffer, protocol=2)  # the protocol that torch.load expects
    rewritten(path, name, buffer.getvalue())
    return path, target


@pytest.mark.parametrize("packed", ["torch.save", "pickle"])
@pytest.mark.parametrize("name", [TRAINING_STATE, WEIGHTS, EXPERIMENT])
def test_a_payload_with_a_correct_checksum_is_not_executed(tmp_path: Path, name: str, packed: str) -> None:
    path, target = with_payload(tmp_path, name, packed)
    with contextlib.suppress(UserError, pickle.UnpicklingError, ValueError):
        load_all(path)
        pytest.fail("it was loaded")
    assert not target.exists()
    pickle.loads(pickle.dumps(Payload(target))).close()  # the payload does work where it is let
    assert target.exists()


@pytest.mark.parametrize("packed", ["torch.save", "pickle"])
@pytest.mark.parametrize("name", [pytest.param(TRAINING_STATE), WEIGHTS, pytest.param(EXPERIMENT)])
def test_a_payload_with_a_correct_checksum_is_refused_by_name(tmp_path: Path, name: str, packed: str) -> None:
    path, _ = with_payload(tmp_path, name, packed)
    with pytest.raises(UserError, match=name):
        load_all(path)


def test_state_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path).path
    buffer = io.BytesIO()
    torch.save({"optimizer": {"state": {}, "param_groups": []}}, buffer)
    rewritten(path, TRAINING_STATE, buffer.getvalue())
    with pytest.raises(UserError, match=TRAINING_STATE):
        load_all(path)


# --- which ones there are -------------------------------------------------------------------------------


def test_a_partial_directory_is_not_a_checkpoint(tmp_path: Path) -> None:
    whole = save(tmp_path, epoch=2).path
    (tmp_path / ".partial-epoch=0003").mkdir()
    (tmp_path / "epoch=0004").mkdir()
    (tmp_path / "epoch=0004" / WEIGHTS).write_bytes((whole / WEIGHTS).read_bytes())
    assert [found.epoch for found in complete_checkpoints(tmp_path)] == [2]


def test_best_is_by_the_selection_metric_and_the_earlier_on_a_tie(tmp_path: Path) -> None:
    for epoch, score in [(1, 9.0), (2, 3.0), (3, 3.0), (4, 8.0)]:
        save(tmp_path, epoch=epoch, score=score, **{"val/loss": -epoch, "test/nelbo": -epoch})
    assert best_checkpoint(complete_checkpoints(tmp_path)).epoch == 2


@pytest.mark.parametrize(
    ("num_best", "kept"), [(1, [3, 12]), (2, [2, 3, 12]), (3, [2, 3, 10, 12]), (99, [1, 2, 3, 10, 11, 12])]
)
def test_pruning_keeps_the_best_and_the_last(tmp_path: Path, num_best: int, kept: list[int]) -> None:
    for epoch, score in [(1, 9.0), (2, 4.0), (3, 3.0), (10, 5.0), (11, 7.0), (12, 8.0)]:
        save(tmp_path, epoch=epoch, score=score)
    (tmp_path / ".partial-epoch=0013").mkdir()
    prune_checkpoints(tmp_path, num_best=num_best)
    assert [found.epoch for found in complete_checkpoints(tmp_path)] == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"epoch={epoch:04d}" for epoch in kept]
    for epoch in kept:
        load_all(tmp_path / f"epoch={epoch:04d}")


def test_checkpoints_inside_epochs_are_ordered_among_the_others_and_never_the_best(tmp_path: Path) -> None:
    for epoch in (9, 10):
        save(tmp_path, epoch=epoch)
    for epoch, step in [(10, 3), (11, 2_000_000), (11, 7)]:
        save_inside(tmp_path, epoch=epoch, step=step)
    order = [found.path.name.removeprefix("epoch=00") for found in all_checkpoints(tmp_path)]
    assert order == ["09", "10-step=000003", "10", "11-step=000007", "11-step=2000000"]
    assert [found.epoch for found in complete_checkpoints(tmp_path)] == [9, 10]


def test_pruning_keeps_the_newest_inside_an_epoch_until_that_epoch_is_whole(tmp_path: Path) -> None:
    for epoch, score in [(1, 1.0), (2, 9.0), (3, 8.0)]:
        save(tmp_path, epoch=epoch, score=score)
    for step in (5, 10):
        save_inside(tmp_path, epoch=4, step=step)
    prune_checkpoints(tmp_path, num_best=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=0001", "epoch=0003", "epoch=0004-step=000010"]
    save(tmp_path, epoch=4, score=7.0)
    prune_checkpoints(tmp_path, num_best=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=0001", "epoch=0004"]
