"""Ray Train: the connection to a cluster, its nodes and resources, and the worker group that trains an Experiment.

Importing this package sets Ray's environment variables, before Ray reads them; it imports neither ray nor torch. It
raises `UserError` without a home directory: importing ray.train would raise a bare RuntimeError.
"""

import os

from vae_ray.errors import UserError

RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # A report waits for the controller's next poll: at the default of 2 s short epochs wait for Ray.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # A worker without an answer for so long is hung; it answers in its own thread. Ray's default is ten minutes.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "15",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # the default waits 30 s for a lost worker
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Ray prints the death of a worker to our output; `failures` says it in one line if the run ends with it.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "^A worker died or was killed|killed due to memory pressure",
    "RAY_AIR_NEW_OUTPUT": "0",  # only Tune's older output can be silenced; `tuning.progress` replaces it
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a run directory has its own metrics and TensorBoard events
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's future default; without it Ray warns at every start
}
"""Defaults of this process, its children and jobs; a variable that the user has set stays."""

for _name, _value in RAY_ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

if os.path.expanduser("~") == "~":
    raise UserError("HOME: not set, and this user has no home directory, which Ray needs; set HOME to a directory")
