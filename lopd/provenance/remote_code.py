"""Code in model folders: never run unless the user allows it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from lopd.errors import LopdError, ModelError

_TRUST: ContextVar[bool] = ContextVar("trust_remote_code", default=False)


def is_code_trusted() -> bool:
    """Whether the Python code of model folders may run."""
    return _TRUST.get()


@contextmanager
def trusting_code(trust: bool) -> Iterator[None]:
    """Decide for a block whether the Python code of model folders may run.

    >>> with trusting_code(True):
    ...     is_code_trusted()
    True
    >>> is_code_trusted()
    False
    """
    token = _TRUST.set(trust)
    try:
        yield
    finally:
        _TRUST.reset(token)


@contextmanager
def loading_code(folder: Path, problem: str) -> Iterator[dict[str, bool]]:
    """Options for transformers to load from a folder: no network, and code only if trusted.

    transformers would otherwise ask on the terminal whether to run the folder's code.

    Args:
        problem: what an error says went wrong, and the remedy.

    Raises:
        ModelError: transformers could not load it, or would have to run code.
    """
    try:
        yield {"local_files_only": True, "trust_remote_code": is_code_trusted()}
    except LopdError:
        raise
    except Exception as error:
        found = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "trust_remote_code" in str(error) and not is_code_trusted():
            problem = (
                "needs the Python code in its folder (auto_map), which is not run; read it and, "
                "if you trust it, pass --trust-remote-code"
            )
        raise ModelError(f"{folder}: {problem} ({found})") from error
