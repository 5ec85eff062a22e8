"""Ray Train: from an Experiment to a worker group that trains it. With `tuning/`, all that imports ray."""

from vae_ray.distributed.cluster import check_local_resources, connection
from vae_ray.distributed.trainer import RAY_STATE, fit

__all__ = ["RAY_STATE", "check_local_resources", "connection", "fit"]
