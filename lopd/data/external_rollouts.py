"""Rollouts of other tools: token ids with loss masks, or messages, one or more turns each.

| shape | fields |
| --- | --- |
| prompt and response | `prompt_token_ids` or `prompt_ids`; `response_token_ids` and the like |
| whole sequence | `input_ids` or `tokens`, with a mask of the same length or `labels` |
| verl | `prompts`, `responses` and `attention_mask`, padded |
| vLLM request output | `prompt_token_ids` and `outputs` |
| OpenAI response | `choices` with `token_ids`, and `prompt_token_ids` (vLLM's `return_token_ids`) |
| SGLang output | `output_ids`, or `meta_info.output_token_logprobs`, and the ids of the prompt |
| messages | `messages`, or `prompt` and `completion` as messages: text, which is tokenised again |

A mask has one entry per token of the response, or of the whole sequence; entry t belongs to token
t: 1 where the model wrote the token, 0 for the prompt, the output of tools, and padding. Its names
are `loss_mask`, `response_mask`, `completion_mask` and `assistant_masks`; without one, the whole
response is the model's. `labels` is a mask by -100.

The prompt of a stored rollout ends where the first token of the model begins, and the sequence ends
with the model's last token; what follows is not needed to train on it. Log-probs of the policy that
sampled (`rollout_logprobs`, `rollout_log_probs`, `old_log_probs`, or `logprobs` as numbers) are
optional. So are, for `lopd distill`: `weight`, a positive number for the sequence; `token_weights`,
numbers from 0, as a mask; and `reward`, what a verifier gave the answer. A choice or an output may
have its own.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lopd.data.external_fields import (
    finish_reason,
    floats,
    integers,
    is_stand_in,
    loss_mask,
    number,
    read_sequences,
    refuse_same,
    refuse_stand_ins,
    refuse_without_loss,
    sequence_name,
    short,
)
from lopd.data.messages import check_messages
from lopd.data.rendering import PromptEncoder
from lopd.data.score_shapes import PROMPT_KEYS, RESPONSE_KEYS, token_id
from lopd.data.skipped import Skipped
from lopd.errors import DataError
from lopd.models.limits import ModelLimits
from lopd.store import Rollout
from lopd.store.validate import check_weights

WHOLE_KEYS = ("input_ids", "tokens")
MASK_KEYS = ("loss_mask", "response_mask", "completion_mask", "assistant_masks")
LOGPROB_KEYS = ("rollout_logprobs", "rollout_log_probs", "old_log_probs")
IGNORED_LABEL = -100
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class _Found:
    """One sequence as a record gives it; a mask or log-probs are of the response, or of all."""

    shape: str
    prompt: Any
    response: Any
    mask: Any = None
    logprobs: Any = None
    finish: Any = None
    weights: Any = None  # of tokens, as the mask
    own: Mapping[str, Any] = field(default_factory=dict)  # of several: what is not the record's


@dataclass(frozen=True)
class Imported:
    """A rollout, and whether its tokens were made from text again."""

    rollout: Rollout
    retokenized: bool


def read_rollouts(
    path: str | Path,
    encoder: PromptEncoder,
    eos_ids: Sequence[int],
    *,
    limits: ModelLimits,
    skipped: Skipped,
    retokenize: bool = False,
) -> Iterator[Imported]:
    """The rollouts of a file, in order.

    Args:
        encoder: of the student; renders messages.
        eos_ids: of the student; a rollout that ends with one has finish reason "stop" where the
            record has no `finish_reason`.
        limits: of the student.
        retokenize: admit messages, whose tokens may differ from those that were sampled.

    Raises:
        DataError: names the record and its fault.
        MissingFileError, ConfigError: as `read_records`.
    """

    def parse(where: str, record: dict[str, Any], seen: Counter[str]) -> list[Imported]:
        items = _sequences(where, record)
        if is_text := not items:
            items = [_rendered(where, record, encoder, retokenize)]
            if record.get("token_weights") is not None:
                raise DataError(
                    f"{where}: has token_weights and messages, which are tokenised again; dump "
                    "token ids, which the weights belong to"
                )
        rollouts = [_assemble(where, record, item, eos_ids, seen) for item in items]
        for rollout in rollouts:
            limits.check(where, rollout.tokens)
            try:
                check_weights(rollout)
            except DataError as error:
                raise DataError(f"{where}: {error}") from None
        return [Imported(rollout, retokenized=is_text) for rollout in rollouts]

    return read_sequences(path, skipped, parse, lambda item: item.rollout)


def _sequences(where: str, record: Mapping[str, Any]) -> list[_Found]:
    """The sequences of a record that has token ids; none if it has messages only."""
    prompt, response = _first(record, PROMPT_KEYS), _first(record, RESPONSE_KEYS)
    if "choices" in record:
        return [
            _with_own(record, _of_choice(where, record, choice), choice)
            for choice in record["choices"]
        ]
    if "outputs" in record:
        return [
            _with_own(record, _of_output(where, prompt, output), output)
            for output in record["outputs"]
        ]
    if "meta_info" in record:
        return [_with_own(record, _of_sglang(where, record, response), {})]
    mask, logprobs = _mask(where, record), _first(record, LOGPROB_KEYS)
    listed = record.get("logprobs")
    if logprobs is None and listed and all(isinstance(x, int | float | None) for x in listed):
        logprobs = listed
    finish, weights = record.get("finish_reason"), record.get("token_weights")
    if prompt is not None and response is not None:
        if (kept := record.get("prompt_mask")) is not None:
            prompt = _where(where, prompt, kept, "prompt_mask")
        return [_Found("prompt and response", prompt, response, mask, logprobs, finish, weights)]
    if "prompts" in record and "responses" in record:
        return [replace(_of_verl(where, record, mask, logprobs, finish), weights=weights)]
    whole = _first(record, WHOLE_KEYS)
    if whole is not None:
        if mask is None:
            raise DataError(
                f"{where}: recognised as a whole sequence, without a mask; expected one of "
                f"{', '.join(MASK_KEYS)} or labels, as long as the sequence"
            )
        if (kept := record.get("attention_mask")) is not None:
            mask = _where(where, mask, kept, "attention_mask")
            logprobs = None if logprobs is None else _where(where, logprobs, kept, "logprobs")
            weights = None if weights is None else _where(where, weights, kept, "token_weights")
            whole = _where(where, whole, kept, "attention_mask")
        return [_Found("whole sequence", [], whole, mask, logprobs, finish, weights)]
    if "messages" in record or {"prompt", "completion"} <= record.keys():
        return []
    text = ""
    if isinstance(record.get("input"), str) or isinstance(record.get("prompt"), str):
        text = "; it holds text: write the conversation as 'messages' and pass --retokenize"
    raise DataError(
        f"{where}: found {sorted(record)}; expected token ids ('prompt_token_ids' and "
        f"'response_token_ids', or 'input_ids' with a mask), or 'messages' with --retokenize{text}"
    )


def _with_own(record: Mapping[str, Any], found: _Found, own: Mapping[str, Any]) -> _Found:
    """One of a record's sequences with the weights of its tokens, its own or the record's."""
    return replace(found, weights={**record, **own}.get("token_weights"), own=own)


def _of_choice(where: str, record: Mapping[str, Any], choice: Mapping[str, Any]) -> _Found:
    shape = "OpenAI response"
    prompt, response = _first({**record, **choice}, PROMPT_KEYS), _first(choice, RESPONSE_KEYS)
    logprobs = (choice.get("logprobs") or {}).get("content") or []
    values = [item.get("logprob") for item in logprobs] or None
    if response is None and logprobs and str(logprobs[0].get("token")).startswith("token_id:"):
        response = [token_id(item["token"]) for item in logprobs]
    if prompt is None or response is None:
        what = "prompt_token_ids" if prompt is None else "token_ids"
        raise DataError(
            f"{where}: recognised as an {shape}, without '{what}'; ask vLLM for them with "
            "return_token_ids=true, or write the conversation as 'messages' and pass --retokenize"
        )
    return _Found(shape, prompt, response, None, values, choice.get("finish_reason"))


def _of_output(where: str, prompt: Any, output: Mapping[str, Any]) -> _Found:
    shape = "vLLM request output"
    response = _first(output, RESPONSE_KEYS)
    if prompt is None or response is None:
        what = "prompt_token_ids" if prompt is None else "token_ids"
        raise DataError(f"{where}: recognised as a {shape}, without '{what}'")
    values = None
    if output.get("logprobs"):
        entries = (
            {token_id(key): entry for key, entry in row.items()} for row in output["logprobs"]
        )
        own = [row[token] for row, token in zip(entries, response, strict=True)]
        values = [entry["logprob"] if isinstance(entry, Mapping) else entry for entry in own]
    return _Found(shape, prompt, response, None, values, output.get("finish_reason"))


def _of_sglang(where: str, record: Mapping[str, Any], response: Any) -> _Found:
    shape, meta = "SGLang output", record["meta_info"]
    triples = meta.get("output_token_logprobs") or []
    prompt = _first(record, (*PROMPT_KEYS, "input_ids"))
    before = meta.get("input_token_logprobs") or []
    if prompt is None and before and len(before) == meta.get("prompt_tokens"):
        prompt = [item[1] for item in before]
    if response is None and triples:
        response = [item[1] for item in triples]
    if prompt is None or response is None:
        what = "the ids of the prompt" if prompt is None else "output_ids"
        raise DataError(
            f"{where}: recognised as {shape}, without {what}; add 'prompt_token_ids', and request "
            "return_logprob=true for the ids of the answer"
        )
    finish = meta.get("finish_reason")
    finish = finish.get("type") if isinstance(finish, Mapping) else finish
    values = [item[0] for item in triples] or None
    return _Found(shape, prompt, response, _mask(where, record), values, finish)


def _of_verl(
    where: str, record: Mapping[str, Any], mask: Any, logprobs: Any, finish: Any
) -> _Found:
    prompt, response = record["prompts"], record["responses"]
    kept = record.get("attention_mask")
    if kept is None:
        raise DataError(
            f"{where}: recognised as verl's 'prompts' and 'responses', without 'attention_mask'; "
            "expected one for both, which tells padding from tokens"
        )
    _fits(where, "attention_mask", kept, len(prompt) + len(response), "prompts and responses")
    mask = kept[len(prompt) :] if mask is None else mask
    prompt = _where(where, prompt, kept[: len(prompt)], "attention_mask")
    return _Found("verl's prompts and responses", prompt, response, mask, logprobs, finish)


def _mask(where: str, record: Mapping[str, Any]) -> Any:
    masks = {key: record[key] for key in MASK_KEYS if record.get(key) is not None}
    if (labels := record.get("labels")) is not None:
        tokens = [_first(record, PROMPT_KEYS), _first(record, RESPONSE_KEYS)]
        whole = _first(record, WHOLE_KEYS)
        if whole is None and len(labels) != len(tokens[1] or []):
            whole = [*(tokens[0] or []), *(tokens[1] or [])]
        whole = tokens[1] if whole is None else whole
        _fits(where, "labels", labels, len(whole or []), "the sequence")
        pairs = zip(labels, whole, strict=True)
        wrong = [t for t, (a, b) in enumerate(pairs) if a not in (IGNORED_LABEL, b)]
        if wrong:
            raise DataError(
                f"{where}: the label of token {wrong[0]} is {short(labels[wrong[0]])}, the token "
                f"{whole[wrong[0]]}; expected labels at the positions of their tokens (shifted?)"
            )
        masks["labels"] = [int(label != IGNORED_LABEL) for label in labels]
    names = list(masks)
    for name in names[1:]:
        if list(masks[name]) != list(masks[names[0]]):
            raise DataError(f"{where}: {names[0]} and {name} differ; leave one of them out")
    return masks[names[0]] if names else None


def _rendered(
    where: str, record: Mapping[str, Any], encoder: PromptEncoder, retokenize: bool
) -> _Found:
    """The tokens of messages, and the mask by the chat template's generation markers."""
    if not retokenize:
        raise DataError(
            f"{where}: recognised as messages, which are text: tokenising them again can give "
            "other tokens than were sampled; pass --retokenize to accept that, or dump token ids"
        )
    tokenizer, before = encoder.tokenizer, 0
    template = tokenizer.chat_template
    if not isinstance(template, str) or not _GENERATION.search(template):
        raise DataError(
            f"{where}: recognised as messages, but the student's chat template does not mark the "
            "assistant's turns; put {% generation %} and {% endgeneration %} around them in its "
            "chat_template.jinja, or dump token ids and loss_mask"
        )
    if "messages" in record:
        messages = _messages(where, record["messages"], "messages")
    else:
        first = _messages(where, record["prompt"], "prompt")
        messages = [*first, *_messages(where, record["completion"], "completion")]
        before = len(first)
    kwargs = encoder.template_kwargs(record, where)
    try:
        output = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **kwargs
        )
        prefix = tokenizer.apply_chat_template(messages[:before], **kwargs) if before else []
    except Exception as error:
        found = " ".join(str(error).split())
        raise DataError(f"{where}: the student's chat template refuses it ({found})") from error
    tokens, mask = list(output["input_ids"]), list(output["assistant_masks"])
    prefix = list(prefix["input_ids"]) if isinstance(prefix, Mapping) else list(prefix)
    if tokens[: len(prefix)] != prefix:
        raise DataError(
            f"{where}: the template renders the prompt differently once the completion follows; "
            "write both as 'messages', or dump token ids"
        )
    mask[: len(prefix)] = [0] * len(prefix)
    return _Found("messages", [], tokens, mask, finish=record.get("finish_reason"))


