"""Shapes of score dumps of vLLM, SGLang and OpenAI-style servers, brought into one form.

| shape | how it is recognised |
| --- | --- |
| token ids and lists | `prompt_token_ids`, and `response_token_ids` with `logprobs` or `topk_*` |
| prompt log-probs | `prompt_length` and vLLM's `prompt_logprobs` |
| vLLM request output | `outputs`, each with `token_ids` and `logprobs` |
| OpenAI chat log-probs | `choices`, each with `logprobs.content` and its `top_logprobs` |
| OpenAI completion log-probs | `choices`, each with `logprobs.tokens` and `token_logprobs` |
| SGLang output | `meta_info` with `output_token_logprobs` |
| SGLang scores | `meta_info` with `input_token_logprobs`, and a `prompt_length` beside it |
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lopd.data.external_fields import short
from lopd.errors import DataError

PROMPT_KEYS = ("prompt_token_ids", "prompt_ids")
RESPONSE_KEYS = (
    "response_token_ids",
    "token_ids",
    "completion_ids",
    "response_ids",
    "output_ids",
)
PADDING_ID = -1
_ID = re.compile(r"(?:token_id:)?(-1|[0-9]{1,10})")
_ASK_FOR_IDS = (
    "ask the server for ids: vLLM's return_tokens_as_token_ids=true and return_token_ids=true"
)


@dataclass(frozen=True)
class Shaped:
    """One sequence of a dump; its values are not checked yet."""

    shape: str
    prompt: Any
    response: Any
    lists: Any  # one entry per response token
    mask: Any = None
    teacher: Any = None
    rollout: Any = None
    finish: Any = None
    id: Any = None
    sample: Any = None


def shaped(where: str, record: Mapping[str, Any]) -> list[Shaped]:
    """The sequences of one record, several if a server was asked for several answers.

    Raises:
        DataError: names the shape that was recognised and what it lacks, or the shapes there are.
    """
    read: Callable[[str, Mapping[str, Any]], list[Shaped]]
    if _prompt_logprobs(record) is not None and "prompt_length" in record:
        read = _of_prompt_logprobs
    elif "choices" in record:
        read = _of_choices
    elif "meta_info" in record:
        read = _of_sglang
    elif "outputs" in record:
        read = _of_outputs
    else:
        read = _of_lists
    common = {
        "mask": record.get("loss_mask"),
        "rollout": record.get("rollout_logprobs"),
        "id": record.get("id"),
        "sample": record.get("sample"),
    }
    items = read(where, record)
    if len(items) > 1:
        single = [key for key in ("loss_mask", "rollout_logprobs", "sample") if key in record]
        if single:
            raise DataError(
                f"{where}: '{single[0]}' beside {len(items)} answers; write one record per answer"
            )
    return [
        replace(item, **{key: value for key, value in common.items() if value is not None})
        for item in items
    ]


def token_id(token: Any) -> int:
    """A token id: an integer, its digits, or `token_id:N`.

    >>> token_id(7), token_id("7"), token_id("token_id:7")
    (7, 7, 7)
    """
    if isinstance(token, str) and (match := _ID.fullmatch(token)):
        token = int(match[1])
    if type(token) is not int or not PADDING_ID <= token < 2**31:
        raise ValueError(f"{short(token)} is not a token id")
    return token


def pairs_of(entry: Any) -> list[tuple[int, Any]]:
    """The (id, log-prob) pairs of one list in any of its forms.

    `{id: x}`, `{id: {"logprob": x}}`, `[[id, x], ...]`, `[{"token_id": id, "logprob": x}, ...]`,
    OpenAI's `[{"token": "token_id:N", "logprob": x}, ...]` or SGLang's `[[x, id, text], ...]`.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(entry, Mapping):
        pairs = list(entry.items())
    elif isinstance(entry, list | tuple):
        pairs = [_pair(item) for item in entry]
    else:
        raise ValueError("not a list")
    return [
        (token_id(token), value.get("logprob") if isinstance(value, Mapping) else value)
        for token, value in pairs
    ]


def _pair(item: Any) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        token = next((item[key] for key in ("token_id", "id", "token") if key in item), None)
        return token, item.get("logprob")
    if isinstance(item, list | tuple) and len(item) == 2:
        return item[0], item[1]
    if isinstance(item, list | tuple) and len(item) == 3 and isinstance(item[2], str | None):
        return item[1], item[0]
    raise ValueError("not a pair")


