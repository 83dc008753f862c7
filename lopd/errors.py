"""Errors that callers can cause.

Each is also the standard-library type that a caller would expect to catch. A message
names the thing, what was found, what was expected and what to do, on one line: the
command line prints it as it is and exits with its code, 2 but for `NoiseError` and
`MemoryPlanError`. The project's own invariants are asserted, not raised.
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
    """A model whose head, context or vocabulary does not fit what is asked of it."""


class ShardError(LopdError, OSError):
    """A shard or receipt is truncated, altered, foreign or missing."""


class ProvenanceError(LopdError, ValueError):
    """Artefacts that do not belong together; each can be overridden by an explicit flag."""


class NoiseError(LopdError, ValueError):
    """A check that ran to its end and found more noise than was allowed; exit code 1."""

    exit_code = 1


class MemoryPlanError(LopdError, ValueError):
    """A plan that needs more memory than there is; exit code 1."""

    exit_code = 1