def _messages(where: str, value: Any, name: str) -> list[dict[str, Any]]:
    """Messages; the content of one that only calls tools may be null."""
    if isinstance(value, list):
        value = [
            {**m, "content": ""} if isinstance(m, dict) and m.get("content", 0) is None else m
            for m in value
        ]
    return check_messages(value, where, name)


def _assemble(
    where: str,
    record: Mapping[str, Any],
    item: _Found,
    eos_ids: Sequence[int],
    seen: Counter[str],
) -> Rollout:
    prompt = integers(where, "prompt token ids", item.prompt)
    response = integers(where, "response token ids", item.response)
    tokens, count = np.concatenate([prompt, response]), len(response)
    mask = np.ones(count, bool) if item.mask is None else loss_mask(where, item.mask)
    if len(mask) == len(tokens) and mask[: len(prompt)].any():
        raise DataError(
            f"{where}: prompt token {mask.argmax()} bears loss; expected 0 on the prompt, or a "
            "mask of the response only"
        )
    mask = _of_response(where, "the mask", mask, len(prompt), count)
    refuse_without_loss(where, mask)
    if item.mask is not None:
        _refuse_shifted(where, prompt, response, mask, eos_ids)
    start, stop = int(mask.argmax()), count - int(mask[::-1].argmax())
    logprobs = np.full(count, np.nan)
    if item.logprobs is not None:
        logprobs = floats(where, "rollout log-probs", item.logprobs)
        logprobs = _of_response(where, "rollout log-probs", logprobs, len(prompt), count)
        bad = is_stand_in(logprobs)
        refuse_stand_ins(where, response, bad & mask, logprobs, "the rollout's log-prob")
        logprobs[bad] = 0.0
        refuse_same(where, logprobs[mask], "rollout log-probs", "leave them out")
    length = len(prompt) + start
    if not length:
        raise DataError(f"{where}: the first token bears loss; expected a prompt before it")
    named = prompt if len(prompt) else tokens[:length]
    prompt_id, sample = sequence_name(where, record.get("id"), record.get("sample"), named, seen)
    kept = logprobs[start:stop].astype(np.float32)
    given, weights = {**record, **item.own}, None
    weight = number(where, "weight", given.get("weight"))
    if item.weights is not None:
        weights = floats(where, "token_weights", item.weights)
        weights = _of_response(where, "token_weights", weights, len(prompt), count)
        weights = np.where(mask, weights, 0.0)[start:stop].astype(np.float32)
    return Rollout(
        prompt_id=prompt_id,
        sample=sample,
        tokens=tokens[: len(prompt) + stop],
        prompt_length=length,
        finish_reason=finish_reason(where, item.finish, int(response[stop - 1]), eos_ids),
        loss_mask=np.concatenate([np.zeros(length, bool), mask[start:stop]]),
        rollout_logprobs=kept,
        rollout_logprobs_raw=kept,
        weight=1.0 if weight is None else weight,
        reward=number(where, "reward", given.get("reward")),
        token_weights=weights,
    )


