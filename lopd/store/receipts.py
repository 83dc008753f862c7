"""Receipts of shards: what a finished shard holds, and digests that bind both."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lopd.errors import ShardError
from lopd.provenance.io import json_digest, parse_json
from lopd.provenance.typed_json import parse
from lopd.store.types import FINISH_REASONS

SCHEMA = 2
SCHEMAS = (1, 2)  # 1 has no digests of the receipt
_OF_THE_FILE = ("schema", "bytes", "sha256", "digest")
_OF_THE_MARK = ("kind", "recipe", "shard")


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What a shard holds; `raw` is the JSON object on disk."""

    schema: int
    kind: str
    recipe: str
    shard: int
    sequences: int
    bytes: int
    sha256: str
    tokens: int
    response_tokens: int
    finish_reasons: Mapping[str, int]
    index_sha256: str | None = None
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def mark(self) -> dict[str, Any]:
        """What the header of the shard repeats: whose shard it is, and a digest of the counts."""
        return mark_of(self.raw)


@dataclass(frozen=True, kw_only=True)
class CacheReceipt(Receipt):
    """What a shard of a cache holds: sums over its response tokens."""

    list_entries: int
    covered_mass: float
    entropy: float | None = None  # None: the engine does not compute it
    floored_tails: int
    codec_error: float | None = None  # None: not measured when it was written


def mark_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The mark that goes with the content of a receipt."""
    mark = {key: content[key] for key in _OF_THE_MARK}
    if content["schema"] > 1:
        left_out = (*_OF_THE_MARK, *_OF_THE_FILE)
        mark["counts"] = json_digest({k: v for k, v in content.items() if k not in left_out})
    return mark


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content with a digest over all of it."""
    return {**content, "digest": json_digest(content)}


def parse_receipt(data: bytes, file: Path, **expected: Any) -> Receipt | CacheReceipt:
    """The receipt in these bytes.

    Args:
        file: where they were read, for messages.
        expected: kind, shard, recipe and sequences by the manifest.

    Raises:
        ShardError: names the file and the fault.
    """
    try:
        raw = parse_json(data)
    except ValueError as error:
        raise ShardError(f"{file}: not JSON ({error}); run the stage again to redo it") from error
    if not data.endswith(b"\n"):
        raise ShardError(f"{file}: its last byte is missing: torn; run the stage again to redo it")
    if not isinstance(raw, dict) or raw.get("schema") not in SCHEMAS:
        found = raw.get("schema") if isinstance(raw, dict) else None
        raise altered(file, f"schema is {found!r}, expected one of {SCHEMAS}")
    content = {key: value for key, value in raw.items() if key != "digest"}
    if raw["schema"] > 1 and raw.get("digest") != json_digest(content):
        raise altered(file, "its content does not match its digest")
    for key, value in expected.items():
        if raw.get(key) != value:
            raise ShardError(
                f"{file}: {key} is {raw.get(key)!r}, the manifest expects {value!r}: this receipt "
                "or manifest.json is of another run; run the stage again to redo the shard, or "
                "restore manifest.json if the stage refuses the folder"
            )
    cls = CacheReceipt if expected["kind"] == "cache" else Receipt
    if cls is CacheReceipt and "entropy" not in raw:  # which may be null
        raise _unfit(file, "entropy")
    receipt = parse(cls, raw, "", partial(_unfit, file))
    numbers = {**vars(receipt), **receipt.finish_reasons}
    for name, value in numbers.items():
        if (isinstance(value, int) and value < 0) or value in (math.inf, -math.inf):
            raise altered(file, f"'{name}' is {value}")
    reasons = receipt.finish_reasons
    if reasons.keys() != {*FINISH_REASONS} or any(type(n) is not int for n in reasons.values()):
        raise _unfit(file, "finish_reasons")
    return receipt


def altered(path: Path, what: str) -> ShardError:
    """The error of a file whose contents are not those that were written."""
    return ShardError(f"{path}: {what}: altered; run the stage again to redo it")


def _unfit(file: Path, name: str) -> ShardError:
    return altered(file, f"'{name}' is missing or has another type")
