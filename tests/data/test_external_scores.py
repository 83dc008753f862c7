"""Dumps of other tools: every shape gives one sequence, and no stand-in passes for a log-prob."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lopd.data.external_scores import read_dump
from lopd.data.skipped import Skipped
from lopd.errors import DataError

PROMPT, ANSWER = [3, 4], [7, 8]
LISTS = [{7: -0.1, 9: -3.0}, {5: -0.4, 8: -1.5}]
OWN = [-0.1, -1.5]


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def named(token):
    return f"token_id:{token}"


def chat(**choice):
    content = [
        {
            "token": named(token),
            "logprob": logprob,
            "bytes": None,
            "top_logprobs": [
                {"token": named(i), "logprob": p, "bytes": None} for i, p in row.items()
            ],
        }
        for token, logprob, row in zip(ANSWER, OWN, LISTS, strict=True)
    ]
    return {"index": 0, "logprobs": {"content": content}, "finish_reason": "stop", **choice}


def completion(tokens=ANSWER, own=OWN, lists=LISTS, **choice):
    logprobs = {
        "tokens": [named(token) for token in tokens],
        "token_logprobs": own,
        "top_logprobs": [row and {named(i): p for i, p in row.items()} for row in lists],
        "text_offset": [0] * len(tokens),
    }
    return {"text": "", "logprobs": logprobs, "finish_reason": "stop", **choice}


def triples(row):
    return [[p, i, "text"] for i, p in row.items()]


SGLANG = {
    "input_token_logprobs": [[None, 3, None], [-2.0, 4, None]],
    "output_token_logprobs": [[p, i, None] for p, i in zip(OWN, ANSWER, strict=True)],
    "output_top_logprobs": [triples(row) for row in LISTS],
    "finish_reason": {"type": "stop", "matched": 8},
    "prompt_tokens": 2,
}
SGLANG_SCORES = {
    "input_token_logprobs": [*SGLANG["input_token_logprobs"], *SGLANG["output_token_logprobs"]],
    "input_top_logprobs": [None, None, *SGLANG["output_top_logprobs"]],
}
VLLM = [{str(i): {"logprob": p, "rank": 1} for i, p in row.items()} for row in LISTS]
PLAIN = {"prompt_token_ids": PROMPT, "response_token_ids": ANSWER, "finish_reason": "stop"}
PADDED = {
    "topk_ids": [[7, 9, -1, -1], [5, 8, 6, 2]],
    "topk_logprobs": [[-0.1, -3.0, 0.0, -1.0], [-0.4, -1.5, float("-inf"), -9999.0]],
}
SHAPES = {
    "plain": {**PLAIN, "logprobs": LISTS},
    "token_id keys": {**PLAIN, "logprobs": [{named(i): p for i, p in r.items()} for r in LISTS]},
    "padded": {**PLAIN, **PADDED},
    "triples": {**PLAIN, "logprobs": [triples(row) for row in LISTS]},
    "chat": {"prompt_token_ids": PROMPT, "choices": [chat()]},
    "chat with ids": {"prompt_token_ids": PROMPT, "choices": [chat(token_ids=ANSWER)]},
    "completion": {"choices": [completion(prompt_token_ids=PROMPT, token_ids=ANSWER)]},
    "echo": {
        "prompt_token_ids": PROMPT,
        "choices": [completion(PROMPT + ANSWER, [None, -1.0, *OWN], [None, {4: -1.0}, *LISTS])],
    },
    "sglang": {"meta_info": SGLANG, "output_ids": ANSWER},
    "sglang scores": {"meta_info": SGLANG_SCORES, "prompt_length": 2, "finish_reason": "stop"},
    "vllm output": {
        "prompt_token_ids": PROMPT,
        "outputs": [{"token_ids": ANSWER, "logprobs": VLLM, "finish_reason": "stop"}],
    },
    "served prompt logprobs": {
        "prompt_token_ids": PROMPT + ANSWER,
        "prompt_length": 2,
        "choices": [{"prompt_logprobs": [None, {"4": {"logprob": -1.0}}, *VLLM]}],
        "finish_reason": "stop",
    },
}


@pytest.mark.parametrize("record", SHAPES.values(), ids=SHAPES)
def test_every_shape_gives_the_same_sequence(tmp_path, record):
    (found,) = read_dump(write(tmp_path / "d.jsonl", record), "topk", None, vocab_size=10)
    assert found.rollout.tokens.tolist() == PROMPT + ANSWER
    assert found.rollout.prompt_length == 2 and found.rollout.finish_reason == "stop"
    assert found.teacher_logprobs.tolist() == OWN
    assert found.lists.lengths.tolist() == [2, 2] and found.lists.ids.tolist() == [7, 9, 5, 8]
    assert found.lists.logprobs.tolist() == [-0.1, -3.0, -0.4, -1.5]


def test_prompt_logprobs_are_read_from_parquet_though_the_first_is_null(tmp_path):
    record = {
        "prompt_token_ids": PROMPT + ANSWER,
        "prompt_length": 2,
        "prompt_logprobs": [None, {"4": {"logprob": -1.0}}, *VLLM],
        "finish_reason": "stop",
    }
    path = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_pylist([record]), path)
    (found,) = read_dump(path, "topk", None)
    assert found.lists.ids.tolist() == [7, 9, 5, 8] and found.teacher_logprobs.tolist() == OWN


def test_padding_may_have_any_id(tmp_path):
    record = {
        "prompt_token_ids": PROMPT,
        "response_token_ids": ANSWER,
        "topk_ids": [[7, 9, 0, 0], [5, 8, 0, 0]],
        "topk_logprobs": [[-0.1, -3.0, -9999.0, -9999.0], [-0.4, -1.5, -9999.0, -9999.0]],
        "teacher_logprobs": OWN,
        "finish_reason": "stop",
    }
    (found,) = read_dump(write(tmp_path / "d.jsonl", record), "topk", None)
    assert found.padding == 4 and found.lists.ids.tolist() == [7, 9, 5, 8]


def test_rollout_log_probs_that_are_all_the_same_are_refused(tmp_path):
    record = {
        "prompt_token_ids": PROMPT,
        "response_token_ids": [7] * 4,
        "logprobs": [{"7": -0.1}] * 4,
        "finish_reason": "stop",
    }
    record["rollout_logprobs"] = [-0.5] * 4
    with pytest.raises(DataError, match="all 4 rollout_logprobs are -0.5"):
        list(read_dump(write(tmp_path / "d.jsonl", record), "topk", None))


def test_several_answers_of_one_request_are_samples_of_a_prompt(tmp_path):
    record = {"prompt_token_ids": PROMPT, "choices": [chat(), chat(index=1)], "id": "chat-1"}
    found = list(read_dump(write(tmp_path / "d.jsonl", record), "topk", None))
    names = [(item.rollout.prompt_id, item.rollout.sample) for item in found]
    assert names == [("chat-1", 0), ("chat-1", 1)]


TEXT = {"content": [{"token": "The", "logprob": -0.1, "top_logprobs": []}]}
REFUSED = {
    "text tokens": (
        {"prompt_token_ids": PROMPT, "choices": [{"logprobs": TEXT}]},
        "OpenAI chat log-probs whose tokens are text.*return_tokens_as_token_ids=true",
    ),
    "no prompt": ({"choices": [chat()]}, "OpenAI chat log-probs, without.*return_token_ids=true"),
    "no log-probs": (
        {"choices": [{"message": {"content": "a"}}]},
        "an OpenAI response, without log-probs; request them with logprobs=true",
    ),
    "other ids": (
        {"prompt_token_ids": PROMPT, "choices": [chat(token_ids=[7, 9])]},
        "log-probs are of different tokens",
    ),
    "sglang without a prompt": (
        {"meta_info": {**SGLANG, "input_token_logprobs": []}},
        "SGLang output, without the ids of the prompt; request .*logprob_start_len=0",
    ),
    "sglang text": ({"meta_info": "x"}, "SGLang output; expected an object"),
    "vllm without log-probs": (
        {"prompt_token_ids": PROMPT, "outputs": [{"token_ids": ANSWER}]},
        r"vLLM request output, without 'logprobs'; expected SamplingParams\(logprobs=K\)",
    ),
    "messages": ({"messages": []}, "no scores: import it with --format rollouts"),
}


@pytest.mark.parametrize("record, message", REFUSED.values(), ids=REFUSED)
def test_a_refusal_names_the_shape_and_the_remedy(tmp_path, record, message):
    with pytest.raises(DataError, match=f"d.jsonl:1: .*{message}"):
        list(read_dump(write(tmp_path / "d.jsonl", record), "topk", None))


STAND_INS = [1.0, 0.5, -100.0, -999.0, -1000.0, -9999.0, float("-inf"), float("nan"), None]


@pytest.mark.parametrize("value", STAND_INS, ids=str)
@pytest.mark.parametrize("place", ["own", "list"])
def test_what_no_softmax_gives_is_refused_where_the_token_bears_loss(tmp_path, value, place):
    record = {**PLAIN, "logprobs": LISTS, "teacher_logprobs": [value, -1.5]}
    if place == "list":
        record = {**PLAIN, "logprobs": [{7: value, 9: -3.0}, LISTS[1]]}
    with pytest.raises(DataError, match="d.jsonl:1: .*response token 0"):
        list(read_dump(write(tmp_path / "d.jsonl", record), "topk", None))
    if place == "own":
        masked = write(tmp_path / "d.jsonl", {**record, "loss_mask": [0, 1]})
        (found,) = read_dump(masked, "topk", None)
        assert found.unscored == 1 and found.lists.lengths.tolist() == [0, 2]
        assert found.teacher_logprobs.tolist() == [0.0, -1.5]


CONTRADICTIONS = {
    "another value than in the list": ([-1.0, -1.5], LISTS, "its entry in the list is -0.1"),
    "zero in the list's place": ([-0.1, 0.0], LISTS, "its entry in the list is -1.5"),
    "above the smallest": (
        [-1.0, -1.5],
        [{5: -1.0, 6: -4.0}, LISTS[1]],
        "the smallest of its list",
    ),
    "zero outside a list": ([0.0, -1.5], [{5: -0.4}, LISTS[1]], "the smallest of its list"),
    "more than is left": ([-2.0, -1.5], [{5: -0.05}, LISTS[1]], "the mass that its list leaves"),
}


@pytest.mark.parametrize("own, lists, message", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_value_that_its_list_contradicts_is_refused(tmp_path, own, lists, message):
    record = {**PLAIN, "logprobs": lists, "teacher_logprobs": own}
    with pytest.raises(DataError, match=f"d.jsonl:1: .*{message}"):
        list(read_dump(write(tmp_path / "d.jsonl", record), "topk", None))


@pytest.mark.parametrize("value", [0.0, -1.0, -0.7])
def test_an_answer_of_one_value_without_lists_is_refused(tmp_path, value):
    record = {**PLAIN, "response_token_ids": [7, 8, 9, 7], "logprobs": [{}] * 4}
    record["teacher_logprobs"] = [value] * 4
    with pytest.raises(DataError, match="all 4 log-probs are"):
        list(read_dump(write(tmp_path / "d.jsonl", record), "topk", None))
    record["teacher_logprobs"][0] = -0.25
    assert list(read_dump(write(tmp_path / "d.jsonl", record), "topk", None))


HOSTILE = {
    "an id of 10^30": {"response_token_ids": [10**30, 8]},
    "an id of 2^32 + 7": {"response_token_ids": [2**32 + 7, 8]},
    "a listed id of 10^30": {"logprobs": [{str(10**30): -0.1, 7: -2.0}, LISTS[1]]},
    "a negative id": {"response_token_ids": [-7, 8]},
    "a log-prob of 10^400": {"logprobs": [{7: -(10**400)}, LISTS[1]]},
    "nested ids": {"prompt_token_ids": [[3], [4]]},
    "ragged ids": {"prompt_token_ids": [3, [4]]},
    "probabilities": {"logprobs": [{7: 0.9, 9: 0.05}, LISTS[1]]},
    "zero padding": {"logprobs": [[[7, -0.1], [0, 0.0], [0, 0.0]], LISTS[1]]},
    "an id that is a list": {"id": [1]},
    "an id that is true": {"id": True},
    "a sample of 10^30": {"sample": 10**30},
    "a mask of 10^30": {"loss_mask": [10**30, 1]},
    "no dict": {"choices": [3]},
    "choices of text": {"choices": "abc"},
    "nothing in meta_info": {"meta_info": {}},
    "numbers in meta_info": {"meta_info": {"output_token_logprobs": [1, 2]}},
    "null outputs": {"outputs": None},
    "an unhashable finish": {"finish_reason": {"type": []}},
    "lists of text": {"logprobs": "ab"},
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_record_is_named_or_skipped(tmp_path, change):
    good = {**PLAIN, "logprobs": LISTS}
    source = write(tmp_path / "d.jsonl", good, {**good, **change}, good)
    with pytest.raises(DataError, match="d.jsonl:2: ") as caught:
        list(read_dump(source, "topk", None))
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    skipped = Skipped(str(source), allowed=True)
    assert len(list(read_dump(source, "topk", None, skipped=skipped))) == 2
    assert len(skipped.errors) == 1


def test_rounded_lists_are_scaled_and_others_refused(tmp_path):
    logprobs = {i: -2.3 for i in range(10)}  # 10 exp(-2.3) = 1.0026
    record = {"prompt_token_ids": [1], "response_token_ids": [7], "finish_reason": "stop"}
    source = write(tmp_path / "d.jsonl", {**record, "logprobs": [logprobs]})
    (found,) = read_dump(source, "topk", None)
    assert found.mass[0] == pytest.approx(1.002588, abs=1e-6)
    assert np.exp(found.lists.logprobs).sum() == pytest.approx(1, abs=1e-12)
    fine = {i: p + 1.234567e-5 for i, p in logprobs.items()}
    coarse = {i: -2.29 for i in range(10)}  # mass 1.0127
    for values in (fine, coarse):
        source = write(tmp_path / "d.jsonl", {**record, "logprobs": [values]})
        with pytest.raises(DataError, match="a list of mass 1.0"):
            list(read_dump(source, "topk", None))