def _refuse_shifted(
    where: str,
    prompt: np.ndarray,
    response: np.ndarray,
    mask: np.ndarray,
    eos_ids: Sequence[int],
) -> None:
    """Refuse a mask that is one token late or early, judged by where the model's turns end.

    Late: in every turn but the last, the token after the end of sequence bears loss. Early: no
    turn's end of sequence bears loss, and all turns begin with the same token, the last that the
    template writes before an answer.
    """
    edges = np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8))
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    if len(starts) < 2:
        return
    ends, first = np.isin(response, list(eos_ids)), response[starts]
    if not starts[0] and len(prompt):  # an early mask of the response is cut off where it begins
        first[0] = prompt[-1]
    late = (stops - starts > 1) & ends[stops - 2] & ~ends[stops - 1]
    early = np.append(ends, False)[stops] & ~ends[stops - 1]
    if late[:-1].all() or (early[:-1].all() and (first == first[0]).all()):
        t = int(stops[0])
        raise DataError(
            f"{where}: the mask is shifted by one: response token {t - 2 if late[0] else t} ends a "
            "turn of the model, and the mask ends one token "
            f"{'later' if late[0] else 'earlier'}; entry t must belong to token t"
        )


def _of_response(
    where: str, name: str, values: np.ndarray, prompt: int, response: int
) -> np.ndarray:
    """Values of the response, given for it or for the whole sequence."""
    if len(values) == prompt + response:
        return values[prompt:]
    _fits(where, name, values, response, "the response")
    return values


def _fits(where: str, name: str, values: Any, count: int, of: str) -> None:
    if len(values) != count:
        raise DataError(f"{where}: {len(values)} entries of {name} for {count} tokens of {of}")


def _where(where: str, values: Any, kept: Any, name: str) -> list[Any]:
    _fits(where, name, kept, len(values), "the sequence")
    return [value for value, keep in zip(values, kept, strict=True) if keep]


def _first(record: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)
