"""Rollouts of other tools: every shape gives the same tokens and mask, and misfits are named."""

import json

import numpy as np
import pytest
from conftest import train_bpe

from lopd.data.external_rollouts import read_rollouts
from lopd.data.rendering import PromptEncoder
from lopd.data.skipped import Skipped
from lopd.errors import DataError
from lopd.models.limits import ModelLimits

EOS = 2
# A prompt, a call of the model, the tool's output, and the model's answer.
PROMPT, CALL, TOOL, ANSWER = [5, 6, 9], [11, 12, EOS], [7, 13, 14, 8, 9], [15, EOS]
RESPONSE = [*CALL, *TOOL, *ANSWER]
MASK = [1] * 3 + [0] * 5 + [1] * 2
LOGPROBS = [-0.5, -0.25, -0.125, None, None, None, None, None, -1.5, -2.5]
WHOLE = PROMPT + RESPONSE
WHOLE_MASK = [0, 0, 0, *MASK]


def triples(values):
    return [[p, t, None] for t, p in zip(RESPONSE, values, strict=True)]


SHAPES = {
    "ids": {"prompt_token_ids": PROMPT, "response_token_ids": RESPONSE, "loss_mask": MASK},
    "whole mask": {"prompt_ids": PROMPT, "completion_ids": RESPONSE, "loss_mask": WHOLE_MASK},
    "TRL": {
        "prompt_ids": [0, 0, *PROMPT],
        "prompt_mask": [0, 0, 1, 1, 1],
        "completion_ids": [*RESPONSE, 0, 0],
        "completion_mask": [*MASK, 0, 0],
    },
    "assistant masks": {"input_ids": WHOLE, "assistant_masks": WHOLE_MASK},
    "booleans": {"input_ids": WHOLE, "loss_mask": [bool(x) for x in WHOLE_MASK]},
    "labels": {
        "input_ids": [0, *WHOLE],
        "labels": [-100] + [t if m else -100 for t, m in zip(WHOLE, WHOLE_MASK, strict=True)],
        "attention_mask": [0] + [1] * len(WHOLE),
    },
    "more after the last turn": {"input_ids": [*WHOLE, 7, 7], "loss_mask": [*WHOLE_MASK, 0, 0]},
    "verl": {
        "prompts": [0, *PROMPT],
        "responses": [*RESPONSE, 0],
        "attention_mask": [0] + [1] * len(WHOLE) + [0],
        "response_mask": [*MASK, 0],
    },
    "sglang": {
        "prompt_token_ids": PROMPT,
        "meta_info": {"output_token_logprobs": triples(LOGPROBS), "finish_reason": None},
        "loss_mask": MASK,
    },
}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(source, encoder=None, *, skipped=None, retokenize=False):
    encoder = encoder or PromptEncoder(train_bpe())
    return list(
        read_rollouts(
            source,
            encoder,
            [EOS],
            limits=ModelLimits("the student", vocab_size=400, context=64),
            skipped=skipped or Skipped(str(source), allowed=False),
            retokenize=retokenize,
        )
    )


@pytest.mark.parametrize("record", SHAPES.values(), ids=SHAPES)
def test_every_shape_gives_the_same_tokens_and_mask(tmp_path, record):
    (item,) = read(write(tmp_path / "r.jsonl", record))
    rollout = item.rollout
    skip = len(rollout.tokens) - len(WHOLE)
    assert rollout.tokens[skip:].tolist() == WHOLE and rollout.prompt_length == skip + 3
    assert rollout.loss_mask[skip:].tolist() == [bool(x) for x in WHOLE_MASK]
    assert rollout.finish_reason == "stop" and not item.retokenized


@pytest.mark.parametrize("key", ["rollout_logprobs", "rollout_log_probs", "logprobs"])
def test_log_probs_belong_to_the_tokens_of_the_model(tmp_path, key):
    record = {**SHAPES["ids"], key: LOGPROBS}
    (item,) = read(write(tmp_path / "r.jsonl", record))
    expected = [p or 0.0 for p in LOGPROBS]
    assert item.rollout.rollout_logprobs.tolist() == expected
    later = {**record, "loss_mask": [0, *MASK[1:]]}  # the prompt is longer by one
    (item,) = read(write(tmp_path / "r.jsonl", later))
    assert item.rollout.prompt_length == 4
    assert item.rollout.rollout_logprobs.tolist() == expected[1:]
    whole = {"input_ids": WHOLE, "loss_mask": WHOLE_MASK, key: [None] * 3 + LOGPROBS}
    (item,) = read(write(tmp_path / "r.jsonl", whole))
    assert item.rollout.rollout_logprobs.tolist() == expected


