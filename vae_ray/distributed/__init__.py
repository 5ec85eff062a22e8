"""Ray: from an Experiment to a worker group that trains it; what a cluster is. With `tuning/`, all that imports ray.

Names are loaded when first used: a question to a cluster needs neither torch nor Ray Train.
"""

import importlib
from typing import TYPE_CHECKING, Any

from vae_ray.distributed import environment

if TYPE_CHECKING:
    from vae_ray.distributed.connection import check_local_resources as check_local_resources
    from vae_ray.distributed.connection import connection as connection
    from vae_ray.distributed.launch import clear_state as clear_state
    from vae_ray.distributed.launch import fit as fit
    from vae_ray.distributed.launch import ray_state as ray_state

environment.set_defaults()  # before a room below imports ray

_HOME_OF = {
    "check_local_resources": "vae_ray.distributed.connection",
    "clear_state": "vae_ray.distributed.launch",
    "connection": "vae_ray.distributed.connection",
    "fit": "vae_ray.distributed.launch",
    "ray_state": "vae_ray.distributed.launch",
}

__all__ = ["check_local_resources", "clear_state", "connection", "fit", "ray_state"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'vae_ray.distributed' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
