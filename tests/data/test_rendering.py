"""Chat templates and special tokens: what a prompt holds, and every doubt about it."""

from datetime import date

import pytest
from conftest import TEMPLATE, train_bpe
from tokenizers.processors import TemplateProcessing

from lopd.config.prompts import PromptOptions
from lopd.data.demonstrations import load_demonstrations
from lopd.data.prompts import describe_prompts, load_prompts
from lopd.data.rendering import MAX_PROMPT, PromptEncoder
from lopd.errors import ConfigError, DataError

THINKING = (
    "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}{% if tools %}{{ tools }}{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}the red{% endif %}{% endif %}"
)
DATED = "{{ strftime_now('%Y') }}" + TEMPLATE
PARTS = (
    "{% for m in messages %}<|user|>{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}<|assistant|>"
)


def encode(tokenizer, record, write_jsonl, today=None, **settings):
    encoder = PromptEncoder(tokenizer, PromptOptions(**settings), today)
    (prompt,) = load_prompts(write_jsonl([record]), encoder)
    return tokenizer.decode(prompt.tokens)


def adding(before="", after=""):
    """A tokenizer without a template that adds <pad> as BOS before, and EOS after a text."""
    tokenizer = train_bpe()
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<pad>", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{before} $A {after}".strip(), special_tokens=ids
    )
    tokenizer.bos_token = "<pad>"
    return tokenizer


@pytest.mark.parametrize(
    ("record", "settings", "end"),
    [
        ({}, {}, "<|assistant|>"),
        ({"enable_thinking": False}, {}, "<|assistant|>the red"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {}, "<|assistant|>the red"),
        ({}, {"chat_template_kwargs": '{"enable_thinking": false}'}, "<|assistant|>the red"),
        ({}, {"chat_template_kwargs": "{'enable_thinking': False}"}, "<|assistant|>the red"),
        (
            {"enable_thinking": True},
            {"chat_template_kwargs": '{"enable_thinking": false}'},
            "<|assistant|>",
        ),
        ({"tools": []}, {}, "<|user|>the<|assistant|>"),
        ({"tools": [{"a": 1}]}, {}, "{'a': 1}]<|assistant|>"),
        ({"tools": '[{"a": 1}]'}, {}, "{'a': 1}]<|assistant|>"),
        ({"add_generation_prompt": True}, {}, "<|assistant|>"),
    ],
)
def test_the_template_gets_its_variables(write_jsonl, record, settings, end):
    record = {"prompt": "the", **record}
    assert encode(train_bpe(THINKING), record, write_jsonl, **settings).endswith(end)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"documents": [{"text": "a"}]}, "does not read 'documents'"),
        ({"enable_thinkng": False}, r"did you mean 'enable_thinking'\?"),
        ({"chat_template_kwargs": {"thinking": 1}}, r"did you mean 'enable_thinking'\?"),
        ({"chat_template_kwargs": {"messages": []}}, "does not read 'messages'"),
        ({"chat_template_kwargs": {"tokenize": False}}, "does not read 'tokenize'"),
        ({"chat_template_kwargs": ["a"]}, "expected an object"),
        ({"enable_thinking": "false"}, "'enable_thinking' is text"),
        ({"reasoning_effort": "low"}, "does not read 'reasoning_effort'"),
        ({"date_string": "1 Jan 2026"}, "does not read 'date_string'"),
        ({"tools": "a"}, "'tools' is 'a'; expected an object, not text"),
        ({"tools": {"a": 1}}, "expected a list of objects"),
        ({"add_generation_prompt": False}, "ends where the answer begins"),
        ({"continue_final_message": True}, "ends where the answer begins"),
        ({"chat_template": "{{ x }}"}, "the template is the tokenizer's"),
    ],
)
def test_variables_that_nobody_reads_are_refused(write_jsonl, record, message):
    with pytest.raises(DataError, match=message):
        encode(train_bpe(THINKING), {"prompt": "the", **record}, write_jsonl)


