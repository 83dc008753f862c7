"""Shard files and their receipts, in folders of kind sft_data, rollouts and cache."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
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
from lopd.store.mapped import MappedFile
from lopd.store.receipts import (
    SCHEMA,
    CacheReceipt,
    Receipt,
    altered,
    mark_of,
    parse_receipt,
    sealed,
)


def shard_path(folder: Path, shard: int) -> Path:
    """The path of shard number `shard`."""
    return folder / f"shard-{shard:05d}.safetensors"


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
    content = {"schema": SCHEMA, "kind": kind, "recipe": recipe, "shard": shard, **counts}
    mark = canonical_json(mark_of(content)).decode("ascii")
    data = save(dict(arrays), metadata={"lopd": mark})
    content |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    note = "finished shards are intact: "
    with storing(receipt, note):
        if receipt.exists():
            receipt.unlink()
            sync_folder(folder)
    with storing(path, note):
        write_atomic(path, data)
    with storing(receipt, note):
        write_atomic(receipt, pretty_json(sealed(content)))


def read_receipt(
    folder: Path, shard: int, *, kind: str, recipe: str, sequences: int
) -> Receipt | CacheReceipt:
    """The receipt of a shard that exists, belongs to the recipe and has the expected size.

    Raises:
        ShardError: names the shard or receipt, and the fault.
    """
    path, file = shard_path(folder, shard), receipt_path(folder, shard)
    if not file.exists():
        what = "receipt" if path.exists() else "shard and its receipt"
        raise ShardError(f"{file}: the {what} is missing; run the stage again to write it")
    expected = {"kind": kind, "shard": shard, "recipe": recipe, "sequences": sequences}
    receipt = parse_receipt(file.read_bytes(), file, **expected)
    if not path.exists():
        raise ShardError(f"{path}: the shard is missing; run the stage again to write it")
    size = path.stat().st_size
    if size != receipt.bytes:
        raise ShardError(
            f"{path}: {size} bytes, the receipt says {receipt.bytes}: truncated or "
            "altered; run the stage again to redo it"
        )
    return receipt


def check_hash(folder: Path, receipt: Receipt) -> None:
    """Compare a shard's bytes with its receipt.

    Raises:
        ShardError: they differ.
    """
    path = shard_path(folder, receipt.shard)
    found = sha256_file(path)
    if found != receipt.sha256:
        raise altered(path, f"sha256 {found[:12]}, the receipt says {receipt.sha256[:12]}")


def open_shard(folder: Path, receipt: Receipt) -> MappedFile:
    """The file of a shard, mapped.

    Raises:
        ShardError: not a safetensors file, or not the shard of this receipt.
    """
    path = shard_path(folder, receipt.shard)
    file = MappedFile(path)
    try:
        mark = parse_json(file.metadata.get("lopd", "null"))
    except ValueError as error:
        raise altered(path, f"its mark is not JSON ({error})") from error
    if mark == receipt.mark:
        return file
    if isinstance(mark, dict) and {**mark, "counts": None} == {**receipt.mark, "counts": None}:
        raise altered(path, f"its counts are not those of {receipt_path(folder, receipt.shard)}")
    raise ShardError(
        f"{path}: marked {mark}, expected {receipt.mark}: a foreign shard; run the stage again"
    )


def check_offsets(path: Path, name: str, offsets: np.ndarray, count: int, total: int) -> None:
    """Check that offsets are [count + 1], start at 0, do not decrease, and end at `total`.

    Raises:
        ShardError: they are not.
    """
    good = offsets.shape == (count + 1,) and offsets[0] == 0 and offsets[-1] == total
    if not (good and (np.diff(offsets) >= 0).all()):
        raise altered(path, f"{name} do not divide {total} entries among {count}")
