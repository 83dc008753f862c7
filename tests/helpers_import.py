"""Dumps as another tool would write them, and the commands that tests of `lopd import` run."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lopd.cli import main
from lopd.engines.transformers import TransformersEngine
from lopd.models.load import load_tokenizer

PROMPTS = ["the cat sat", "a dog ran to", "it was raining"]
K = 6


def dump_of(teacher_folder, student):
    """What a teacher says of made-up answers, as it would be dumped: ids, log-probs, own."""
    tokenizer = load_tokenizer(student)
    teacher = TransformersEngine.load(teacher_folder, dtype="float32", device="cpu")
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in PROMPTS]
    rng = np.random.default_rng(0)
    answers = [rng.integers(5, 200, 4 + i).tolist() for i in range(len(prompts))]
    answers[0][-1] = tokenizer.eos_token_id
    sequences = [np.array(p + a, np.int32) for p, a in zip(prompts, answers, strict=True)]
    scores = teacher.score(sequences, [len(p) for p in prompts], K)
    return list(zip(prompts, answers, scores, strict=True))


def lists_of(answer, scores):
    """vLLM's k or k + 1 entries a token: the token itself is always there."""
    rows = []
    for t, token in enumerate(answer):
        pairs = zip(scores.topk_ids[t].tolist(), scores.topk_logprobs[t].tolist(), strict=True)
        rows.append({**dict(pairs), token: float(scores.teacher_logprobs[t])})
    return rows


def topk_record(prompt, answer, scores, form="dict"):
    rows = lists_of(answer, scores)
    record = {"prompt_token_ids": prompt, "response_token_ids": answer}
    if form == "dict":
        return {**record, "logprobs": rows}
    if form == "vllm":
        objects = [{i: {"logprob": p, "rank": 1} for i, p in row.items()} for row in rows]
        return {**record, "logprobs": objects}
    if form == "pairs":
        return {**record, "logprobs": [[[i, p] for i, p in row.items()] for row in rows]}
    if form == "structs":
        structs = [[{"token_id": i, "logprob": p} for i, p in row.items()] for row in rows]
        return {**record, "logprobs": structs}
    if form == "arrays":
        return {
            **record,
            "topk_ids": [list(row) for row in rows],
            "topk_logprobs": [list(row.values()) for row in rows],
        }
    whole = [None, *({1: -1.0} for _ in prompt[1:]), *rows]
    return {
        "prompt_token_ids": prompt + answer,
        "prompt_length": len(prompt),
        "prompt_logprobs": whole,
    }


def write(path: Path, records) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(source, form, student, teacher, out, *flags):
    argv = ["--source", str(source), "--format", form, "--student", str(student)]
    return main(["import", *argv, "--teacher", str(teacher), "--out", str(out), *flags])


def distill(student, cache, out, *flags):
    argv = ["distill", "--student", str(student), "--cache", str(cache), "--out", str(out)]
    settings = ["--max-steps", "1", "--batch-size", "2", "--save-every", "0"]
    return main([*argv, *settings, "--dtype", "float32", "--device", "cpu", *flags])


def rescore(student, teacher, cache):
    argv = ["verify", "--path", str(cache), "--rescore", "3", "--teacher", str(teacher)]
    return main([*argv, "--student", str(student), "--dtype", "float32", "--device", "cpu"])
