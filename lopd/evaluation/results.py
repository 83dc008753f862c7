"""The results of an evaluation, read from a folder that `lopd eval` wrote, and checked."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lopd.errors import DataError, ShardError
from lopd.provenance.folder_receipt import RECEIPT_NAME, check_receipt
from lopd.provenance.io import parse_json
from lopd.provenance.typed_json import parse

RESULTS_NAME = "results.json"
_ACCURACY = re.compile(r"greedy|(avg|pass)@\d{1,6}")


@dataclass(frozen=True, kw_only=True)
class _Mean:
    """An accuracy and its interval of 95 %."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class _Length:
    """The answers of similar length."""

    shortest: int
    longest: int
    count: int
    accuracy: float
    truncated: float


@dataclass(frozen=True, kw_only=True)
class _Divergence:
    """A KL on the model's own answers; what only some versions or kinds have is None."""

    nats_per_token: float
    standard_error: float | None = None
    k: int | None = None
    exact: bool | None = None
    outside_lists: float | None = None
    sequences: int | None = None
    held_out: bool | None = None
    by_teacher: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class _Results:
    """What is read by name; accuracies are found by their names."""

    prompts: int
    samples: int
    truncated: float | None = None
    no_answer: float | None = None
    mean_tokens: float | None = None
    by_length: tuple[_Length, ...] = ()
    kl: _Divergence | None = None
    cache_kl: _Divergence | None = None
    raw: Mapping[str, Any] = field(repr=False)


def read_results(out: Path) -> dict[str, Any]:
    """The results of a finished evaluation, which its receipt must confirm.

    Evaluations of earlier versions have no receipt.

    Raises:
        DataError: they are torn or altered, or a value is missing or has another type.
    """
    file = out / RESULTS_NAME
    try:
        if (out / RECEIPT_NAME).exists():
            check_receipt(out)
        found = parse_json(file.read_bytes())
    except ShardError as error:
        raise DataError(f"{error}, or remove {out}") from error
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file}: torn or altered ({error}); restore it, or remove {out}"
        ) from error

    def unfit(name: str) -> DataError:
        return DataError(
            f"{file}: has no {name}, or one of another type: altered; restore it, or remove {out}"
        )

    known = parse(_Results, found, "", unfit)
    by_teacher = (known.cache_kl and known.cache_kl.by_teacher) or {}
    if any(type(value) is not float for value in by_teacher.values()):
        raise unfit("cache_kl.by_teacher")
    for name in accuracies(found):
        parse(_Mean, found[name], f"{name}.", unfit)
    return {name: value for name, value in found.items() if value is not None}


def accuracies(results: Mapping[str, Any]) -> list[str]:
    """The names of accuracies, in the order in which they are shown: pass@k by k."""
    return sorted(filter(_ACCURACY.fullmatch, results), key=_by_number)


def _by_number(name: str) -> tuple[str, int]:
    """Orders greedy and avg@n before pass@k, by k."""
    kind, _, number = name.partition("@")
    return ("" if kind == "greedy" else kind, int(number or 0))
