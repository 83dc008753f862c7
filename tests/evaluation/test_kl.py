"""The KL on a stored cache against dense logits of both models."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers_stages import make_rollouts, one_line, score_argv

from lopd.cli import main
from lopd.engines.transformers import TransformersEngine
from lopd.errors import DataError
from lopd.evaluation.kl import cache_kl, open_cache
from lopd.store import TeacherCache

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def cache_folder(teacher_folder, student_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("held-out")
    rollouts = make_rollouts(student_folder, folder)
    flags = ["--temperature", TEMPERATURE]
    assert main(score_argv(teacher_folder, rollouts, folder / "cache", *flags)) == 0
    return folder / "cache"


def load(folder, **limits):
    return TransformersEngine.load(folder, dtype="float32", device="cpu", **limits)


def dense_kl(student, teacher, rollout, k):
    """Sum over a response's tokens, on the teacher's top k with the sampled token, and the rest."""
    ids = torch.from_numpy(rollout.tokens).long()
    positions = slice(rollout.prompt_length - 1, -1)
    with torch.no_grad():
        p, q = (
            torch.softmax(engine.model(ids[None]).logits[0, positions].double() / TEMPERATURE, -1)
            for engine in (student, teacher)
        )
    total = 0.0
    for row, token in enumerate(ids[rollout.prompt_length :].tolist()):
        listed = sorted({*q[row].topk(k).indices.tolist(), token})
        pb, qb = (torch.cat([x[row, listed], 1 - x[row, listed].sum(0, True)]) for x in (p, q))
        total += float((pb * (pb / qb).log()).sum())
    return total


@pytest.mark.parametrize("tokens_per_batch", [1, 50, 10**6])
def test_the_kl_on_a_cache_is_that_of_dense_logits(
    cache_folder, teacher_folder, student_folder, tokens_per_batch
):
    student, teacher = load(student_folder, tokens_per_batch=tokens_per_batch), load(teacher_folder)
    result = cache_kl(student, open_cache(cache_folder, student_folder, student))
    rollouts = list(TeacherCache.open(cache_folder).rollouts())
    total = sum(dense_kl(student, teacher, rollout, 6) for rollout in rollouts)
    tokens = sum(int(rollout.loss_mask.sum()) for rollout in rollouts)
    assert result["nats_per_token"] == pytest.approx(total / tokens, rel=1e-4)
    assert (result["tokens"], result["sequences"]) == (tokens, 20)
    assert result["temperature"] == TEMPERATURE


def test_the_teacher_has_no_kl_to_its_own_cache(cache_folder, teacher_folder):
    teacher = load(teacher_folder)
    result = cache_kl(teacher, open_cache(cache_folder, teacher_folder, teacher))
    assert abs(result["nats_per_token"]) < 1e-5


def test_a_cache_imported_from_renormalised_lists_is_refused(
    cache_folder, teacher_folder, student_folder, prompt_file, tmp_path, capsys
):
    """Its tails were lost before the import: a KL over list and tail would be a wrong number."""
    source, cache = tmp_path / "dump.jsonl", tmp_path / "imported"
    source.write_text("".join(map(renormalised_record, TeacherCache.open(cache_folder))))
    argv = ["import", "--source", source, "--format", "topk", "--teacher", teacher_folder]
    argv += ["--student", student_folder, "--out", cache, "--allow_renormalized"]
    assert main(list(map(str, argv))) == 0
    assert main(eval_argv(student_folder, cache, prompt_file, tmp_path / "out")) == 2
    assert "mass outside them is lost" in one_line(capsys)
    assert not (tmp_path / "out").exists()


def renormalised_record(item):
    """A line of a dump that lists the stored ids with their mass scaled to 1."""
    rows = []
    for ids, logprobs in zip(item.topk_ids, item.topk_logprobs.astype(float), strict=True):
        listed = ids >= 0
        scaled = logprobs[listed] - np.logaddexp.reduce(logprobs[listed])
        pairs = zip(ids[listed].tolist(), scaled.tolist(), strict=True)
        rows.append([[token, min(logprob, 0.0)] for token, logprob in pairs])
    length = item.rollout.prompt_length
    tokens = item.rollout.tokens.tolist()
    record = {"prompt_token_ids": tokens[:length], "response_token_ids": tokens[length:]}
    return json.dumps({**record, "logprobs": rows}) + "\n"


def test_sequences_longer_than_the_model_are_refused(cache_folder, student_folder):
    student = load(student_folder)
    student.context = 8
    with pytest.raises(DataError, match="expected at most 8, the context of the model"):
        cache_kl(student, open_cache(cache_folder, student_folder, student))


def eval_argv(model, cache, prompts, out):
    argv = ["eval", "--model", model, "--cache", cache, "--prompts", prompts, "--out", out]
    flags = ["--max_new_tokens", 4, "--num_samples", 1, "--dtype", "float32", "--device", "cpu"]
    return list(map(str, argv + flags))


def test_an_altered_cache_is_refused(cache_folder, student_folder, prompt_file, tmp_path, capsys):
    cache = tmp_path / "cache"
    shutil.copytree(cache_folder, cache)
    shard = cache / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert main(eval_argv(student_folder, cache, prompt_file, tmp_path / "out")) == 2
    assert "shard-00001" in one_line(capsys) and not (tmp_path / "out").exists()


def test_another_tokenizer_is_refused(cache_folder, student_folder, prompt_file, tmp_path, capsys):
    other = tmp_path / "model"
    shutil.copytree(student_folder, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    ids = list(vocab.values())
    tokenizer["model"]["vocab"] = dict(zip(vocab, [*ids[:4], *ids[:3:-1]], strict=True))
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(eval_argv(other, cache_folder, prompt_file, tmp_path / "out")) == 2
    assert "leave --cache out" in one_line(capsys)


@pytest.mark.parametrize("trained_on", [False, True])
def test_the_result_says_whether_the_cache_was_held_out(
    cache_folder, student_folder, prompt_file, tmp_path, capsys, trained_on
):
    model = tmp_path / "model"
    shutil.copytree(student_folder, model)
    if trained_on:
        from lopd.provenance import build_manifest, describe_model, write_manifest

        described = describe_model(model, dtype="float32", engine="transformers")
        digest = TeacherCache.open(cache_folder).digest()
        parts = {"model": described, "base": described, "inputs": {"cache": {"digest": digest}}}
        write_manifest(model, build_manifest("checkpoint", stage="distill", config={}, **parts))
    assert main(eval_argv(model, cache_folder, prompt_file, tmp_path / "out")) == 0
    result = json.loads((tmp_path / "out/results.json").read_text())["cache_kl"]
    assert result["held_out"] is not trained_on and result["nats_per_token"] > 0
    assert ("which it was trained on" in capsys.readouterr().out) == trained_on
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["inputs"]["cache"]["digest"] == TeacherCache.open(cache_folder).digest()
