"""The errors that a caller can act on. Everything else is a bug and keeps its traceback."""


class UserError(Exception):
    """Something the user can put right: a value, a file, a name, a resource.

    The message is one line that names the key or file, the value received, what is allowed and what to
    try. The command line prints it and exits with code 2; nothing was started and nothing was lost.
    """


class CorruptFile(UserError):
    """A file whose content is not what was written, or cannot be what it should be; the message begins with its name.

    Other copies may be intact: a reader that finds one of several corrupt warns and takes the next.
    """


class TrainingFailed(Exception):
    """A run that started but could not finish; its last complete checkpoint is kept. Exit code 1."""


class WorkersFailed(TrainingFailed):
    """Ray could not finish a run with its workers; the message is the reason alone."""


class Stopped(Exception):
    """A run that stopped on request, after a checkpoint; `vae-ray resume` continues it. Exit code 130."""


class Diverged(TrainingFailed):
    """The loss, the metrics or the weights are no longer finite numbers."""


def one_line(text: object) -> str:
    """The words of a text or an error on one line, for a message; escapes what a terminal would act on."""
    line = " ".join(str(text).split())
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
