"""Shard files and their receipts, in folders of kind sft_data, rollouts and cache."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lopd.errors import ShardError
from lopd.provenance.io import (
    canonical_json,
    parse_json,
    pretty_json,
    sha256_file,
    storing,
    sync_folder,
    write_atomic,
)

RECEIPT_SCHEMA = 1
COUNTS = ("bytes", "sha256", "tokens", "response_tokens", "finish_reasons")
SCORE_COUNTS = ("list_entries", "covered_mass", "entropy", "floored_tails")


def shard_path(folder: Path, shard: int) -> Path:
    """The path of shard number `shard`."""
    return folder / f"shard-{shard:05d}.safetensors"


def altered(path: Path, what: str) -> ShardError:
    """The error of a file whose contents are not those that were written."""
    return ShardError(f"{path}: {what}: altered; run the stage again to redo it")


def receipt_path(folder: Path, shard: int) -> Path:
    """The path of its receipt."""
    return folder / f"shard-{shard:05d}.json"


def write_shard(
    folder: Path,
    shard: int,
    arrays: Mapping[str, np.ndarray],
    *,
    kind: str,
    recipe: str,
    counts: Mapping[str, Any],
) -> None:
    """Write a shard and then its receipt, each atomically; an old receipt is removed first.

    Raises:
        ShardError: a file cannot be written, e.g. on a full disk; finished shards are intact.
    """
    path, receipt = shard_path(folder, shard), receipt_path(folder, shard)
    mark = {"kind": kind, "recipe": recipe, "shard": shard}
    data = save(dict(arrays), metadata={"lopd": canonical_json(mark).decode("ascii")})
    content = {
        **mark,
        **counts,
        "schema": RECEIPT_SCHEMA,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    note = "finished shards are intact: "
    with storing(receipt, note):
        if receipt.exists():
            receipt.unlink()
            sync_folder(folder)
    with storing(path, note):
        write_atomic(path, data)
    with storing(receipt, note):
        write_atomic(receipt, pretty_json(content))


def read_receipt(folder: Path, shard: int, *, kind: str, recipe: str, sequences: int) -> dict:
    """The receipt of a shard that exists, belongs to the recipe and has the expected size.

    Raises:
        ShardError: names the shard or receipt, and the fault.
    """
    path, file = shard_path(folder, shard), receipt_path(folder, shard)
    if not file.exists():
        what = "receipt" if path.exists() else "shard and its receipt"
        raise ShardError(f"{file}: the {what} is missing; run the stage again to write it")
    data = file.read_bytes()
    try:
        receipt = parse_json(data)
    except ValueError as error:
        raise ShardError(f"{file}: not JSON ({error}); run the stage again to redo it") from error
    if not data.endswith(b"\n"):
        raise ShardError(f"{file}: its last byte is missing: torn; run the stage again to redo it")
    expected = {
        "schema": RECEIPT_SCHEMA,
        "kind": kind,
        "shard": shard,
        "recipe": recipe,
        "sequences": sequences,
    }
    for key, value in expected.items():
        found = receipt.get(key) if isinstance(receipt, dict) else None
        if found != value:
            raise ShardError(
                f"{file}: {key} is {found!r}, the manifest expects {value!r}: a foreign or "
                "altered receipt; run the stage again to redo it"
            )
    absent = sorted({*COUNTS, *(SCORE_COUNTS if kind == "cache" else ())} - receipt.keys())
    if absent:
        raise altered(file, f"'{absent[0]}' is missing")
    if not path.exists():
        raise ShardError(f"{path}: the shard is missing; run the stage again to write it")
    size = path.stat().st_size
    if size != receipt.get("bytes"):
        raise ShardError(
            f"{path}: {size} bytes, the receipt says {receipt.get('bytes')}: truncated or "
            "altered; run the stage again to redo it"
        )
    return receipt


def check_hash(folder: Path, receipt: Mapping[str, Any]) -> None:
    """Compare a shard's bytes with its receipt.

    Raises:
        ShardError: they differ.
    """
    path = shard_path(folder, receipt["shard"])
    found = sha256_file(path)
    if found != receipt["sha256"]:
        expected = str(receipt["sha256"])[:12]
        raise altered(path, f"sha256 {found[:12]}, the receipt says {expected}")


def open_shard(folder: Path, receipt: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a shard as read-only views of the mapped file.

    Raises:
        ShardError: not a safetensors file, or marked as part of another store.
    """
    path = shard_path(folder, receipt["shard"])
    try:
        file = safe_open(path, framework="numpy")
        mark = parse_json((file.metadata() or {}).get("lopd", "null"))
        arrays = {name: _read_only(file, name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ShardError(
            f"{path}: truncated or altered ({error}); run the stage again to redo it"
        ) from error
    expected = {key: receipt[key] for key in ("kind", "recipe", "shard")}
    if mark != expected:
        raise ShardError(
            f"{path}: marked {mark}, expected {expected}: a foreign shard; run the stage again"
        )
    return arrays


def _read_only(file: Any, name: str) -> np.ndarray:
    part = file.get_slice(name)
    # safetensors cannot slice an empty tensor, so it is copied.
    view = part[:] if 0 not in part.get_shape() else file.get_tensor(name)
    view.flags.writeable = False
    return view


def check_offsets(path: Path, name: str, offsets: np.ndarray, count: int, total: int) -> None:
    """Check that offsets are [count + 1], start at 0, do not decrease, and end at `total`.

    Raises:
        ShardError: they are not.
    """
    good = offsets.shape == (count + 1,) and offsets[0] == 0 and offsets[-1] == total
    if not (good and (np.diff(offsets) >= 0).all()):
        raise altered(path, f"{name} do not divide {total} entries among {count}")
