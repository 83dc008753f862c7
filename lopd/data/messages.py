"""Messages of the chat format: their roles, and their content as text."""

import difflib
from typing import Any

from lopd.errors import DataError

Message = dict[str, Any]

# Roles of ShareGPT's turns. "observation" and "function_call" are LLaMA-Factory's.
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
_ROLES = ("system", "user", "assistant", "tool", "developer")
_TEXT_PARTS = ("text", "input_text", "output_text")


def check_messages(value: Any, where: str, field: str) -> list[Message]:
    """The messages under `field`, each with its content as text.

    Raises:
        DataError: `value` is not a list of messages, or one holds more than text.
    """
    if not isinstance(value, list):
        raise DataError(
            f"{where}: '{field}' is a {type(value).__name__}; expected a list of messages, each "
            "with 'role' and 'content'"
        )
    return [_message(item, f"{where}: '{field}'") for item in value]


def _message(item: Any, where: str) -> Message:
    if isinstance(item, dict) and item.get("content") is None and item.get("tool_calls"):
        item = {**item, "content": ""}  # OpenAI's form of a message that only calls tools
    if (
        not isinstance(item, dict)
        or not isinstance(item.get("role"), str)
        or not isinstance(item.get("content"), str | list)
    ):
        raise DataError(
            f"{where} is not a list of messages, each with 'role' and 'content' as text; expected "
            "the chat format"
        )
    role = item["role"]
    near = difflib.get_close_matches(role.lower(), _ROLES, n=1, cutoff=0.75)
    known = SHAREGPT_ROLES.get(role, near[0] if near else role)
    if role != known:
        raise DataError(
            f"{where}: found the role '{role}'; expected '{known}', the name by which chat "
            "templates know it"
        )
    return {**item, "content": text_of(item["content"], where)}


def text_of(content: str | list[Any], where: str) -> str:
    """The text of a message's content; parts of text are joined as they are.

    Raises:
        DataError: a part is not text; names its type.

    >>> text_of([{"type": "text", "text": "3 + "}, {"type": "text", "text": "5"}], "p.jsonl:1")
    '3 + 5'
    """
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        text = part.get("text") if kind in _TEXT_PARTS else None
        if not isinstance(text, str):
            raise DataError(
                f"{where}: found a content part of type {kind!r:.40}; expected parts of text only, "
                "{'type': 'text', 'text': ...}; lopd trains language models on text"
            )
        texts.append(text)
    return "".join(texts)


def sharegpt_messages(value: Any, where: str, field: str) -> list[Message]:
    """The messages of ShareGPT's `conversations`: turns with 'from' and 'value'.

    Raises:
        DataError: a turn has another form, or an unknown speaker.
    """
    if not isinstance(value, list):
        raise DataError(f"{where}: '{field}' is a {type(value).__name__}; expected a list of turns")
    if value and all(isinstance(turn, dict) and "role" in turn for turn in value):
        return check_messages(value, where, field)
    messages = []
    for turn in value:
        speaker = turn.get("from") if isinstance(turn, dict) else None
        role = SHAREGPT_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None or not isinstance(turn.get("value"), str):
            found = f"the speaker {speaker!r:.60}" if isinstance(turn, dict) else repr(turn)[:60]
            raise DataError(
                f"{where}: '{field}' (ShareGPT) holds {found}; expected turns with 'value' as "
                f"text and 'from' one of {', '.join(SHAREGPT_ROLES)}"
            )
        messages.append({"role": role, "content": turn["value"]})
    return messages
