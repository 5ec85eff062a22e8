"""A user's own callbacks (`run.callbacks`), called on rank 0. One that fails is a warning, and training continues.

A callback is an object with any of these methods, made by calling what its import path names:

    run_began(run_dir, experiment)      run_dir: the run's directory or URI
    epoch_ended(record, decode)         record: the epoch's metrics; decode: z `(N, latent_dim)` -> images
    run_ended(run_dir)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from vae_ray.config import user_code
from vae_ray.data.images import as_tensor
from vae_ray.models.traversal import decode_codes
from vae_ray.models.vae import VAE

logger = logging.getLogger(__name__)

METHODS = ("run_began", "epoch_ended", "run_ended")


class Callbacks:
    """The callbacks of a run, by their import paths."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._callbacks = [(path, user_code.call(path, {}, key="run.callbacks")) for path in paths]

    def call(self, method: str, *arguments: Any) -> None:
        """Call `method` of every callback that has it."""
        for path, callback in self._callbacks:
            function = getattr(callback, method, None)
            if function is not None:
                try:
                    function(*arguments)
                except user_code.FAILURES as error:
                    logger.warning("run.callbacks: %s.%s failed (%s: %s)", path, method, type(error).__name__, error)


def decoder_of(model: VAE) -> Callable[[Any], Tensor]:
    """A function from codes `(N, latent_dim)`, of all groups side by side, to means of p(x|z) `(N, C, H, W)`.

    A conditional VAE is given the classes 0, 1, ... in turn.
    """

    def decode(z: Any) -> Tensor:
        codes = as_tensor(z, key="z")
        return decode_codes(model.eval(), codes, model.classes_in_turn(len(codes) if codes.ndim else 1))

    return decode
