"""Ray Train: from an Experiment to a worker group that trains it. With `tuning/`, all that imports ray."""

from vae_ray.distributed.cluster import check_local_resources, connection
from vae_ray.distributed.trainer import clear_state, fit, ray_state

__all__ = ["check_local_resources", "clear_state", "connection", "fit", "ray_state"]
