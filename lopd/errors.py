"""Errors that callers can cause.

Each is also the standard-library type that a caller would expect to catch. A message is one line:
the name, what was found, what was expected and the remedy. The command line prints it and exits
with its code, 1 for `NoiseError` and `MemoryPlanError` and 2 for all others. Internal invariants
are asserted.
"""


class LopdError(Exception):
    """Base of every error that lopd raises on purpose."""

    exit_code = 2


class ConfigError(LopdError, ValueError):
    """A setting is unknown, missing, out of range, or contradicts another."""


class MissingFileError(LopdError, FileNotFoundError):
    """A file or folder that was named does not exist."""


class DataError(LopdError, ValueError):
    """Prompts, token ids or teacher scores that cannot be used."""


class ModelError(LopdError, ValueError):
    """A model whose head, context or vocabulary does not fit the task."""


class ShardError(LopdError, OSError):
    """A shard or receipt is truncated, altered, foreign or missing."""


class ProvenanceError(LopdError, ValueError):
    """Artefacts that do not belong together."""


class NoiseError(LopdError, ValueError):
    """A completed check found more noise than allowed; exit code 1."""

    exit_code = 1


class MemoryPlanError(LopdError, ValueError):
    """A training run needs more memory than the GPU has; exit code 1."""

    exit_code = 1


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM stopped a stage; the exit code is 128 plus the number of the signal.

    Args:
        signum: the signal.
        kept: what was kept, and how to go on; empty if nobody knows better than the command line.
        orderly: whether all processes of the run stop at the same point.
    """

    def __init__(self, signum: int, kept: str = "", *, orderly: bool = False) -> None:
        super().__init__(kept)
        self.signum, self.orderly = signum, orderly
        self.exit_code = 128 + signum
