"""Prompt files: formats, ids, chat templates and every refusal."""

import pytest
from conftest import TEMPLATE, train_bpe

from lopd.data.prompts import Prompt, check_prompts, load_prompts
from lopd.data.rendering import PromptEncoder
from lopd.errors import ConfigError, DataError, MissingFileError


@pytest.fixture(scope="module")
def plain():
    return train_bpe()


@pytest.fixture(scope="module")
def chat():
    return train_bpe(TEMPLATE)


def test_text_is_tokenised_as_it_is_without_a_template(plain, write_jsonl):
    (prompt,) = load_prompts(
        write_jsonl([{"prompt": "the cat", "answer": 7}]), PromptEncoder(plain), answers=True
    )
    assert plain.decode(prompt.tokens) == "the cat"
    assert prompt.answer == "7"


def test_every_format_gives_the_same_templated_prompt(chat, write_jsonl):
    user = {"role": "user", "content": "the cat"}
    records = [
        {"prompt": "the cat"},
        {"prompt": [user]},
        {"messages": [user]},
        {"messages": [user, {"role": "assistant", "content": "sat"}]},
    ]
    prompts = load_prompts(write_jsonl(records), PromptEncoder(chat))
    assert len({tuple(prompt.tokens) for prompt in prompts}) == 1
    assert chat.decode(prompts[0].tokens) == "<|user|>the cat<eos><|assistant|>"


def test_ids_do_not_depend_on_the_order(plain, write_jsonl):
    records = [
        {"prompt": "a cat"},
        {"prompt": "a dog"},
        {"prompt": "a cat"},
        {"id": "x", "prompt": "it"},
    ]
    forward = load_prompts(write_jsonl(records), PromptEncoder(plain))
    backward = load_prompts(write_jsonl(records[::-1], "other.jsonl"), PromptEncoder(plain))
    assert len({prompt.id for prompt in forward}) == 4
    assert {(p.id, tuple(p.tokens)) for p in forward} == {(p.id, tuple(p.tokens)) for p in backward}
    assert forward[3].id == "x"


def test_limit_takes_the_first(plain, write_jsonl):
    path = write_jsonl([{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}])
    assert (
        load_prompts(path, PromptEncoder(plain), limit=2)
        == load_prompts(path, PromptEncoder(plain))[:2]
    )


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "holds no prompts"),
        ([{"text": "a"}], r"prompts.jsonl:1: found keys \['text'\]; expected exactly one of"),
        ([{"prompt": "a", "messages": []}], "found prompt and messages"),
        ([{"prompt": "a"}, {"prompt": ""}], "prompts.jsonl:2: 'prompt' is empty"),
        ([{"messages": [{"role": "user"}]}], "not a list of"),
        ([{"messages": [{"role": "user", "content": None}]}], "'content' as text"),
        ([{"id": None, "prompt": "a"}], "id is None; expected a string"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], "no message before"),
        ([{"id": 1, "prompt": "a"}, {"id": "1", "prompt": "b"}], "id '1' was used at"),
        ([["prompt"]], "found a list"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "no chat template"),
    ],
)
def test_a_bad_file_is_refused_by_name_and_line(plain, write_jsonl, records, message):
    with pytest.raises(DataError, match=message):
        load_prompts(write_jsonl(records), PromptEncoder(plain))


def test_a_line_that_is_not_json(plain, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(DataError, match="p.jsonl:2: not JSON"):
        load_prompts(tmp_path / "p.jsonl", PromptEncoder(plain))


def test_a_file_that_is_not_utf8(plain, tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match="p.jsonl:1: not JSON in UTF-8"):
        load_prompts(tmp_path / "p.jsonl", PromptEncoder(plain))


def test_a_missing_file(plain, tmp_path):
    with pytest.raises(MissingFileError, match="absent.jsonl: no such file"):
        load_prompts(tmp_path / "absent.jsonl", PromptEncoder(plain))


def test_prompts_that_the_model_cannot_take_are_refused():
    prompts = [Prompt("short", [7], None), Prompt("long", [1] * 10, None)]
    fits = {"context": 18, "vocab_size": 8, "max_new_tokens": 8}
    check_prompts(prompts, "p.jsonl", **fits)
    check_prompts(prompts, "p.jsonl", **fits | {"context": None})
    with pytest.raises(DataError, match=r"prompt 'long': found 10 tokens and .*at most 17, the"):
        check_prompts(prompts, "p.jsonl", **fits | {"context": 17})
    with pytest.raises(DataError, match=r"prompt 'short': token \d has id 7; .*\[0, 7\)"):
        check_prompts(prompts, "p.jsonl", **fits | {"vocab_size": 7})


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(plain, write_jsonl, limit):
    with pytest.raises(ConfigError, match=f"limit: found {limit}"):
        load_prompts(write_jsonl([{"prompt": "a"}]), PromptEncoder(plain), limit=limit)


def test_a_template_that_refuses_is_named(chat, write_jsonl):
    template, chat.chat_template = chat.chat_template, "{{ raise_exception('roles alternate') }}"
    try:
        with pytest.raises(DataError, match=r"prompts.jsonl:1: .*roles alternate"):
            load_prompts(write_jsonl([{"prompt": "a"}]), PromptEncoder(chat))
    finally:
        chat.chat_template = template


def test_encoding_returns_plain_ints(chat):
    tokens = PromptEncoder(chat).encode("the", {}, "x")
    assert all(type(token) is int for token in tokens)
