"""Shapes of records: published data sets give the right prompts, answers and texts."""

import pytest
from conftest import TEMPLATE, train_bpe

from lopd.config.prompts import PromptOptions
from lopd.data.demonstrations import load_demonstrations
from lopd.data.prompts import answer_text, load_prompts
from lopd.data.rendering import PromptEncoder
from lopd.errors import ConfigError, DataError

GSM8K = {"question": "the cat?", "answer": "it sat\nand ran\n#### 1,200"}
MATH = {"problem": "the cat?", "solution": r"so \boxed{\frac{1}{2}}.", "level": 5}
USER = {"role": "user", "content": "the cat?"}
SAID = {"role": "assistant", "content": "it sat"}


@pytest.fixture(scope="module")
def chat():
    return train_bpe(TEMPLATE)


def options(**values):
    return PromptOptions(**values)


def read(tokenizer, path, **settings):
    """(prompt, expected answer, text to train on) of a file's only record, None where refused."""
    (prompt,) = load_prompts(path, PromptEncoder(tokenizer, options(**settings)))
    try:
        encoder = PromptEncoder(tokenizer, options(**settings))
        (prompt,) = load_prompts(path, encoder, answers=True)
    except DataError as error:
        assert "has no 'answer'" in str(error)
    try:
        (shown,) = load_demonstrations(path, PromptEncoder(tokenizer, options(**settings)))
    except DataError as error:
        assert "found no answer text" in str(error)
        return tokenizer.decode(prompt.tokens), prompt.answer, None
    assert shown.tokens[: shown.prompt_length].tolist() == prompt.tokens
    text = tokenizer.decode(shown.tokens[shown.prompt_length : -1])
    return tokenizer.decode(prompt.tokens), prompt.answer, text


@pytest.mark.parametrize(
    ("record", "answer", "text", "shape"),
    [
        (GSM8K, "1,200", GSM8K["answer"], "GSM8K"),
        ({"question": "the cat?", "answer": "5"}, "5", None, "question and answer"),
        (MATH, r"\frac{1}{2}", MATH["solution"], "MATH"),
        (MATH | {"answer": "0.5"}, "0.5", MATH["solution"], "MATH"),
        ({"instruction": "the cat?", "input": "", "output": "it sat"}, None, "it sat", "Alpaca"),
        (
            {
                "conversations": [
                    {"from": "human", "value": "the cat?"},
                    {"from": "gpt", "value": "it sat"},
                ]
            },
            None,
            "it sat",
            "ShareGPT",
        ),
        ({"conversations": [USER, SAID]}, None, "it sat", "ShareGPT"),
        (
            {
                "prompt": [USER],
                "reward_model": {"style": "rule", "ground_truth": "7"},
                "ability": 1,
            },
            "7",
            None,
            "verl",
        ),
        ({"prompt": [USER], "completion": [SAID]}, None, "it sat", None),
        ({"prompt": "the cat?", "completion": [SAID], "answer": 18.0}, "18", "it sat", None),
        ({"prompt": "the cat?", "answer": ["7"], "source": "x", "idx": 3}, "7", None, None),
    ],
)
def test_published_shapes(chat, write_jsonl, capsys, record, answer, text, shape):
    found = read(chat, write_jsonl([record]), special_tokens=None)
    assert found == ("<|user|>the cat?<eos><|assistant|>", answer, text)
    assert (f"read as {shape}" in capsys.readouterr().err) == (shape is not None)


def test_alpaca_joins_instruction_and_input(chat, write_jsonl):
    record = {"instruction": "the cat", "input": "sat", "output": "x", "system": "a dog"}
    prompt, _, _ = read(chat, write_jsonl([record]))
    assert prompt == "<|system|>a dog<eos><|user|>the cat\nsat<eos><|assistant|>"


def test_columns_name_what_is_read_and_all_else_is_ignored(chat, write_jsonl):
    record = {"q": "the cat?", "gold": {"value": "7"}, "promt": "no", "enable_thinking": True}
    path = write_jsonl([record])
    assert read(chat, path, columns="prompt=q,answer=gold.value") == (
        "<|user|>the cat?<eos><|assistant|>",
        "7",
        None,
    )
    with pytest.raises(DataError, match=r"has no 'golds', .*did you mean 'gold'\?"):
        read(chat, path, columns="prompt=q,answer=golds")
    with pytest.raises(DataError, match="no record has 'schema'"):
        read(chat, path, columns="prompt=q,tools=schema")


