"""Ray: from an Experiment to a worker group that trains it; what a cluster is. With `tuning/`, all that imports ray.

Names are loaded when first used: a question to a cluster needs neither torch nor Ray Train.
"""

import importlib
from typing import TYPE_CHECKING, Any

from vae_ray.distributed import environment

if TYPE_CHECKING:
    from vae_ray.distributed.cluster import check_local_resources as check_local_resources
    from vae_ray.distributed.cluster import connection as connection
    from vae_ray.distributed.trainer import RAY_STATE as RAY_STATE
    from vae_ray.distributed.trainer import fit as fit

environment.set_defaults()  # before a room below imports ray

_HOME_OF = {
    "RAY_STATE": "vae_ray.distributed.trainer",
    "check_local_resources": "vae_ray.distributed.cluster",
    "connection": "vae_ray.distributed.cluster",
    "fit": "vae_ray.distributed.trainer",
}

__all__ = ["RAY_STATE", "check_local_resources", "connection", "fit"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'vae_ray.distributed' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
