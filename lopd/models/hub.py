"""Hub ids as model folders, through huggingface_hub: its cache, its offline mode, revisions."""

import re
from pathlib import Path
from typing import Any

from lopd.errors import MissingFileError

_HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")
# What a model folder is loaded from; no weights in other formats.
FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py"]


def local_folder(name: str) -> str:
    """The local folder of a model: a path as it is, a hub id as its snapshot in the cache.

    Args:
        name: a path, or `org/name` or `org/name@revision`; what exists is always a path, and so is
            a name in a folder that exists.

    Returns:
        The path. A snapshot is downloaded if it is not in the cache and the network may be used.

    Raises:
        MissingFileError: the hub id cannot be resolved: unknown, gated, or not cached and offline.

    >>> local_folder("models/../teacher/student")
    'models/../teacher/student'
    """
    path, match = Path(name), _HUB_ID.fullmatch(name)
    if match is None or path.exists() or path.parent.is_dir():
        return name
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted: Any = {"repo_id": match["name"], "revision": match["revision"], "allow_patterns": FILES}
    try:
        try:
            return snapshot_download(**wanted)
        except (LocalEntryNotFoundError, ConnectionError):  # the hub was needed only to list files
            return snapshot_download(**wanted, local_files_only=True)
    except LocalEntryNotFoundError as error:
        raise MissingFileError(
            f"{name}: no such folder, and as a hub id it is not in the local cache and the hub is "
            f"offline or cannot be reached; run 'hf download {match['name']}' where it can, unset "
            "HF_HUB_OFFLINE, or name a local folder"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        found = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MissingFileError(
            f"{name}: no such folder, and the hub does not provide it ({found}); check the id and "
            "revision, log in with 'hf auth login' if it is gated, or name a local folder"
        ) from error
