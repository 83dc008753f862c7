"""Faults of dumps in `lopd import`: skipped records, stand-ins, unscored tokens, rounding."""

import numpy as np
import pytest
from helpers_import import distill, run, topk_record, write

from lopd.cli import main
from lopd.provenance import read_manifest
from lopd.store import TeacherCache


def test_bad_records_are_left_out_on_request_and_counted(
    student, teacher_folder, dumped, tmp_path, capsys
):
    records = [topk_record(*item) for item in dumped]
    beyond = {**records[1], "response_token_ids": [9999, *records[1]["response_token_ids"][1:]]}
    beyond["logprobs"] = [{**beyond["logprobs"][0], 9999: -20.0}, *beyond["logprobs"][1:]]
    source = write(tmp_path / "dump.jsonl", [records[0], beyond, records[2]])
    with source.open("a") as file:
        file.write('{"torn": \n')
    cache, flag = tmp_path / "cache", "--skip-bad-records"
    assert run(source, "topk", student, teacher_folder, cache) == 2
    error = capsys.readouterr().err
    assert "dump.jsonl:2: token" in error and "has id 9999" in error and flag in error
    assert not cache.exists()
    assert run(source, "topk", student, teacher_folder, cache, flag) == 0
    printed = capsys.readouterr().err
    assert "left out 2 of 4 records" in printed and printed.count("dump.jsonl:2: ") == 1
    assert read_manifest(cache).raw["inputs"]["source"]["left_out"] == 2
    found = [item.rollout.tokens.tolist() for item in TeacherCache.open(cache)]
    assert found == [prompt + answer for prompt, answer, _ in (dumped[0], dumped[2])]


def answers_with(own, ids=(7, 8, 9)):
    """Records of log-probs of sampled tokens alone, 6 to an answer."""
    return [
        {
            "prompt_token_ids": [5],
            "response_token_ids": [ids[(start + i) % len(ids)] for i in range(6)],
            "logprobs": [{}] * 6,
            "teacher_logprobs": own[start : start + 6].tolist(),
        }
        for start in range(0, len(own), 6)
    ]


def test_log_probs_with_a_floor_are_refused(student, teacher_folder, tmp_path, capsys):
    own = -np.random.default_rng(0).exponential(2.0, 60)
    source, out = tmp_path / "dump.jsonl", tmp_path / "cache"
    own[::11] = np.log(1e-10)
    assert run(write(source, answers_with(own)), "topk", student, teacher_folder, out) == 2
    assert "6 sampled tokens have a log-prob of exactly -23.0259" in capsys.readouterr().err
    assert not out.exists()
    again = answers_with(own[:6]) * 6  # one answer that occurs six times
    assert run(write(source, again), "topk", student, teacher_folder, out) == 0
    capsys.readouterr()
    own[:] = -np.random.default_rng(0).exponential(2.0, 60)
    own[7] = np.log(np.finfo(np.float32).tiny)
    assert (
        run(write(source, answers_with(own)), "topk", student, teacher_folder, tmp_path / "c") == 2
    )
    assert "dump.jsonl:2: the teacher's log-prob of response token 1" in capsys.readouterr().err


@pytest.mark.parametrize("value", [-1.0, -12.0])
def test_a_whole_number_that_stands_for_none_is_refused(
    student, teacher_folder, tmp_path, capsys, value
):
    rng = np.random.default_rng(0)
    own = -rng.exponential(2.0, 60)
    own[::10] = value
    records = [
        {
            "prompt_token_ids": [5],
            "response_token_ids": [7] * 6,
            "logprobs": [{}] * 6,
            "teacher_logprobs": part.tolist(),
        }
        for part in own.reshape(10, 6)
    ]
    source = write(tmp_path / "dump.jsonl", records)
    assert run(source, "topk", student, teacher_folder, tmp_path / "cache") == 2
    assert f"6 sampled tokens have a log-prob of exactly {value:g}" in capsys.readouterr().err
    for record in records:  # the same in the log-probs of the policy
        record["rollout_logprobs"] = record["teacher_logprobs"]
        record["teacher_logprobs"] = (-rng.exponential(2.0, 6)).tolist()
    source = write(tmp_path / "dump.jsonl", records)
    assert run(source, "topk", student, teacher_folder, tmp_path / "cache") == 2
    assert f"have a rollout_logprob of exactly {value:g}" in capsys.readouterr().err
    for record in records:  # rounded to halves, a whole number is nothing special
        own = record.pop("rollout_logprobs")
        record["teacher_logprobs"] = [round(2 * x) / 2 for x in own]
    source = write(tmp_path / "dump.jsonl", records)
    assert run(source, "topk", student, teacher_folder, tmp_path / "cache") == (value == -12.0) * 2


def test_masked_tokens_without_scores_and_rounded_lists_are_recorded(
    student, teacher_folder, dumped, tmp_path, capsys
):
    records = []
    for prompt, answer, scores in dumped:
        record = topk_record(prompt, answer, scores)
        record["logprobs"][1] = {-1: 0.0}
        record["loss_mask"] = [1, 0] + [1] * len(answer[2:])
        record["logprobs"][0] = {i: -2.3 for i in {answer[0], *range(20, 30)} - {29}}
        records.append(record)
    source = write(tmp_path / "dump.jsonl", records)
    cache = tmp_path / "cache"
    for record in records:
        record["logprobs"] = [
            {i: round(p, 2) for i, p in row.items()} for row in record["logprobs"]
        ]
    source = write(tmp_path / "dump.jsonl", records)
    assert run(source, "topk", student, teacher_folder, cache) == 0
    source_record = read_manifest(cache).raw["inputs"]["source"]
    assert (source_record["unscored"], source_record["padding"]) == (3, 3)
    assert source_record["rounded"] == 3 and "left_out" not in source_record
    assert "3 masked tokens have no log-prob" in capsys.readouterr().err
    assert main(["verify", "--path", str(cache)]) == 0
    assert distill(student, cache, tmp_path / "out") == 0
