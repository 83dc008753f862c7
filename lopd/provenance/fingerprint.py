"""Content fingerprints of a Hugging Face model folder, read from its files only."""

import contextlib
import hashlib
import mmap
import os
import struct
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lopd.errors import DataError, MissingFileError, ModelError
from lopd.provenance.behaviour import VOLATILE_CONFIG, behaviour_of, chat_template_digest
from lopd.provenance.folder import (
    eos_ids_of,
    hub_source,
    model_folder,
    read_config,
    read_vocab,
    vocab_size_of,
)
from lopd.provenance.io import (
    canonical_json,
    json_digest,
    parse_json,
    read_json_object,
    read_optional_json,
    remove_dead_writers,
    sha256_file,
    storing,
    without_keys,
    write_atomic,
)
from lopd.provenance.manifest import ModelIdentity

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
VOCAB_NAME = "teacher_vocab.json"
VOCAB_NAMES = "teacher_vocab-{}.json"  # of each tokenizer, where there are several teachers
VOCAB_FILES = "teacher_vocab*.json"  # all of them
# A file modified this recently can change again without a new time stamp.
_RACY_NS = 2_000_000_000


def fingerprint_weights(path: str | Path, *, rehash: bool = False) -> str:
    """sha256, in hex, of a checkpoint's weights, independent of how files shard them.

    Per tensor sha256 over (name, dtype, shape) and bytes; then sha256 over the sorted list of
    (name, digest). The result is stored in the user's cache folder and reused while path, size,
    times and inode of every weight file are unchanged, unless `rehash`.

    Raises:
        MissingFileError: no such folder, or no safetensors weights in it.
        ModelError: a weight file is truncated or does not match the index.
    """
    folder = model_folder(path)
    files = weight_files(folder)
    key, state = str(folder.resolve()), _file_states(files)
    known = _read_memo().get(key)
    if not rehash and isinstance(known, dict) and known.get("files") == state:
        return str(known["weights"])
    tensors: dict[str, str] = {}
    for file in files:
        for name, digest in _tensor_digests(file).items():
            if name in tensors:
                raise ModelError(f"{folder}: tensor '{name}' is in two weight files; keep one")
            tensors[name] = digest
    if files != [folder / WEIGHTS_NAME]:
        _check_index(folder, tensors)
    weights = json_digest(sorted(tensors.items()))
    newest = max(max(entry[2:4]) for entry in state)
    if time.time_ns() - newest > _RACY_NS and _file_states(files) == state:
        memo = {**_read_memo(), key: {"files": state, "weights": weights}}
        with contextlib.suppress(OSError):
            _memo_path().parent.mkdir(parents=True, exist_ok=True)
            remove_dead_writers(_memo_path())
            write_atomic(_memo_path(), canonical_json(memo))
    return weights


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a model folder's weights, sorted by name."""
    if "transformers_weights" in (read_optional_json(folder / "config.json") or {}):
        raise ModelError(
            f"{folder}: config.json names other weights (transformers_weights); remove that key, "
            f"or save the model again as {WEIGHTS_NAME}"
        )
    if (folder / WEIGHTS_NAME).exists():  # which transformers prefers to an index
        names = [WEIGHTS_NAME]
    elif (folder / INDEX_NAME).exists():
        names = sorted({str(name) for name in _weight_map(folder).values()})
    elif any(folder.glob("*.bin")):
        raise MissingFileError(
            f"{folder}: weights only as .bin (pickle); load the model once and save it with "
            "save_pretrained(folder, safe_serialization=True)"
        )
    else:
        raise MissingFileError(
            f"{folder}: neither {WEIGHTS_NAME} nor {INDEX_NAME}; name the folder of a full "
            "Hugging Face checkpoint (merge adapters first)"
        )
    for name in names:
        if not (folder / name).exists():
            raise MissingFileError(f"{folder}: {INDEX_NAME} names {name}, which is not there")
    return [folder / name for name in names]


def config_digest(path: str | Path) -> str:
    """sha256 of config.json without the keys that depend on how it was loaded or saved."""
    return json_digest(without_keys(read_config(path), VOLATILE_CONFIG))


def tokenizer_digest(path: str | Path) -> str:
    """sha256 of the token -> id map; merges and normalisers are not part of it."""
    return json_digest(read_vocab(path))