def _of_lists(where: str, record: Mapping[str, Any]) -> list[Shaped]:
    shape = "token ids and lists"
    prompt, response = _first(record, PROMPT_KEYS), _first(record, RESPONSE_KEYS)
    pairs = "topk_ids" in record and "topk_logprobs" in record
    if prompt is None or response is None or pairs == ("logprobs" in record):
        hint = ""
        if "teacher_logprobs" in record and response is not None:
            hint = "; without lists, write 'logprobs' as empty lists"
        elif "messages" in record or "prompt" in record:
            hint = "; it has no scores: import it with --format rollouts and run 'lopd score'"
        raise DataError(
            f"{where}: found {sorted(record)}; expected 'prompt_token_ids' and either "
            "'response_token_ids' with 'logprobs' or with 'topk_ids' and 'topk_logprobs', or "
            "'prompt_length' and 'prompt_logprobs', or 'choices', 'outputs' or 'meta_info' of a "
            f"server{hint}"
        )
    lists = record.get("logprobs")
    if pairs:
        ids, values = record["topk_ids"], record["topk_logprobs"]
        if [*map(len, ids)] != [*map(len, values)]:
            raise DataError(f"{where}: topk_ids and topk_logprobs differ in length")
        lists = [[*zip(*row, strict=True)] for row in zip(ids, values, strict=True)]
    teacher, finish = record.get("teacher_logprobs"), record.get("finish_reason")
    return [Shaped(shape, prompt, response, lists, teacher=teacher, finish=finish)]


def _prompt_logprobs(record: Mapping[str, Any]) -> Any:
    choices = record.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    inner = first.get("prompt_logprobs") if isinstance(first, Mapping) else None
    return record.get("prompt_logprobs", inner)


def _of_prompt_logprobs(where: str, record: Mapping[str, Any]) -> list[Shaped]:
    shape = "prompt log-probs"
    tokens = _first(record, PROMPT_KEYS)
    if tokens is None and "choices" in record:
        tokens = record["choices"][0].get("prompt_token_ids")
    lists, length = _prompt_logprobs(record), record["prompt_length"]
    if tokens is None:
        raise DataError(
            f"{where}: recognised as {shape}, without 'prompt_token_ids'; expected the ids of "
            "prompt and response"
        )
    if len(lists) != len(tokens) or type(length) is not int or not 0 < length < len(tokens):
        raise DataError(
            f"{where}: {len(lists)} prompt_logprobs for {len(tokens)} tokens with a "
            f"prompt_length of {short(length)}; expected one for each token, and a response"
        )
    teacher, finish = record.get("teacher_logprobs"), record.get("finish_reason")
    return [
        Shaped(
            shape, tokens[:length], tokens[length:], lists[length:], teacher=teacher, finish=finish
        )
    ]


def _of_outputs(where: str, record: Mapping[str, Any]) -> list[Shaped]:
    shape = "vLLM request output"
    prompt = _required(where, shape, record, PROMPT_KEYS, "the ids of the prompt")
    found = []
    for output in _objects(where, shape, "outputs", record["outputs"]):
        response = _required(where, shape, output, RESPONSE_KEYS, "the ids of the answer")
        lists = _required(where, shape, output, ("logprobs",), "SamplingParams(logprobs=K)")
        finish = output.get("finish_reason")
        found.append(Shaped(shape, prompt, response, lists, finish=finish))
    return found


def _of_choices(where: str, record: Mapping[str, Any]) -> list[Shaped]:
    found = []
    for choice in _objects(where, "an OpenAI response", "choices", record["choices"]):
        logprobs = choice.get("logprobs")
        if not isinstance(logprobs, Mapping) or not logprobs.keys() & {"content", "tokens"}:
            raise DataError(
                f"{where}: recognised as an OpenAI response, without log-probs; request them with "
                "logprobs=true and top_logprobs=K (chat) or logprobs=K (completions)"
            )
        item = _chat(where, logprobs) if "content" in logprobs else _completion(where, logprobs)
        both = {**record, **choice}
        prompt = _required(
            where, item.shape, both, PROMPT_KEYS, f"the ids of the prompt; {_ASK_FOR_IDS}"
        )
        if item.teacher and item.teacher[0] is None:  # echo=true: the prompt comes first
            n = len(prompt)
            if item.response[:n] != prompt:
                raise DataError(
                    f"{where}: recognised as {item.shape} with the prompt echoed, but its first "
                    f"{n} tokens are not prompt_token_ids"
                )
            item = replace(
                item, response=item.response[n:], teacher=item.teacher[n:], lists=item.lists[n:]
            )
        ids = _first(choice, RESPONSE_KEYS)
        if ids is not None and ids != item.response:
            raise DataError(
                f"{where}: recognised as {item.shape}, whose token_ids and log-probs are of "
                "different tokens"
            )
        finish = choice.get("finish_reason")
        found.append(replace(item, prompt=prompt, finish=finish))
    return found


