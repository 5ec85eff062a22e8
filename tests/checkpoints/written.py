"""Small checkpoints for tests, and what can be done to their files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vae_ray import Experiment
from vae_ray.checkpoints.loading import MANIFEST, Checkpoint, Scalar, read_checkpoint, sealed
from vae_ray.checkpoints.saving import save_checkpoint
from vae_ray.models.vae import build_vae
from vae_ray.objectives import build_objective
from vae_ray.parallel.group import SingleProcess
from vae_ray.run_files.run_directory import RunDirectory
from vae_ray.training.checkpointing import Checkpointing
from vae_ray.training.state import TrainState

SHAPE = (1, 4, 5)
EXPERIMENT = Experiment.from_dict({"model": {"network": {"name": "mlp", "hidden": [6]}, "latent_dim": 3}})


def state_after(num_steps: int, *, seed: int = 1) -> TrainState:
    """A training state after some updates by Adam."""
    model = build_vae(EXPERIMENT, SHAPE, seed=seed)
    state = TrainState.begin(EXPERIMENT, model, build_objective(EXPERIMENT.objective))
    for step in range(num_steps):
        update(state, seed=step)
    return state


def update(state: TrainState, *, seed: int) -> None:
    """One update from random images."""
    chance = torch.Generator().manual_seed(seed)
    (optimizer,) = state.optimizers.values()
    optimizer.zero_grad()
    images, noise = torch.rand(7, *SHAPE, generator=chance), torch.randn(7, 3, generator=chance)
    state.model(images, (noise,)).params.square().sum().backward()
    optimizer.step()


def save(
    directory: Path,
    *,
    epoch: int = 1,
    step: int | None = None,
    score: float = 5.0,
    state: TrainState | None = None,
    scalars: Mapping[str, Scalar] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    averaged: Mapping[str, Tensor] | None = None,
    **metrics: float,
) -> Checkpoint:
    """A checkpoint of the small model after two updates, or of what is given."""
    state = state_after(2) if state is None else state
    return save_checkpoint(
        directory,
        epoch=epoch,
        step=step,
        experiment=EXPERIMENT,
        image_shape=SHAPE,
        weights=state.model.state_dict() if weights is None else weights,
        averaged_weights=averaged,
        training_state=state.tensors(),
        scalars=state.scalars() if scalars is None else scalars,
        metrics={"seconds": 1.5} if step is not None else {"val/nelbo": score, **metrics},
        selection_metric="val/nelbo",
        fingerprints={"train": "a" * 64, "test": "b" * 64},
    )


def load(path: Path) -> TrainState:
    """Everything that is ever read from a checkpoint."""
    checkpoint = read_checkpoint(path)
    experiment = checkpoint.experiment()
    model = build_vae(experiment, checkpoint.image_shape, seed=99)
    state = TrainState.begin(experiment, model, build_objective(experiment.objective))
    group = SingleProcess(torch.device("cpu"))
    Checkpointing(experiment, RunDirectory(path.parent), group, fingerprints={}).restore(checkpoint, state)
    if checkpoint.has_averaged_weights:
        checkpoint.weights(model.state_dict(), averaged=True)
    return state


def rewrite(path: Path, name: str, content: bytes) -> None:
    """Replace a file of a checkpoint and its checksum, as someone does who knows the format."""
    (path / name).write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change_manifest(path, lambda manifest: manifest["files"].update({name: entry}))


def change_manifest(path: Path, change: Callable[[Any], Any]) -> None:
    """Change the manifest and its checksum, as someone does who knows the format."""
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(sealed(manifest)))
