"""Teacher scores in the formats of other tools.

`lightning-opd` is the parquet of the paper's code: `prompt`, text with the chat template applied,
and a struct `metadata` of `is_lightning_opd`, `response_tokens`, `loss_mask`, `response` and
`teacher_log_probs` (of the response tokens). There is no list and no tail.

`topk` holds log-probs in JSONL or parquet, as users of vLLM, SGLang and OpenAI-style servers write
them (`lopd.data.score_shapes`):

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

What cannot be the log-prob of a sampled token is refused (`check_sampled`). Entries of a list that
stand for nothing (id -1, or a log-prob that no softmax gives) are padding and left out. A token
whose loss is masked needs no log-prob: it is stored with an empty list.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lopd.config.import_scores import Format
from lopd.config.score import ListOf
from lopd.data.external_fields import (
    finish_reason,
    floats,
    integers,
    is_padding,
    is_stand_in,
    logprob,
    loss_mask,
    read_sequences,
    refuse_same,
    refuse_stand_ins,
    refuse_without_loss,
    sequence_name,
    short,
)
from lopd.data.score_shapes import PADDING_ID, Shaped, pairs_of, shaped
from lopd.data.skipped import Skipped
from lopd.errors import ConfigError, DataError
from lopd.models.limits import ModelLimits
from lopd.store import Rollout, TopKLists
from lopd.store.lists import TAIL_FLOOR
from lopd.store.validate import AGREEMENT_NATS, MASS_TOLERANCE

_LIGHTNING = ("is_lightning_opd", "response_tokens", "loss_mask", "teacher_log_probs")
# Two decimals of a log-prob are an error of 0.5 % of its probability, so lists of rounded
# log-probs can have a mass up to 1 + ROUNDING; they are scaled to mass 1.
ROUNDING = 0.01
_RAW = (
    "dump raw log-probs, or pass --allow-renormalized to admit such lists, for --tail renormalize "
    "only"
)


@dataclass(frozen=True)
class Dumped:
    """One sequence of a dump, with a list sorted by log-prob at each of R response tokens."""

    where: str
    rollout: Rollout
    teacher_logprobs: np.ndarray  # [R] fp64, of the response tokens
    lists: TopKLists  # int64 ids, fp64 log-probs
    mass: np.ndarray  # [R] fp64, of the lists before rounded ones were scaled
    unlisted: np.ndarray  # [R] bool, outside a renormalised list, where no log-prob is known
    unscored: int = 0  # masked tokens without a log-prob
    padding: int = 0  # entries left out of the lists


def read_dump(
    path: str | Path,
    form: Format,
    tokenizer: Any | None,
    eos_ids: Sequence[int] = (),
    *,
    list_of: ListOf = "teacher",
    vocab_size: int | None = None,
    renormalized: bool = False,
    skipped: Skipped | None = None,
) -> Iterator[Dumped]:
    """The sequences of a file, in order.

    Args:
        tokenizer: of the student; encodes the prompts of `lightning-opd`.
        eos_ids: of the student; a response that ends with one has finish reason "stop" where the
            record has no `finish_reason`.
        list_of: whose most probable ids the lists hold.
        vocab_size: rows of the teacher's head, which bound the ids; None for no bound.
        renormalized: whether lists of mass 1 were renormalised. The log-prob of a token is then its
            entry in the list, whatever the record says; one outside has `TAIL_FLOOR` in its place,
            since the mass that it was part of is lost.
        skipped: takes the records that cannot be used; by default they are errors.

    Raises:
        DataError: a record is not of the format; names the record and the fault.
        MissingFileError, ConfigError: as `read_records`; `tokenizer` or `eos_ids` is needed.
    """
    skipped = skipped or Skipped(str(path), allowed=False, offered=False)
    limits = ModelLimits("the teacher", vocab_size, id_remedy="remove the record")

    def parse(where: str, record: dict[str, Any], seen: Counter[str]) -> list[Dumped]:
        if form == "lightning-opd":
            items = [_lightning(where, record, tokenizer)]
        else:
            items = shaped(where, record)
        found = [_assemble(where, item, eos_ids, seen, list_of, renormalized) for item in items]
        for item in found:
            _check_ids(item, limits)
        return found

    return read_sequences(path, skipped, parse, lambda item: item.rollout)


def _lightning(where: str, record: dict[str, Any], tokenizer: Any) -> Shaped:
    metadata = record.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(record.get("prompt"), str):
        raise DataError(
            f"{where}: found columns {sorted(record)}; expected 'prompt' as text and a struct "
            "'metadata', as the paper's code writes them; --format topk reads other shapes"
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
    return Shaped(
        shape="lightning-opd",
        prompt=tokenizer.encode(record["prompt"], add_special_tokens=False),
        response=response,
        lists=[{}] * len(response),
        mask=metadata["loss_mask"],
        teacher=metadata["teacher_log_probs"],
    )


def _assemble(
    where: str,
    item: Shaped,
    eos_ids: Sequence[int],
    seen: Counter[str],
    list_of: ListOf,
    renormalized: bool,
) -> Dumped:
    prompt = integers(where, "prompt token ids", item.prompt)
    response = integers(where, "response token ids", item.response)
    if not len(prompt) or not len(response):
        raise DataError(
            f"{where}: {len(prompt)} prompt and {len(response)} response tokens; expected at "
            "least one of each; drop the record"
        )
    count = len(response)
    given = {
        "log-probs": item.lists,
        "loss_mask": item.mask,
        "the teacher's log-probs": item.teacher,
        "rollout_logprobs": item.rollout,
    }
    for name, value in given.items():
        if value is not None and len(value) != count:
            raise DataError(f"{where}: {len(value)} entries of {name} for {count} response tokens")
    mask = np.ones(count, bool) if item.mask is None else loss_mask(where, item.mask)
    refuse_without_loss(where, mask)
    lists, padding = _lists(where, item.lists, mask)
    whole = mask & _have_mass_one(lists) if renormalized else np.zeros(count, bool)
    listed, entry = _own_entries(response, lists)
    logprobs = _teacher_logprobs(where, response, item.teacher, lists, mask & ~whole)
    logprobs = np.where(whole, np.where(listed, entry, TAIL_FLOOR), logprobs)
    unlisted = whole & ~listed
    unscored = ~mask & is_stand_in(logprobs)
    if unscored.any():
        lists = _without_rows(lists, unscored)
        logprobs = np.where(unscored, 0.0, logprobs)
    lists, mass = _scaled(where, lists)
    check_sampled(where, response, logprobs, lists, mask & ~unlisted, list_of)
    rollout_logprobs = np.full(count, np.nan, np.float32)
    if item.rollout is not None:
        rollout_logprobs = floats(where, "rollout_logprobs", item.rollout).astype(np.float32)
        bad = is_stand_in(rollout_logprobs)
        refuse_stand_ins(where, response, bad & mask, rollout_logprobs, "rollout_logprobs")
        refuse_same(where, rollout_logprobs[mask], "rollout_logprobs", "leave them out")
        rollout_logprobs[bad] = 0.0
    prompt_id, sample = sequence_name(where, item.id, item.sample, prompt, seen)
    rollout = Rollout(
        prompt_id=prompt_id,
        sample=sample,
        tokens=np.concatenate([prompt, response]),
        prompt_length=len(prompt),
        finish_reason=finish_reason(where, item.finish, int(response[-1]), eos_ids),
        loss_mask=np.concatenate([np.zeros(len(prompt), bool), mask]),
        rollout_logprobs=rollout_logprobs,
        rollout_logprobs_raw=rollout_logprobs,
    )
    masked = int(unscored.sum())
    return Dumped(where, rollout, logprobs, lists, mass, unlisted, masked, padding)


def _lists(where: str, entries: Any, mask: np.ndarray) -> tuple[TopKLists, int]:
    """The lists, each sorted by descending log-prob, and the number of entries left out of them."""
    parts, padding = [], 0
    for t, entry in enumerate(entries):
        if entry is None and not mask[t]:
            entry = {}
        ids, values = _entries(f"{where}: response token {t}", entry)
        used = (ids != PADDING_ID) & ~is_padding(values)
        padding += int((~used).sum())
        ids, values = ids[used], values[used]
        order = np.lexsort((ids, -values))
        parts.append((ids[order], values[order]))
    lengths = np.array([len(ids) for ids, _ in parts])
    ids, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    return TopKLists(ids, values, lengths), padding


def _entries(where: str, entry: Any) -> tuple[np.ndarray, np.ndarray]:  # [n] int64, [n] fp64
    try:
        pairs = pairs_of(entry)
        values = np.array([logprob(value) for _, value in pairs], np.float64)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise DataError(
            f"{where}: {short(entry)} is not a list of log-probs; expected {{id: logprob}}, "
            "[[id, logprob], ...] or [{'token_id': id, 'logprob': x}, ...]"
        ) from None
    ids = np.array([token for token, _ in pairs], np.int64)
    real = (ids != PADDING_ID) & ~is_padding(values)
    if (values[real] > MASS_TOLERANCE).any():
        worst = values[real].max()
        what = "probabilities; take their natural logs" if worst <= 1 else "not log-probs"
        raise DataError(f"{where}: a log-prob of {worst:g}, above 0; these look like {what}")
    if len(np.unique(ids[real])) != real.sum():
        zeros = " (is id 0 padding? pad with id -1)" if (values[real] == 0).sum() > 1 else ""
        raise DataError(f"{where}: an id is listed twice{zeros}; expected distinct ids")
    return ids, values


def _teacher_logprobs(
    where: str, response: np.ndarray, dumped: Any, lists: TopKLists, mask: np.ndarray
) -> np.ndarray:  # [R] fp64, NaN where a masked token has none
    if dumped is not None:
        values = floats(where, "the teacher's log-probs", dumped)
        bad = mask & is_stand_in(values)
        refuse_stand_ins(where, response, bad, values, "the teacher's log-prob")
        return values
    listed, entry = _own_entries(response, lists)
    absent = np.flatnonzero(~listed & mask)
    if len(absent):
        t = absent[0]
        remedy = "dump its log-prob too (vLLM always does), or add 'teacher_logprobs'"
        if _have_mass_one(lists)[t]:
            remedy = f"the list has mass 1, as if it was renormalised; {_RAW}"
        raise DataError(
            f"{where}: response token {t} (id {response[t]}) is not in its list, or has no "
            f"log-prob there; {remedy}"
        )
    return np.where(listed, entry, np.nan)


def _own_entries(response: np.ndarray, lists: TopKLists) -> tuple[np.ndarray, np.ndarray]:
    """Whether each token [R] of the response is in its list, and its log-prob there."""
    own = np.where(lists.ids == response[lists.rows], lists.logprobs, 0.0)
    return lists.contains(response), lists.row_sums(own)


def _have_mass_one(lists: TopKLists) -> np.ndarray:  # [R] bool
    """Whether each list has mass 1, within the rounding of its log-probs."""
    return np.abs(lists.row_sums(np.exp(lists.logprobs)) - 1) <= ROUNDING


def _scaled(where: str, lists: TopKLists) -> tuple[TopKLists, np.ndarray]:
    """Lists whose mass exceeds 1 by rounding scaled to mass 1, and the masses before."""
    mass = lists.row_sums(np.exp(lists.logprobs))
    over = mass > 1 + MASS_TOLERANCE
    if not over.any():
        return lists, mass
    worst = int(mass.argmax())
    if mass[worst] > 1 + ROUNDING or not _is_rounded(lists.logprobs):
        raise DataError(
            f"{where}: response token {worst}: a list of mass {mass[worst]:.6g}; expected natural "
            f"logs of probabilities that sum to at most 1 (1 + {ROUNDING} if they are rounded)"
        )
    shift = np.log(np.where(over, mass, 1.0))[lists.rows]
    return TopKLists(lists.ids, lists.logprobs - shift, lists.lengths), mass


def _is_rounded(values: np.ndarray) -> bool:
    """Whether all are numbers of at most 4 decimals, of fp16 or of bf16."""
    single = values.astype(np.float32)
    bf16 = (single.view(np.uint32) & 0xFFFF) == 0
    with np.errstate(over="ignore"):
        fp16 = values.astype(np.float16) == values
    return bool(
        (values == np.round(values, 4)).all() or fp16.all() or (bf16 & (single == values)).all()
    )


def check_sampled(
    where: str,
    response: np.ndarray,
    logprobs: np.ndarray,
    lists: TopKLists,
    mask: np.ndarray,
    list_of: ListOf = "teacher",
) -> None:
    """Refuse log-probs of sampled tokens that contradict their lists, or that are all the same.

    A token in its list has the log-prob that it has there. One outside has at most the smallest
    log-prob of the list, if that is the teacher's top k, and at most the mass that the list leaves.

    Raises:
        DataError: names the response token and the contradiction.
    """
    listed, entry = _own_entries(response, lists)
    smallest = np.zeros(len(response))
    np.minimum.at(smallest, lists.rows, lists.logprobs)
    left = 1 - lists.row_sums(np.exp(lists.logprobs))
    checks = {
        "its entry in the list": listed & (np.abs(entry - logprobs) > AGREEMENT_NATS),
        "the smallest of its list, which lacks it": ~listed
        & (logprobs > smallest + AGREEMENT_NATS)
        & (list_of == "teacher"),
        "the mass that its list leaves": ~listed & (np.exp(logprobs) > left + MASS_TOLERANCE),
    }
    bounds = dict(zip(checks, (entry, smallest, np.log(np.maximum(left, 1e-45))), strict=True))
    for what, bad in checks.items():
        if (bad & mask).any():
            t = int(np.flatnonzero(bad & mask)[0])
            why = "they are not of one model, or the value stands for none"
            if abs(left[t]) <= MASS_TOLERANCE:
                why = f"the list has mass 1, as if it was renormalised; {_RAW}"
            raise DataError(
                f"{where}: response token {t} (id {response[t]}) has log-prob {logprobs[t]:.6g}; "
                f"{what} is {bounds[what][t]:.6g}: {why}"
            )
    if mask.any() and not lists.lengths[mask].any():
        refuse_same(where, logprobs[mask], "log-probs", "dump the teacher's log-probs")


def _without_rows(lists: TopKLists, rows: np.ndarray) -> TopKLists:
    kept = ~rows[lists.rows]
    return TopKLists(lists.ids[kept], lists.logprobs[kept], np.where(rows, 0, lists.lengths))


def _check_ids(item: Dumped, limits: ModelLimits) -> None:
    limits.check(item.where, item.rollout.tokens)
    if len(item.lists.ids):
        limits.check(f"{item.where}: lists", item.lists.ids)