def test_the_answers_of_servers_are_read_with_their_log_probs(tmp_path):
    content = [{"token": f"token_id:{t}", "logprob": -0.5 * i} for i, t in enumerate(ANSWER)]
    choice = {"token_ids": ANSWER, "logprobs": {"content": content}, "finish_reason": "stop"}
    served = {"prompt_token_ids": PROMPT, "choices": [choice, {**choice, "index": 1}]}
    row = [{str(t): {"logprob": -0.5 * i}, "1": {"logprob": -9.0}} for i, t in enumerate(ANSWER)]
    output = {"token_ids": ANSWER, "logprobs": row, "finish_reason": "length"}
    items = read(
        write(
            tmp_path / "r.jsonl", served, {"prompt_token_ids": PROMPT, "outputs": [output], "id": 4}
        )
    )
    assert [(i.rollout.sample, i.rollout.finish_reason) for i in items] == [
        (0, "stop"),
        (1, "stop"),
        (0, "length"),
    ]
    for item in items:
        assert item.rollout.tokens.tolist() == PROMPT + ANSWER
        assert item.rollout.rollout_logprobs.tolist() == [0.0, -0.5]


MARKED = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TURNS = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": None, "tool_calls": []},
    {"role": "tool", "content": "it was raining"},
    {"role": "assistant", "content": "a dog ran"},
]


def test_messages_are_masked_by_the_templates_markers_on_request(tmp_path):
    encoder = PromptEncoder(train_bpe(MARKED))
    source = write(tmp_path / "r.jsonl", {"messages": TURNS, "finish_reason": "stop"})
    with pytest.raises(DataError, match=r"r.jsonl:1: recognised as messages.*--retokenize"):
        read(source, encoder)
    (item,) = read(source, encoder, retokenize=True)
    rollout, tokenizer = item.rollout, encoder.tokenizer
    own = tokenizer.decode(rollout.tokens[rollout.loss_mask])
    assert item.retokenized and own == f"{tokenizer.eos_token}a dog ran{tokenizer.eos_token}"
    before = tokenizer.decode(rollout.tokens[: rollout.prompt_length])
    assert before == f"<|user|>the cat{tokenizer.eos_token}<|assistant|>"
    split = write(tmp_path / "r.jsonl", {"prompt": TURNS[:3], "completion": TURNS[3:]})
    (item,) = read(split, encoder, retokenize=True)
    own = tokenizer.decode(item.rollout.tokens[item.rollout.loss_mask])
    assert own == f"a dog ran{tokenizer.eos_token}"


def test_a_template_without_markers_is_refused(tmp_path):
    encoder = PromptEncoder(train_bpe(MARKED.replace("generation %", "raw %")))
    source = write(tmp_path / "r.jsonl", {"messages": TURNS})
    with pytest.raises(DataError, match="does not mark the assistant's turns"):
        read(source, encoder, retokenize=True)


MISFITS = {
    "late by one": {"loss_mask": [0, *MASK[:-1]]},
    "early by one": {"loss_mask": [*MASK[1:], 0]},
    "early by one, as a whole": {"loss_mask": [*WHOLE_MASK[1:], 0]},
    "too short": {"loss_mask": MASK[1:]},
    "nothing bears loss": {"loss_mask": [0] * 10},
    "no numbers": {"loss_mask": ["x"] * 10},
    "no mask of a sequence": {"prompt_token_ids": None, "input_ids": WHOLE},
    "loss from the start": {"prompt_token_ids": None, "input_ids": WHOLE, "loss_mask": [1] * 13},
    "shifted labels": {"labels": [*RESPONSE[1:], -100], "loss_mask": None},
    "two masks": {"response_mask": [1] * 10},
    "too many log-probs": {"rollout_logprobs": [-1.0] * 11},
    "no log-prob of a sampled token": {"rollout_logprobs": [None, *LOGPROBS[1:]]},
    "one log-prob everywhere": {"rollout_logprobs": [0.0] * 10},
    "text": {"prompt_token_ids": None, "prompt": "a", "response": "b"},
    "beyond the vocabulary": {"response_token_ids": [500, *RESPONSE[1:]]},
    "beyond the context": {"prompt_token_ids": PROMPT * 30},
    "finish": {"finish_reason": "abort"},
    "choices without ids": {"choices": [{"message": {"content": "a"}}]},
    "an id of 10^30": {"response_token_ids": [10**30, *RESPONSE[1:]]},
    "numbers": {"prompt_token_ids": 3},
    "nested": {"choices": [[[]]]},
}


@pytest.mark.parametrize("change", MISFITS.values(), ids=MISFITS)
def test_a_misfit_is_named_with_its_line_or_skipped(tmp_path, change):
    good = {"prompt_token_ids": PROMPT, "response_token_ids": RESPONSE, "loss_mask": MASK}
    bad = {key: value for key, value in {**good, **change}.items() if value is not None}
    source = write(tmp_path / "r.jsonl", good, bad, good)
    with pytest.raises(DataError, match="r.jsonl:2: ") as caught:
        read(source)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    skipped = Skipped(str(source), allowed=True)
    assert len(read(source, skipped=skipped)) == 2 and len(skipped.errors) == 1


def test_masks_that_leave_out_the_end_of_a_turn_are_not_called_shifted(tmp_path):
    mask = [1, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    record = {"prompt_token_ids": PROMPT, "response_token_ids": RESPONSE, "loss_mask": mask}
    (item,) = read(write(tmp_path / "r.jsonl", record))
    assert np.flatnonzero(item.rollout.loss_mask).tolist() == [3, 4, 11]
