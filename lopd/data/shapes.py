"""Shapes of records: which columns of a data set hold the prompt, the answer and its text.

| shape | columns | prompt | answer for `lopd eval` | text for `lopd sft` |
| --- | --- | --- | --- | --- |
| lopd, TRL | prompt or messages, ... | as named | answer | completion, or the last message |
| verl | prompt, reward_model | prompt | reward_model.ground_truth | |
| ShareGPT | conversations | its turns | | the last turn, of the assistant |
| Alpaca | instruction, input, output | instruction, a line break, input | | output |
| GSM8K | question, answer | question | answer, after its last `####` | answer, if it has `####` |
| MATH | problem, answer or solution | problem | answer, or the solution's last box | solution |

`--columns` names the columns of every other data set.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lopd.config.prompts import TARGETS
from lopd.data.messages import sharegpt_messages
from lopd.errors import DataError

BOXED = r"\boxed{"
# Names that data sets give to a column, likeliest first.
_USUAL = {
    "prompt": ("prompt", "question", "problem", "query", "instruction", "input", "inputs"),
    "completion": (
        *("completion", "response", "output", "generation", "generated_solution", "chosen"),
        *("solution", "targets"),
    ),
    "answer": ("answer", "expected_answer", "final_answer", "ground_truth", "gold", "target"),
}


@dataclass(frozen=True)
class Shaped:
    """A record under lopd's names; `shape` is the form that was recognised, if any had to be."""

    shape: str | None
    fields: dict[str, Any]


