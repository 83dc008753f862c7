"""Files with random faults: each is read or refused in one line, never with another exception."""

import gzip
import json
import random

import pytest
from conftest import TEMPLATE, train_bpe

from lopd.config.prompts import PromptOptions
from lopd.data.demonstrations import load_demonstrations
from lopd.data.prompts import load_prompts
from lopd.data.rendering import PromptEncoder
from lopd.errors import LopdError

USER, SAID = ({"role": role, "content": "the cat"} for role in ("user", "assistant"))
RECORDS = [
    {"prompt": "the cat", "answer": "5", "completion": "it sat"},
    {"messages": [USER, SAID], "id": 3},
    {"question": "the cat", "answer": "x\n#### 5"},
    {"problem": "the cat", "solution": r"\boxed{5}"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "the cat", "input": "ran", "output": "it sat", "system": "red"},
    {"prompt": [USER], "completion": [SAID], "tools": [{"name": "x"}], "enable_thinking": False},
    {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "cat"}]}],
        "reward_model": {},
    },
]
VALUES = [None, True, -1, 10**30, 1e308, float("nan"), "", " ", "\0", "\U0001f600", [], {}, [None]]
VALUES += [
    [[]],
    [{}],
    {"a": None},
    {"role": "user"},
    [1],
    [SAID],
    ["a", "b"],
    "<eos>",
    "#### ",
    USER,
]
NAMES = ["prompt", "messages", "id", "answer", "tools", "chat_template", "from", "role", "content"]
BYTES = [b"[", b"{", b'"', b"\\ud800", b"\\u0000", b"NaN", b"9" * 4400, b"[" * 2000, b"\n", b"\xff"]


def faulty(value, source):
    """The value with a part replaced, renamed, left out or repeated, now and then."""
    if source.random() < 0.04:
        return source.choice(VALUES)
    if isinstance(value, dict):
        items = [(k, faulty(v, source)) for k, v in value.items() if source.random() > 0.02]
        return {source.choice(NAMES) if source.random() < 0.03 else k: v for k, v in items}
    if isinstance(value, list):
        return [faulty(v, source) for v in value for _ in range(source.choice([1, 1, 1, 0, 2]))]
    return value


def damaged(data, source):
    place = source.randrange(len(data))
    kind = source.randrange(3)
    if kind == 0:
        return data[:place]
    return data[:place] + source.choice(BYTES) + data[place + (kind == 1) :]


@pytest.fixture(scope="module")
def encoders():
    settings = [{}, {"skip_bad_records": True}, {"special_tokens": "as_text"}]
    settings += [{"columns": "prompt=question,answer=answer.x"}]
    tools = TEMPLATE + "{{ tools }}{{ enable_thinking }}"
    tokenizers = [train_bpe(template) for template in (TEMPLATE, None, tools)]
    return [PromptEncoder(t, PromptOptions(**chosen)) for t in tokenizers for chosen in settings]


@pytest.mark.parametrize("count", [600, pytest.param(100_000, marks=pytest.mark.slow)])
def test_no_file_gives_another_exception(encoders, tmp_path, count):
    source, outcomes = random.Random(0), {"read": 0, "refused": 0}
    for _ in range(count):
        records = [faulty(source.choice(RECORDS), source) for _ in range(source.choice([1, 2, 3]))]
        name = source.choice(["p.jsonl", "p.json", "p.jsonl.gz"])
        lines = "".join(json.dumps(record) + "\n" for record in records)
        data = (json.dumps(records) if name == "p.json" else lines).encode()
        data = gzip.compress(data, 1) if name.endswith(".gz") else data
        path = tmp_path / name
        path.write_bytes(damaged(data, source) if source.random() < 0.15 else data)
        encoder = source.choice(encoders)
        for read in (load_prompts, load_demonstrations):
            try:
                read(path, encoder)
                outcomes["read"] += 1
            except LopdError as error:
                assert len(str(error)) < 2000
                outcomes["refused"] += 1
    assert min(outcomes.values()) > count // 8