def describe_model(path: str | Path, *, dtype: str, engine: str) -> ModelIdentity:
    """The identity of a model folder, for manifests.

    Args:
        dtype, engine: how the model is run, which decides the numerics.
    """
    return ModelIdentity.from_json(
        {
            "path": str(model_folder(path).resolve()),
            "weights": fingerprint_weights(path),
            "config": config_digest(path),
            "tokenizer": tokenizer_digest(path),
            "chat_template": chat_template_digest(path),
            "behaviour": behaviour_of(path),
            "eos_ids": eos_ids_of(path),
            "hub": hub_source(path),
            "vocab_size": vocab_size_of(path),
            "dtype": dtype,
            "engine": engine,
        }
    )


def describe_file(path: str | Path) -> dict[str, Any]:
    """An input file for a manifest: its path, size and sha256."""
    file = Path(path)
    if not file.is_file():
        raise MissingFileError(f"{file} is not a file; name an existing one")
    size = file.stat().st_size
    return {"path": str(file.resolve()), "bytes": size, "sha256": sha256_file(file)}


def save_vocab(model_path: str | Path, folder: str | Path, *, one_of_several: bool = False) -> Path:
    """Store a model's token -> id map beside its answers or scores, for later comparisons.

    Args:
        one_of_several: whether the folder has several teachers; the file's name then has a part of
            the tokenizer's digest.

    Raises:
        ShardError: the file cannot be written, e.g. on a full disk.
    """
    named = VOCAB_NAMES.format(tokenizer_digest(model_path)[:12])
    file = Path(folder) / (named if one_of_several else VOCAB_NAME)
    vocab = canonical_json(read_vocab(model_path)) + b"\n"
    with storing(file):
        write_atomic(file, vocab)
    return file


def vocab_file(folder: str | Path, tokenizer: str | None = None) -> Path:
    """Where `save_vocab` stored the map of the tokenizer with this digest."""
    named = Path(folder) / VOCAB_NAMES.format((tokenizer or "")[:12])
    return named if named.exists() else Path(folder) / VOCAB_NAME


def load_vocab(folder: str | Path, tokenizer: str | None = None) -> dict[str, int]:
    """The map that `save_vocab` stored, of the tokenizer with this digest if there are several."""
    file = vocab_file(folder, tokenizer)
    if not file.exists():
        raise MissingFileError(f"{file} does not exist; run 'lopd score' again to write it")
    vocab = read_json_object(file)
    if bad := [token for token, index in vocab.items() if type(index) is not int]:
        raise DataError(f"{file}: token {bad[0]!r} has no integer id; run 'lopd score' again")
    return vocab


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_json_object(folder / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / INDEX_NAME} has no weight_map; save the model again")
    return weight_map


def _check_index(folder: Path, tensors: dict[str, str]) -> None:
    expected = set(_weight_map(folder))
    if expected != set(tensors):
        odd = sorted(expected ^ set(tensors))[0]
        raise ModelError(
            f"{folder}: tensor '{odd}' is in only one of {INDEX_NAME} and the weight files; "
            "save the model again"
        )


def _tensor_digests(file: Path) -> dict[str, str]:
    """tensor name -> sha256 over (name, dtype, shape) and bytes, from one safetensors file."""
    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        message = f"{file} is truncated or altered ({error}); copy or save it again"
        raise ModelError(message) from error
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        try:
            header = parse_json(stream.read(length))
        except ValueError as error:
            raise ModelError(f"{file} has an invalid header ({error}); save it again") from error
        header.pop("__metadata__", None)
        with (
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
            view[8 + length :] as data,
        ):
            return {name: _tensor_digest(name, spec, data) for name, spec in header.items()}


def _tensor_digest(name: str, spec: dict[str, Any], data: memoryview) -> str:
    start, end = spec["data_offsets"]
    digest = hashlib.sha256(canonical_json([name, spec["dtype"], spec["shape"]]))
    with data[start:end] as tensor:
        digest.update(tensor)
    return digest.hexdigest()


def _file_states(files: list[Path]) -> list[list[Any]]:
    """[name, size, modification and change time in ns, device, inode] of every file.

    A program can set the modification time back, but not the change time.
    """
    states = ((file, file.stat()) for file in files)
    return [
        [file.name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_dev, s.st_ino]
        for file, s in states
    ]


def forget_fingerprints() -> None:
    """Delete all stored fingerprints, so that weights are hashed again."""
    _memo_path().unlink(missing_ok=True)


def _memo_path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lopd" / "fingerprints.json"


def _read_memo() -> dict[str, Any]:
    """The stored fingerprints; empty if they cannot be read."""
    try:
        value = parse_json(_memo_path().read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