def shaped(record: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> Shaped:
    """Give the columns of a record lopd's names.

    Args:
        columns: from lopd's names to the record's columns; empty to go by the columns' own names.

    Raises:
        DataError: the record has no known shape, or lacks a column that `columns` names.

    >>> shaped({"question": "3 + 5?", "answer": "3 + 5 = 8\\n#### 8"}, "p.jsonl:1", {}).fields
    {'prompt': '3 + 5?', 'answer': '8', 'completion': '3 + 5 = 8\\n#### 8'}
    """
    if columns:
        return Shaped(None, _named(record, where, columns))
    if "prompt" in record or "messages" in record:
        reward = record.get("reward_model")
        if "answer" not in record and isinstance(reward, Mapping) and "ground_truth" in reward:
            return Shaped("verl", {**record, "answer": reward["ground_truth"]})
        return Shaped(None, dict(record))
    for recognise in (_sharegpt, _alpaca, _gsm8k, _math):
        if (found := recognise(record, where)) is not None:
            return found
    raise DataError(f"{where}: found {keys_of(record)}; {_advice(record)}")


def columns_for(record: Mapping[str, Any], *targets: str) -> str:
    """The `--columns` that would read these targets from a record; empty if none fits."""
    pairs, taken = [], set()
    for target in targets:
        by_name = {str(key).lower(): str(key) for key in record if key not in taken}
        usual = next((by_name[name] for name in _USUAL[target] if name in by_name), None)
        if usual is None:
            return ""
        taken.add(usual)
        pairs.append(f"{target}={usual}")
    return f"--columns {','.join(pairs)}"


def keys_of(record: Mapping[str, Any]) -> str:
    """The keys of a record for an error message."""
    return f"keys {sorted(record)!s:.200}"


def after_marker(text: str) -> str | None:
    r"""What follows GSM8K's `#### ` in the last line of a solution; None without one.

    >>> after_marker("3 + 5 = 8\n#### 8")
    '8'
    """
    last = text.rstrip().rpartition("\n")[2]
    before, marker, answer = last.rpartition("####")
    return answer.strip() or None if marker and not before.strip() else None


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` with balanced braces, or None."""
    start = len(text)
    while (start := text.rfind(BOXED, 0, start)) >= 0:
        depth, begin = 1, start + len(BOXED)
        for end in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[begin:end]
    return None


def at(record: Any, column: str) -> Any:
    """The value of a column, or of a field inside one, `column.field`."""
    if isinstance(record, Mapping):
        if column in record:
            return record[column]
        head, dot, rest = column.partition(".")
        return at(record.get(head), rest) if dot else None
    return None


def _sharegpt(record: Mapping[str, Any], where: str) -> Shaped | None:
    for name in ("conversations", "conversation"):
        if name in record:
            messages = sharegpt_messages(record[name], where, name)
            if isinstance(system := record.get("system"), str) and system:
                messages = [{"role": "system", "content": system}, *messages]
            return Shaped("ShareGPT", {**_without(record, name, "system"), "messages": messages})
    return None


def _alpaca(record: Mapping[str, Any], where: str) -> Shaped | None:
    if not {"instruction", "output"} <= record.keys():
        return None
    instruction, more, output = (record.get(key) for key in ("instruction", "input", "output"))
    if record.get("history"):
        raise DataError(
            f"{where}: an Alpaca record with 'history', earlier turns; write them as 'messages'"
        )
    if not isinstance(instruction, str) or not isinstance(more, str | None):
        raise DataError(f"{where}: an Alpaca record whose 'instruction' or 'input' is not text")
    prompt: Any = f"{instruction}\n{more}" if more else instruction
    if isinstance(system := record.get("system"), str) and system:
        prompt = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    rest = _without(record, "instruction", "input", "output", "system", "history")
    return Shaped("Alpaca", {**rest, "prompt": prompt, "completion": output})


def _gsm8k(record: Mapping[str, Any], where: str) -> Shaped | None:
    if not {"question", "answer"} <= record.keys():
        return None
    answer, rest = record["answer"], _without(record, "question", "answer")
    fields = {**rest, "prompt": record["question"], "answer": answer}
    if isinstance(answer, str) and (final := after_marker(answer)) is not None:
        return Shaped("GSM8K", {**fields, "answer": final, "completion": answer})
    return Shaped("question and answer", fields)


def _math(record: Mapping[str, Any], where: str) -> Shaped | None:
    if "problem" not in record or not {"answer", "solution"} & record.keys():
        return None
    fields = {**_without(record, "problem", "solution"), "prompt": record["problem"]}
    if isinstance(solution := record.get("solution"), str):
        fields.setdefault("completion", solution)
        if (boxed := last_boxed(solution)) is not None:
            fields.setdefault("answer", boxed)
    return Shaped("MATH", fields)


def _without(record: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in names}


def _named(record: Mapping[str, Any], where: str, columns: Mapping[str, str]) -> dict[str, Any]:
    fields = {}
    for name, column in columns.items():
        value = at(record, column)
        if value is None and name in ("prompt", "messages", "completion", "answer"):
            near = difflib.get_close_matches(column, map(str, record), n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"found {keys_of(record)}"
            raise DataError(f"{where}: has no '{column}', the {name} of --columns; {hint}")
        if value is not None:
            fields[name] = value
    system = fields.pop("system", None)
    if isinstance(system, str) and system:
        said = fields.get("prompt", fields.get("messages"))
        if isinstance(said, str):
            said = [{"role": "user", "content": said}]
        if isinstance(said, list):
            key = "prompt" if "prompt" in fields else "messages"
            fields[key] = [{"role": "system", "content": system}, *said]
    for key in ("prompt", "messages"):
        turns = fields.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" in turns[0]:
            fields[key] = sharegpt_messages(turns, where, columns[key])
    return fields


def _advice(record: Mapping[str, Any]) -> str:
    expected = "expected exactly one of 'prompt', 'messages'"
    for key in record:
        if near := difflib.get_close_matches(str(key), ("prompt", "messages"), n=1, cutoff=0.85):
            return f"{expected}; did you mean '{near[0]}' by '{key}'?"
    if {"chosen", "rejected"} <= record.keys():
        return f"{expected}; preference pairs without a prompt are not read"
    for targets in (("prompt", "completion"), ("prompt", "answer"), ("prompt",)):
        if flag := columns_for(record, *targets):
            return f"{expected}, or the columns named with {flag}"
    if set(record) == {"text"}:
        return f"{expected}; text without a prompt is not read: split it into prompt and completion"
    return f"{expected}, or --columns with {', '.join(TARGETS[:4])} and the columns they are in"