def test_variables_of_the_whole_file_are_checked_before_it_is_read():
    settings = PromptOptions(chat_template_kwargs="{enable_thinkin: false}")
    with pytest.raises(ConfigError, match=r"did you mean 'enable_thinking'\?"):
        PromptEncoder(train_bpe(THINKING), settings)
    with pytest.raises(ConfigError, match="has no chat template"):
        PromptEncoder(train_bpe(), settings)
    for text in ("[1]", "7", "{a: [", '{"a": NaN}x'):
        with pytest.raises(ConfigError, match="chat_template_kwargs"):
            PromptOptions(chat_template_kwargs=text)


def test_a_token_that_the_tokenizer_appends_is_refused_or_left_out(write_jsonl, capsys):
    tokenizer, record = adding("<pad>", "<eos>"), {"prompt": "the cat"}
    with pytest.raises(DataError, match=r"ends with '<eos>', .*--special-tokens once"):
        encode(tokenizer, record, write_jsonl)
    found = {
        choice: encode(tokenizer, record, write_jsonl, special_tokens=choice)
        for choice in ("once", "keep", "as_text")
    }
    assert found == {"once": "<pad>the cat", "keep": "<pad>the cat<eos>", "as_text": "the cat"}
    assert "the text does not begin with '<pad>'" in capsys.readouterr().err


def test_a_second_bos_is_refused_or_left_out(write_jsonl):
    tokenizer, record = adding("<pad>"), {"prompt": "<pad>the cat"}
    with pytest.raises(DataError, match="begins with '<pad>' twice"):
        encode(tokenizer, record, write_jsonl)
    assert encode(tokenizer, record, write_jsonl, special_tokens="once") == "<pad>the cat"
    assert encode(tokenizer, record, write_jsonl, special_tokens="as_text") == "<pad>the cat"
    assert encode(tokenizer, record, write_jsonl, special_tokens="keep") == "<pad><pad>the cat"
    assert encode(tokenizer, {"prompt": "the"}, write_jsonl) == "<pad>the"


def test_text_with_the_template_applied_is_not_given_it_again(write_jsonl):
    tokenizer = train_bpe(TEMPLATE)
    text = "<|user|>the cat<eos><|assistant|>"
    with pytest.raises(DataError, match=r"'<\|user\|>', which the chat template writes"):
        encode(tokenizer, {"prompt": text}, write_jsonl)
    assert encode(tokenizer, {"prompt": text}, write_jsonl, special_tokens="as_text") == text
    twice = encode(tokenizer, {"prompt": text}, write_jsonl, special_tokens="keep")
    assert twice == f"<|user|>{text}<eos><|assistant|>"
    messages = [{"role": "user", "content": "the"}]
    with pytest.raises(DataError, match="as_text applies no chat template"):
        encode(tokenizer, {"messages": messages}, write_jsonl, special_tokens="as_text")


def test_an_answer_holds_no_end_of_sequence_before_its_own(write_jsonl):
    tokenizer = train_bpe(TEMPLATE)
    path = write_jsonl([{"prompt": "the", "completion": "cat<eos>"}])
    with pytest.raises(DataError, match="the answer holds '<eos>'.*--special-tokens once"):
        load_demonstrations(path, PromptEncoder(tokenizer))
    for choice, text in (("once", "cat<eos>"), ("keep", "cat<eos><eos>")):
        encoder = PromptEncoder(tokenizer, PromptOptions(special_tokens=choice))
        (shown,) = load_demonstrations(path, encoder)
        assert tokenizer.decode(shown.tokens[shown.prompt_length :]) == text


@pytest.mark.parametrize("key", ["reasoning_content", "tool_calls"])
def test_an_answer_that_is_more_than_its_content_is_refused(write_jsonl, key):
    messages = [
        {"role": "user", "content": "the"},
        {"role": "assistant", "content": "cat", key: "it sat"},
    ]
    with pytest.raises(DataError, match=f"has '{key}', which training on its content leaves out"):
        load_demonstrations(
            write_jsonl([{"messages": messages}]), PromptEncoder(train_bpe(TEMPLATE))
        )


@pytest.mark.parametrize("template", [PARTS, "<|user|>{{ messages[0].content[0].text + '' }}"])
def test_a_template_that_needs_parts_gets_them(write_jsonl, template):
    found = encode(train_bpe(template), {"prompt": "the cat"}, write_jsonl)
    assert found.startswith("<|user|>the cat")


