"""Ray Train: the connection to a cluster, its nodes and resources, and the worker group that trains an Experiment.

Importing this package sets Ray's environment variables; it imports neither ray nor torch.
"""

from vae_ray.distributed import environment

environment.set_defaults()  # before a module of this package imports ray
