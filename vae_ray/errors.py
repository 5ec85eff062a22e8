"""The errors that a caller can act on. Everything else is a bug and keeps its traceback."""


class UserError(Exception):
    """Something the user can put right: a value, a file, a name, a resource.

    The message is one line that names the key or file, the value received, what is allowed and what to
    try. The command line prints it and exits with code 2; nothing was started and nothing was lost.
    """


class TrainingFailed(Exception):
    """A run that started but could not finish; its last complete checkpoint is kept. Exit code 1."""


class Stopped(Exception):
    """A run that was told to stop, and did so after a checkpoint; `--resume` goes on. Exit code 130."""


class Diverged(TrainingFailed):
    """The loss, the metrics or the weights are no longer finite numbers."""