def test_a_template_that_drops_the_text_is_refused():
    with pytest.raises(DataError, match="without the text of the user's message"):
        PromptEncoder(train_bpe("{% for m in messages %}<|user|>{% endfor %}"))


def test_the_date_of_a_template_is_pinned_and_recorded(write_jsonl):
    tokenizer, path = train_bpe(DATED), write_jsonl([{"prompt": "the"}])
    for encoder in (
        PromptEncoder(tokenizer, today=date(2031, 5, 6)),
        PromptEncoder(tokenizer, PromptOptions(prompt_date="2031-05-06"), date(1999, 1, 1)),
    ):
        assert encoder.date is None
        (prompt,) = load_prompts(path, encoder)
        assert tokenizer.decode(prompt.tokens).startswith("2031<|user|>")
        assert describe_prompts(path, encoder)["reading"]["date"] == "2031-05-06"
    plain = PromptEncoder(train_bpe(TEMPLATE))
    load_prompts(path, plain)
    assert plain.date is None and "reading" not in describe_prompts(path, plain)
    with pytest.raises(ConfigError, match="expected YYYY-MM-DD"):
        PromptOptions(prompt_date="6 May")


USERS_ONLY = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% endif %}"
    "{% endfor %}<|assistant|>"
)


@pytest.mark.parametrize("role", ["system", "developer", "critic"])
def test_a_role_that_the_template_drops_is_refused(write_jsonl, role):
    said = {"role": role, "content": "a dog"}
    record = {"messages": [said, {"role": "user", "content": "the cat"}]}
    with pytest.raises(DataError, match=f"role '{role}', of which the chat template writes noth"):
        encode(train_bpe(USERS_ONLY), record, write_jsonl)
    assert "a dog" in encode(train_bpe(TEMPLATE), record, write_jsonl)
    blank = {"messages": [{**said, "content": ""}, {"role": "user", "content": "the cat"}]}
    assert encode(train_bpe(USERS_ONLY), blank, write_jsonl) == "<|user|>the cat<|assistant|>"


def test_a_random_template_is_refused(write_jsonl):
    tokenizer = train_bpe("{{ range(10**5) | random }}" + TEMPLATE)
    with pytest.raises(DataError, match="encoded twice, the prompt gave different tokens"):
        encode(tokenizer, {"prompt": "the"}, write_jsonl)


def test_settings_have_one_spelling():
    first = PromptOptions(chat_template_kwargs='{"b": false, "a": 1}', columns="prompt=q, id = n")
    second = PromptOptions(chat_template_kwargs="{a: 1, 'b': False}", columns="id=n,prompt=q")
    recipe = {
        "chat_template_kwargs": {"a": "1", "b": "false"},
        "columns": {"id": "n", "prompt": "q"},
    }
    assert first == second == PromptOptions(**recipe)
    assert PromptOptions(chat_template_kwargs="{a: {b: [no, 2024-01-02, null, -0.5]}}") == (
        PromptOptions(chat_template_kwargs='{"a": {"b": ["no", "2024-01-02", null, -0.5]}}')
    )


def test_a_message_that_only_calls_tools_has_no_text(write_jsonl):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "red"}}]}
    messages = [{"role": "user", "content": "the"}, call, {"role": "tool", "content": "cat"}]
    template = TEMPLATE.replace("{{ m.content }}", "{{ m.content or m.tool_calls[0] }}")
    found = encode(train_bpe(template), {"messages": messages}, write_jsonl)
    assert "<|assistant|>{'function': {'name': 'red'}}<eos><|tool|>cat" in found


@pytest.mark.parametrize("field", ["prompt", "completion"])
def test_text_beyond_every_context_is_refused_before_it_is_tokenised(write_jsonl, field):
    record = {"prompt": "the", "completion": "cat", field: "a" * (MAX_PROMPT + 1)}
    with pytest.raises(DataError, match=f"8388609 characters; expected at most {MAX_PROMPT}"):
        load_demonstrations(write_jsonl([record]), PromptEncoder(train_bpe()))
