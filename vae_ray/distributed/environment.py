"""Ray's settings in this package. Ray reads them when it is imported or started, so they come before both."""

from __future__ import annotations

import os

DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # A report waits for the controller's next poll: at the default of 2 s short epochs would wait for Ray.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # A worker that says nothing for so long is hung; Ray's default is ten minutes. It answers in a thread of its own.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "15",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # a lost worker does not take part; Ray would wait 30 s for it
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # only Tune's older output can be silenced; our own view tells what happens
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a trial's run directory has its own metrics and TensorBoard events
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the future default; without it Ray warns at every start
}


def set_defaults() -> None:
    """Set them in this process and in those that it starts; a user's own settings stay."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
