"""Train variational autoencoders on Ray: on a laptop, in local processes and on a cluster.

    from vae_ray import Experiment, TrainedVAE, train

    result = train(Experiment.preset("digits"))
    images = TrainedVAE.load(result.best_checkpoint).generate(64)

Names are loaded when first used, so that `import vae_ray` and `vae-ray --help` import neither torch nor ray.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vae_ray.config.experiment import Experiment as Experiment
    from vae_ray.errors import Stopped as Stopped
    from vae_ray.errors import TrainingFailed as TrainingFailed
    from vae_ray.errors import UserError as UserError
    from vae_ray.inference import TrainedVAE as TrainedVAE
    from vae_ray.runs.prepare import prepare as prepare
    from vae_ray.runs.results import TrainResult as TrainResult
    from vae_ray.runs.train import train as train
    from vae_ray.tuning.summary import SweepResult as SweepResult
    from vae_ray.tuning.sweep import sweep as sweep

_HOME_OF = {
    "Experiment": "vae_ray.config.experiment",
    "SweepResult": "vae_ray.tuning.summary",
    "TrainResult": "vae_ray.runs.results",
    "TrainedVAE": "vae_ray.inference",
    "Stopped": "vae_ray.errors",
    "TrainingFailed": "vae_ray.errors",
    "UserError": "vae_ray.errors",
    "prepare": "vae_ray.runs.prepare",
    "sweep": "vae_ray.tuning.sweep",
    "train": "vae_ray.runs.train",
}

__all__ = [
    *("Experiment", "SweepResult", "TrainResult", "TrainedVAE"),
    *("Stopped", "TrainingFailed", "UserError", "prepare", "sweep", "train"),
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'vae_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
