"""How a chat template begins and ends an answer, against the ids that end one."""

from collections.abc import Sequence
from typing import Any

_ANSWER = "lopd"


def end_of_turn(tokenizer: Any) -> int | None:
    """The id of the special token that a chat template writes after an answer.

    None if there is no template, or if it writes no special token there or no such conversation.
    """
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}]
    text = _render(tokenizer, turn, add_generation_prompt=False)
    _, found, rest = text.rpartition(_ANSWER)
    return next(iter(_special_ids(tokenizer, rest)), None) if found else None


def start_of_answer(tokenizer: Any) -> list[int]:
    """The ids of the special tokens that a chat template writes to begin an answer."""
    question = [{"role": "user", "content": "a"}]
    text = _render(tokenizer, question, add_generation_prompt=False)
    prompt = _render(tokenizer, question, add_generation_prompt=True)
    return _special_ids(tokenizer, prompt[len(text) :]) if prompt.startswith(text) else []


def _render(tokenizer: Any, messages: list[dict[str, str]], **settings: bool) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        return ""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **settings))
    except Exception:  # a template can ask for other messages
        return ""


def _special_ids(tokenizer: Any, text: str) -> list[int]:
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [index for index in ids if index in special]


def turn_warnings(tokenizer: Any, eos_ids: Sequence[int]) -> list[str]:
    """What is odd about the ids that end an answer, in sentences; empty if nothing is."""
    warnings = []
    end, remedy = end_of_turn(tokenizer), "set eos_token_id in generation_config.json"
    if end is not None and end not in eos_ids:
        warnings.append(
            f"the chat template ends a turn with id {end} ({_name(tokenizer, end)}), but an answer "
            f"ends only with {_names(tokenizer, eos_ids)} and may run on; {remedy}"
        )
    for index in sorted({*start_of_answer(tokenizer)}.intersection(eos_ids)):
        if index != end:
            warnings.append(
                f"id {index} ({_name(tokenizer, index)}) ends an answer, but the chat template "
                f"begins answers with it: is it the end-of-sequence token? {remedy}"
            )
    return warnings


def _name(tokenizer: Any, index: int) -> str:
    return repr(tokenizer.convert_ids_to_tokens(index))


def _names(tokenizer: Any, ids: Sequence[int]) -> str:
    return ", ".join(f"{index} {_name(tokenizer, index)}" for index in ids)