@pytest.mark.parametrize("text", ["prompt", "prompt=", "prompt=a,prompt=b", "promt=a"])
def test_columns_that_cannot_be_meant(text):
    with pytest.raises(ConfigError, match="columns: "):
        PromptOptions(columns=text)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"query": "a", "response": "b"}, "--columns prompt=query,completion=response"),
        ({"Problem": "a", "Answer": "b"}, "--columns prompt=Problem,answer=Answer"),
        ({"promt": "a"}, r"did you mean 'prompt' by 'promt'\?"),
        ({"text": "a"}, "text without a prompt is not read"),
        ({"chosen": "a", "rejected": "b"}, "preference pairs"),
        ({"prompt": "a", "messages": [USER]}, "choose with --columns"),
        ({"prompt": "a", "chat_template_kwarg": {}}, r"did you mean 'chat_template_kwargs'\?"),
        ({"prompt": "a", "answers": "5"}, r"did you mean 'answer'\?"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "ShareGPT.*speaker 'alien'"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "Alpaca .*'history'"),
        ({"prompt": '[{"role": "user", "content": "a"}]'}, "messages as JSON"),
        ({"prompt": " \n"}, "'prompt' is blank"),
        ({"messages": [{"role": "user", "content": " "}]}, "is blank"),
        ({"messages": [USER, {"role": "gpt", "content": "a"}]}, "role 'gpt'; expected 'assistant'"),
        ({"prompt": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type 'image_url'"),
        ({"prompt": "a", "answer": ["1", "2"]}, "expected one text or number"),
        ({"prompt": "a", "answer": float("nan")}, "expected one text or number"),
        ({"prompt": "a", "answer": None}, "has no 'answer'; expected one in each record"),
        ({"prompt": "a", "anwser": "5"}, "did you mean 'answer' by 'anwser'"),
        (
            {"prompt": "a", "expected_answer": "5"},
            "has no 'answer'; pass --columns prompt=prompt,answer=expected_answer",
        ),
        ({"prompt": "a", "system": "b"}, "prompt=COLUMN,system=system to put it before"),
        ({"question": "a", "answer": "1", "system_prompt": "b"}, "system=system_prompt"),
        ({"prompt": "a", "images": ["b.png"]}, "'images' beside the prompt; lopd reads text only"),
        ({"prompt": "a", "history": [["b", "c"]]}, "write earlier turns as 'messages'"),
        ({"messages": [{"role": "User", "content": "a"}]}, "role 'User'; expected 'user'"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "role 'usr'; expected 'user'"),
    ],
)
def test_a_refusal_names_the_shape_and_the_remedy(chat, write_jsonl, record, message):
    with pytest.raises(DataError, match=message):
        load_prompts(write_jsonl([record]), PromptEncoder(chat), answers=True)


def test_parts_of_text_are_one_text(chat, write_jsonl):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat?"}]
    record = {"messages": [{"role": "user", "content": parts}, SAID]}
    assert read(chat, write_jsonl([record])) == (
        "<|user|>the cat?<eos><|assistant|>",
        None,
        "it sat",
    )


def test_ids_of_the_same_prompt_with_other_variables_do_not_depend_on_the_order(write_jsonl):
    tokenizer = train_bpe(TEMPLATE + "{{ mood }}")
    records = [{"prompt": "the cat", "mood": "a"}, {"prompt": "the cat", "mood": "the"}]
    forward = load_prompts(write_jsonl(records), PromptEncoder(tokenizer))
    backward = load_prompts(write_jsonl(records[::-1]), PromptEncoder(tokenizer))
    assert forward == backward[::-1] and forward[0].tokens != forward[1].tokens


def test_bad_records_are_left_out_on_request(chat, write_jsonl, capsys):
    records = [{"prompt": "a"}, {"prompt": ""}, {"prompt": "the"}, {"x": 1}]
    path = write_jsonl(records)
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(DataError, match=r":2: .*--skip-bad-records leaves such records out"):
        load_prompts(path, PromptEncoder(chat))
    prompts = load_prompts(path, PromptEncoder(chat, options(skip_bad_records=True)))
    assert len(prompts) == 2
    printed = capsys.readouterr().err
    assert "left out 3 of 5 records" in printed and f"{path}:5: not JSON" in printed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7, "7"),
        (18.0, "18"),
        (0.5, "0.5"),
        ("18.0", "18.0"),
        ("a\n#### 5", "5"),
        ("#### 5", "5"),
        ("a #### 5", "a #### 5"),
        ("####", "####"),
        (None, None),
    ],
)
def test_answers_as_text(value, text):
    assert answer_text(value, "x") == text


def test_the_column_of_the_answer_is_proposed(chat, write_jsonl):
    path = write_jsonl([{"prompt": "a", "response": "b"}])
    with pytest.raises(DataError, match="or pass --columns prompt=prompt,completion=response"):
        load_demonstrations(path, PromptEncoder(chat))
