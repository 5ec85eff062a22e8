"""Section `training`: the loop."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vae_ray.config.fields import Choice, Float, Int, Section, place


class StopOnNonfinite(Section):
    """The run stops; the batch is saved in nonfinite/."""

    name: Literal["stop"] = "stop"


class SkipNonfinite(Section):
    """The batch is left out; it is saved in nonfinite/."""

    name: Literal["skip"] = "skip"
    limit: Int = place(3, ge=0, description="Batches left out before the run stops.")


class RollBackOnNonfinite(Section):
    """The run goes back to its last checkpoint and continues with a smaller learning rate."""

    name: Literal["rollback"] = "rollback"
    limit: Int = place(3, ge=0, description="Rollbacks before the run stops.")
    lr_factor: Float = place(0.5, gt=0, le=1, description="Factor of the learning rate after each rollback.")


class TrainingConfig(Section):
    """The loop."""

    epochs: Int = Field(10, ge=1, description="Passes over the training split.")
    global_batch_size: Int = Field(
        64,
        ge=1,
        description="Images a step, over all workers together; the last batch of an epoch may be smaller. At least 2 "
        "for beta_tc, dip and mmd.",
    )
    evaluation_batch_size: Int = place(
        1000,
        ge=1,
        description="Images a step of evaluation, over all workers together; sets memory, not the metrics.",
    )
    test_every_epochs: Int = Field(
        1,
        ge=0,
        description="Evaluate the test split every so many epochs; 0 only once, for the best checkpoint.",
    )
    patience_epochs: Int | None = Field(
        None,
        ge=1,
        description="Stop when the selection metric has not improved for so many epochs; null trains all epochs.",
    )
    ema_decay: Float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay per step of an exponential moving average of the weights, which is then evaluated, pictured "
        "and loaded; null keeps none.",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Precision of matrix products; bfloat16 is autocast, weights stay float32."
    )
    nonfinite: Annotated[StopOnNonfinite | SkipNonfinite | RollBackOnNonfinite, Choice("policy")] = place(
        StopOnNonfinite(), description="What to do if the loss or its gradient is not finite."
    )
