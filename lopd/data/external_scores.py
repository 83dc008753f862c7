"""Teacher scores in the formats of other tools, one sequence per record.

`lightning-opd` is the parquet of the paper's code: `prompt`, text with the chat template applied,
and a struct `metadata` of `is_lightning_opd`, `response_tokens`, `loss_mask`, `response` and
`teacher_log_probs` (of the response tokens). There is no list and no tail.

`topk` holds log-probs in JSONL or parquet, as written by users of vLLM:

    prompt_token_ids      list of ids
    response_token_ids    list of ids, or `token_ids`
    logprobs              one entry per response token: {"id": logprob, ...},
                          {"id": {"logprob": x, ...}, ...}, [[id, logprob], ...] or
                          [{"token_id": id, "logprob": x}, ...]

`topk_ids` and `topk_logprobs`, one list each per response token, may replace `logprobs`.
`prompt_length` and vLLM's `prompt_logprobs` may replace `response_token_ids` and `logprobs`; then
`prompt_token_ids` is prompt and response, and entry t belongs to token t.

Optional: `teacher_logprobs` (of the response tokens, for lists that lack them), `rollout_logprobs`,
`loss_mask` (of the response), `finish_reason`, `id` and `sample`.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lopd.config.import_scores import Format
from lopd.data.records import read_records
from lopd.errors import ConfigError, DataError, LopdError
from lopd.store import FINISH_REASONS, Rollout, TopKLists
from lopd.store.validate import MASS_TOLERANCE

_LIGHTNING = ("is_lightning_opd", "response_tokens", "loss_mask", "teacher_log_probs")
_TOPK = (
    {"response_token_ids", "logprobs"},
    {"token_ids", "logprobs"},
    {"response_token_ids", "topk_ids", "topk_logprobs"},
    {"token_ids", "topk_ids", "topk_logprobs"},
    {"prompt_length", "prompt_logprobs"},
)


@dataclass(frozen=True)
class Dumped:
    """One sequence of a dump, with a list sorted by log-prob at each of R response tokens."""

    where: str
    rollout: Rollout
    teacher_logprobs: np.ndarray  # [R] fp64, of the response tokens
    lists: TopKLists  # int64 ids, fp64 log-probs


def read_dump(
    path: str | Path, form: Format, tokenizer: Any | None, eos_ids: Sequence[int] = ()
) -> Iterator[Dumped]:
    """The sequences of a file, in order.

    Args:
        tokenizer: of the student; encodes the prompts of `lightning-opd`.
        eos_ids: of the student; a response that ends with one has finish reason "stop" where the
            record has no `finish_reason`.

    Raises:
        DataError: a record is not of the format; names the record and the fault.
        MissingFileError, ConfigError: as `read_records`; `tokenizer` or `eos_ids` is needed.
    """
    seen: Counter[str] = Counter()
    for where, record in read_records(path):
        parse = _lightning if form == "lightning-opd" else _topk
        try:
            dumped = _assemble(where, parse(where, record, tokenizer), eos_ids, seen)
        except LopdError:
            raise
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{where}: a field has another type than in format '{form}' ({error})"
            ) from error
        yield dumped


def _lightning(where: str, record: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    metadata = record.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(record.get("prompt"), str):
        raise DataError(
            f"{where}: found columns {sorted(record)}; expected 'prompt' as text and a struct "
            "'metadata', as the paper's code writes them"
        )
    absent = [name for name in _LIGHTNING if name not in metadata]
    if absent or metadata["is_lightning_opd"] is not True:
        what = f"no '{absent[0]}'" if absent else "is_lightning_opd not true"
        raise DataError(
            f"{where}: metadata has {what}; expected the file with the teacher's log-probs "
            "(its name ends with -precomputed)"
        )
    if tokenizer is None:
        raise ConfigError(f"{where}: prompts are text; name the folder of the student")
    response = metadata["response_tokens"]
    return {
        "prompt": tokenizer.encode(record["prompt"], add_special_tokens=False),
        "response": response,
        "mask": metadata["loss_mask"],
        "teacher": metadata["teacher_log_probs"],
        "lists": [{}] * len(response),
    }


def _topk(where: str, record: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    forms = [keys for keys in _TOPK if keys <= record.keys()]
    if "prompt_token_ids" not in record or len(forms) != 1:
        raise DataError(
            f"{where}: found {sorted(record)}; expected 'prompt_token_ids' and either "
            "'response_token_ids' with 'logprobs' or with 'topk_ids' and 'topk_logprobs', or "
            "'prompt_length' and 'prompt_logprobs'"
        )
    prompt = record["prompt_token_ids"]
    response = record.get("response_token_ids", record.get("token_ids"))
    lists = record.get("logprobs")
    if "topk_ids" in forms[0]:
        lists = _paired(where, record["topk_ids"], record["topk_logprobs"])
    elif "prompt_length" in forms[0]:
        length, lists = record["prompt_length"], record["prompt_logprobs"]
        if len(lists) != len(prompt) or not 0 < length < len(prompt):
            raise DataError(
                f"{where}: {len(lists)} prompt_logprobs for {len(prompt)} tokens with a "
                f"prompt_length of {length}; expected one for each token, and a response"
            )
        prompt, response, lists = prompt[:length], prompt[length:], lists[length:]
    return {
        "prompt": prompt,
        "response": response,
        "mask": record.get("loss_mask"),
        "teacher": record.get("teacher_logprobs"),
        "lists": lists,
        "rollout": record.get("rollout_logprobs"),
        "finish": record.get("finish_reason"),
        **{key: record[key] for key in ("id", "sample") if key in record},
    }


def _paired(where: str, ids: list[Any], logprobs: list[Any]) -> list[list[Any]]:
    """Lists of (id, log-prob) from lists of ids and lists of log-probs."""
    if [*map(len, ids)] != [*map(len, logprobs)]:
        raise DataError(f"{where}: topk_ids and topk_logprobs differ in length")
    return [[*zip(*row, strict=True)] for row in zip(ids, logprobs, strict=True)]


def _assemble(
    where: str, fields: dict[str, Any], eos_ids: Sequence[int], seen: Counter[str]
) -> Dumped:
    prompt = _numbers(where, "prompt token ids", fields["prompt"], np.int32)
    response = _numbers(where, "response token ids", fields["response"], np.int32)
    if not len(prompt) or not len(response):
        raise DataError(
            f"{where}: {len(prompt)} prompt and {len(response)} response tokens; expected at "
            "least one of each; drop the record"
        )
    count = len(response)
    for name in ("mask", "teacher", "lists", "rollout"):
        value = fields.get(name)
        if value is not None and len(value) != count:
            raise DataError(
                f"{where}: {len(value)} entries of {_NAMES[name]} for {count} response tokens"
            )
    entries = [_entries(f"{where}: response token {t}", e) for t, e in enumerate(fields["lists"])]
    ids, logprobs = zip(*entries, strict=True)
    lists = TopKLists(
        np.concatenate(ids), np.concatenate(logprobs), np.array([len(part) for part in ids])
    )
    mask = np.ones(count, np.int32)
    if fields["mask"] is not None:
        mask = _numbers(where, _NAMES["mask"], np.array(fields["mask"]) + 0, np.int32)
    if not np.isin(mask, (0, 1)).all():
        raise DataError(f"{where}: loss_mask holds {mask.min()} to {mask.max()}; expected 0 and 1")
    rollout_logprobs = np.full(count, np.nan, np.float32)
    if fields.get("rollout") is not None:
        rollout_logprobs = _numbers(where, _NAMES["rollout"], fields["rollout"], np.float32)
    digest = hashlib.sha256(prompt.astype("<i4").tobytes()).hexdigest()[:16]
    prompt_id = str(fields.get("id", digest))
    sample = int(fields.get("sample", seen[prompt_id]))
    rollout = Rollout(
        prompt_id=prompt_id,
        sample=sample,
        tokens=np.concatenate([prompt, response]),
        prompt_length=len(prompt),
        finish_reason=_finish(where, fields.get("finish"), int(response[-1]), eos_ids),
        loss_mask=np.concatenate([np.zeros(len(prompt), bool), mask == 1]),
        rollout_logprobs=rollout_logprobs,
        rollout_logprobs_raw=rollout_logprobs,
    )
    seen[prompt_id] += 1
    return Dumped(
        where=where,
        rollout=rollout,
        teacher_logprobs=_teacher_logprobs(where, response, fields["teacher"], lists),
        lists=lists,
    )


_NAMES = {
    "mask": "loss_mask",
    "teacher": "the teacher's log-probs",
    "lists": "log-probs",
    "rollout": "rollout_logprobs",
}


def _teacher_logprobs(
    where: str, response: np.ndarray, dumped: Any, lists: TopKLists
) -> np.ndarray:  # [R] fp64
    if dumped is not None:
        return _numbers(where, _NAMES["teacher"], dumped, np.float64)
    absent = np.flatnonzero(~lists.contains(response))
    if len(absent):
        raise DataError(
            f"{where}: response token {absent[0]} (id {response[absent[0]]}) is not in its list; "
            "dump its log-prob too (vLLM always does), or add 'teacher_logprobs'"
        )
    return lists.row_sums(np.where(lists.ids == response[lists.rows], lists.logprobs, 0.0))


def _entries(where: str, entry: Any) -> tuple[np.ndarray, np.ndarray]:  # ids, log-probs, [n]
    """One list, in any of its forms, sorted by descending log-prob."""
    pairs: Any = entry.items() if isinstance(entry, dict) else entry
    try:
        if isinstance(entry, list) and entry and isinstance(entry[0], dict):
            pairs = [(item["token_id"], item["logprob"]) for item in entry]
        entries = [
            (_token_id(token), float(value["logprob"] if isinstance(value, dict) else value))
            for token, value in pairs
        ]
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"{where}: {_short(entry)} is not a list of log-probs; expected {{id: logprob}}, "
            "[[id, logprob], ...] or [{'token_id': id, 'logprob': x}, ...]"
        ) from None
    entries.sort(key=lambda pair: (-pair[1], pair[0]))
    ids = np.array([token for token, _ in entries], np.int64)
    if len(np.unique(ids)) != len(ids):
        raise DataError(f"{where}: an id is listed twice; expected distinct ids")
    logprobs = np.array([value for _, value in entries])
    mass = np.exp(logprobs).sum()
    if not (np.isfinite(logprobs).all() and mass <= 1 + MASS_TOLERANCE):
        raise DataError(
            f"{where}: a list of mass {mass:.6g}; expected finite natural logs of probabilities "
            "that sum to at most 1"
        )
    return ids, logprobs


def _token_id(token: Any) -> int:
    if not isinstance(token, int | str):
        raise TypeError(f"{token!r} is not an id")
    return int(token)


def _finish(where: str, reason: Any, last: int, eos_ids: Sequence[int]) -> str:
    if reason in FINISH_REASONS:
        return str(reason)
    if reason is not None:
        raise DataError(
            f"{where}: finish_reason is {reason!r}; expected {' or '.join(FINISH_REASONS)}"
        )
    if not eos_ids:
        raise ConfigError(
            f"{where}: no finish_reason; add it to the file, or name the folder of the student"
        )
    return "stop" if last in eos_ids else "length"


def _numbers(where: str, name: str, values: Any, dtype: type) -> np.ndarray:
    try:
        array = np.array(values)
        whole = array.dtype.kind in ("iu" if dtype is np.int32 else "iuf") or not array.size
        if array.ndim != 1 or not whole:
            raise ValueError
        return array.astype(dtype)
    except (TypeError, ValueError):
        kind = "integers" if dtype is np.int32 else "numbers"
        raise DataError(
            f"{where}: {name} are {_short(values)}; expected a list of {kind}"
        ) from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."
