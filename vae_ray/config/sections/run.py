"""Section `run`: the run as a whole."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints

from vae_ray.config.fields import ImportPaths, Int, Location, Section, Seed, place

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
NAME_RULE = "1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit"


class RunConfig(Section):
    """The run as a whole."""

    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)] | None = place(
        None, description="Directory of the run inside run.storage; null means SOURCE-DATE-TIME."
    )
    storage: Location = place(
        "runs",
        description="Directory that holds all runs, or a URI (s3://BUCKET/runs, gs://...); "
        "on several nodes one that all of them see.",
    )
    seed: Seed = Field(0, description="Seed of weights, order of images and latent noise.")
    initial_weights: Location | None = Field(
        None, description="Checkpoint, run or sweep whose weights training starts from; shapes must agree."
    )
    checkpoints_kept: Int = place(1, ge=1, description="Best checkpoints kept; the last is kept besides.")
    checkpoint_every_steps: Int | None = place(
        None,
        ge=0,
        description="Steps of the run between checkpoints inside an epoch, of which the newest is kept until the "
        "epoch's own is written; null or 0: only at the end of epochs.",
    )
    callbacks: ImportPaths = place(
        (),
        description="A user's own callbacks, MODULE:NAME,...; called on rank 0 as a run and its epochs begin and end.",
    )