def _chat(where: str, logprobs: Mapping[str, Any]) -> Shaped:
    shape = "OpenAI chat log-probs"
    content = _objects(where, shape, "content", logprobs["content"])
    ids = _ids(where, shape, [item.get("token") for item in content])
    lists = [item.get("top_logprobs") or [] for item in content]
    for part in lists:
        _ids(where, shape, [token for token, _ in map(_pair, part)])
    return Shaped(shape, None, ids, lists, teacher=[item.get("logprob") for item in content])


def _completion(where: str, logprobs: Mapping[str, Any]) -> Shaped:
    shape = "OpenAI completion log-probs"
    ids = _ids(where, shape, logprobs["tokens"])
    lists = logprobs.get("top_logprobs") or [None] * len(ids)
    lists = [part or {} for part in lists]
    for part in lists:
        _ids(where, shape, list(part))
    return Shaped(shape, None, ids, lists, teacher=list(logprobs["token_logprobs"]))


def _of_sglang(where: str, record: Mapping[str, Any]) -> list[Shaped]:
    shape = "SGLang output"
    meta = record["meta_info"]
    if not isinstance(meta, Mapping):
        raise DataError(f"{where}: recognised as {shape}; expected an object 'meta_info'")
    finish = meta.get("finish_reason")
    finish = finish.get("type") if isinstance(finish, Mapping) else finish
    before = meta.get("input_token_logprobs") or []
    if "prompt_length" in record:
        side, length, values = "input", record["prompt_length"], before
        if type(length) is not int or not 0 < length < len(values):
            raise DataError(
                f"{where}: recognised as {shape} with a prompt_length of {short(length)} and "
                f"{len(values)} input_token_logprobs; score with return_logprob=true and "
                "logprob_start_len=0"
            )
        ids = _ids(where, shape, [item[1] for item in values])
        prompt, response, finish = ids[:length], ids[length:], record.get("finish_reason")
    else:
        side, length, values = "output", 0, meta.get("output_token_logprobs") or []
        response = _ids(where, shape, [item[1] for item in values])
        prompt = _first(record, (*PROMPT_KEYS, "input_ids"))
        if prompt is None and before and len(before) == meta.get("prompt_tokens"):
            prompt = [item[1] for item in before]
        if prompt is None or not response:
            raise DataError(
                f"{where}: recognised as {shape}, without "
                f"{'output_token_logprobs' if prompt else 'the ids of the prompt'}; request "
                "return_logprob=true, and add 'prompt_token_ids' or logprob_start_len=0"
            )
    teacher = [item[0] for item in values]
    lists = meta.get(f"{side}_top_logprobs") or [None] * len(values)
    if len(lists) != len(values):
        raise DataError(
            f"{where}: recognised as {shape}: {len(lists)} {side}_top_logprobs for {len(values)} "
            f"{side}_token_logprobs"
        )
    lists = [part or [] for part in lists]
    return [
        Shaped(shape, prompt, response, lists[length:], teacher=teacher[length:], finish=finish)
    ]


def _ids(where: str, shape: str, tokens: Any) -> list[int]:
    try:
        return [token_id(token) for token in tokens]
    except ValueError:
        raise DataError(
            f"{where}: recognised as {shape} whose tokens are text, which does not tell the ids; "
            f"{_ASK_FOR_IDS}"
        ) from None


def _first(record: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _required(
    where: str, shape: str, record: Mapping[str, Any], names: tuple[str, ...], what: str
) -> Any:
    value = _first(record, names)
    if value is None:
        raise DataError(f"{where}: recognised as {shape}, without '{names[0]}'; expected {what}")
    return value


def _objects(where: str, shape: str, name: str, value: Any) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(v, Mapping) for v in value):
        raise DataError(f"{where}: recognised as {shape}; expected a list of objects as '{name}'")
    return value
