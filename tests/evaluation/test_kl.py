"""Both KLs of an evaluation against dense logits; what `lopd eval --cache` refuses and reports."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers_stages import COMMON, declared, make_rollouts, one_line, score_argv

from lopd.cli import main
from lopd.config.evaluate import EvalConfig
from lopd.data.prompts import Prompt, load_prompts
from lopd.data.rendering import PromptEncoder
from lopd.engines.base import Sampling
from lopd.engines.transformers import TransformersEngine
from lopd.errors import ConfigError, DataError
from lopd.evaluation.accuracy import generate_answers
from lopd.evaluation.kl import cache_kl, on_policy_kl, open_cache
from lopd.stages.evaluate import headline
from lopd.store import TeacherCache

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def student_folder(student_folder, teacher_folder, tmp_path_factory):
    """The student with a statement of its teacher, as `lopd distill` requires."""
    return declared(student_folder, teacher_folder, tmp_path_factory.mktemp("declared"))


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
    """Sum over response tokens; buckets: the teacher's top k, the sampled token, all others."""
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
def test_kl_on_a_cache_equals_that_of_dense_logits(
    cache_folder, teacher_folder, student_folder, tokens_per_batch
):
    student, teacher = load(student_folder, tokens_per_batch=tokens_per_batch), load(teacher_folder)
    result = cache_kl(student, open_cache(cache_folder, student_folder, student))
    rollouts = list(TeacherCache.open(cache_folder).rollouts())
    totals = [dense_kl(student, teacher, rollout, 6) for rollout in rollouts]
    counts = [int(rollout.loss_mask.sum()) for rollout in rollouts]
    total, tokens = sum(totals), sum(counts)
    assert result["nats_per_token"] == pytest.approx(total / tokens, rel=1e-4)
    pairs = [*zip(rollouts[::2], rollouts[1::2], strict=True)]  # the two answers to each prompt
    assert all(one.prompt_id == other.prompt_id for one, other in pairs)
    residuals = np.array(totals) - total / tokens * np.array(counts)
    squares = ((residuals[::2] + residuals[1::2]) ** 2).sum()
    expected = np.sqrt(10 / 9 * squares) / tokens
    assert result["standard_error"] == pytest.approx(expected, rel=1e-3)
    assert (result["tokens"], result["sequences"]) == (tokens, 20)
    assert result["temperature"] == TEMPERATURE


def test_teacher_has_no_kl_to_its_own_cache(cache_folder, teacher_folder):
    teacher = load(teacher_folder)
    result = cache_kl(teacher, open_cache(cache_folder, teacher_folder, teacher))
    assert abs(result["nats_per_token"]) < 1e-5


@pytest.fixture
def renormalized_cache(cache_folder, teacher_folder, student_folder, tmp_path):
    """The scores of the cache, renormalised over their lists, dumped and imported."""
    records = []
    for item in TeacherCache.open(cache_folder, support="list+sampled"):
        tokens, length = item.rollout.tokens.tolist(), item.rollout.prompt_length
        logprobs = item.topk_logprobs - np.logaddexp.reduce(item.topk_logprobs, 1, keepdims=True)
        lists = [
            {str(i): float(value) for i, value in zip(*row, strict=True) if i >= 0}
            for row in zip(item.topk_ids, logprobs, strict=True)
        ]
        responses = {"response_token_ids": tokens[length:], "logprobs": lists}
        records.append({"prompt_token_ids": tokens[:length], **responses})
    dump = tmp_path / "dump.jsonl"
    dump.write_text("".join(json.dumps(record) + "\n" for record in records))
    argv = ["import", "--source", dump, "--format", "topk", "--allow-renormalized"]
    argv += ["--teacher", teacher_folder, "--student", student_folder]
    assert main(list(map(str, [*argv, "--out", tmp_path / "renormalized"]))) == 0
    return tmp_path / "renormalized"


def test_cache_with_renormalized_lists_is_refused(
    renormalized_cache, student_folder, prompt_file, tmp_path, capsys
):
    student = load(student_folder)
    with pytest.raises(ConfigError, match="mass outside them is lost"):
        open_cache(renormalized_cache, student_folder, student)
    argv = eval_argv(student_folder, renormalized_cache, prompt_file, tmp_path / "out")
    assert main(argv) == 2
    assert "leave --cache out" in one_line(capsys) and not (tmp_path / "out").exists()


def test_sequences_longer_than_the_model_are_refused(cache_folder, student_folder):
    student = load(student_folder)
    student.context = 8
    with pytest.raises(DataError, match="expected at most 8, the context of the model"):
        cache_kl(student, open_cache(cache_folder, student_folder, student))


def eval_argv(model, cache, prompts, out):
    argv = ["eval", "--model", model, "--cache", cache, "--prompts", prompts, "--out", out]
    flags = ["--max-new-tokens", 4, "--num-samples", 1, "--dtype", "float32", "--device", "cpu"]
    return list(map(str, argv + flags))


def test_altered_cache_is_refused(cache_folder, student_folder, prompt_file, tmp_path, capsys):
    cache = tmp_path / "cache"
    shutil.copytree(cache_folder, cache)
    shard = cache / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert main(eval_argv(student_folder, cache, prompt_file, tmp_path / "out")) == 2
    assert "shard-00001" in one_line(capsys) and not (tmp_path / "out").exists()


def test_model_with_another_tokenizer_is_refused(
    cache_folder, student_folder, prompt_file, tmp_path, capsys
):
    other = tmp_path / "model"
    shutil.copytree(student_folder, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    ids = list(vocab.values())
    tokenizer["model"]["vocab"] = dict(zip(vocab, [*ids[:4], *ids[:3:-1]], strict=True))
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(eval_argv(other, cache_folder, prompt_file, tmp_path / "out")) == 2
    assert "leave --cache out" in one_line(capsys)


@pytest.mark.parametrize("trained_on", ["", "the cache", "another cache of its rollouts"])
def test_eval_reports_whether_the_cache_was_held_out(
    cache_folder, teacher_folder, student_folder, prompt_file, tmp_path, capsys, trained_on
):
    model = student_folder
    if trained_on:
        model, cache = tmp_path / "model", cache_folder
        if trained_on != "the cache":
            cache = tmp_path / "cache"
            scoring = score_argv(teacher_folder, cache_folder.parent / "rollouts", cache)
            assert main([*scoring, "--extra-ids", "2"]) == 0
        argv = ["distill", "--student", student_folder, "--cache", cache, "--out", model]
        assert main(list(map(str, [*argv, "--max-steps", 1, "--save-every", 0, *COMMON]))) == 0
    assert main(eval_argv(model, cache_folder, prompt_file, tmp_path / "out")) == 0
    result = json.loads((tmp_path / "out/results.json").read_text())["cache_kl"]
    assert result["held_out"] is not bool(trained_on) and result["nats_per_token"] > 0
    assert ("which the model was trained on" in capsys.readouterr().out) == bool(trained_on)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["inputs"]["cache"]["digest"] == TeacherCache.open(cache_folder).digest()


def test_a_cache_is_enough(cache_folder, student_folder, prompt_file, tmp_path, capsys):
    out = tmp_path / "out"
    argv = eval_argv(student_folder, cache_folder, prompt_file, tmp_path / "both")
    assert main(argv) == 0
    alone = ["eval", "--model", student_folder, "--cache", cache_folder, "--out", out, *COMMON]
    assert main(list(map(str, alone))) == 0
    results = json.loads((out / "results.json").read_text())
    both = json.loads((tmp_path / "both/results.json").read_text())
    assert results == {"prompts": 0, "samples": 0, "cache_kl": both["cache_kl"]}
    assert (out / "answers.jsonl").read_bytes() == b""
    assert set(json.loads((out / "manifest.json").read_text())["inputs"]) == {"cache"}
    capsys.readouterr()
    assert main(list(map(str, alone))) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("KL to the cached teacher  at least ")
    for command in ("verify", "inspect"):
        assert main([command, str(out)]) == 0
    assert "0, as the results say" in capsys.readouterr().out
    assert headline(out).startswith("KL on the cache at least ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "missing --prompts .* or --cache"),
        ({"cache": "c", "teacher": "t"}, "teacher: found 't', which has no effect"),
        ({"cache": "c", "num_samples": 2}, "num_samples: found 2, which has no effect"),
        ({"cache": "c", "judge": "math"}, "judge: found 'math', which has no effect"),
        ({"cache": "c", "max_new_tokens": 9}, "max_new_tokens: found 9, which has no effect"),
        ({"cache": "c", "temperature": 0.5}, "temperature: found 0.5, which has no effect"),
        ({"cache": "c", "top_p": 0.5}, "top_p: found 0.5, which has no effect"),
        ({"cache": "c", "batch_size": 2}, "batch_size: found 2, which has no effect"),
    ],
)
def test_what_needs_prompts_is_refused_without_them(changes, message):
    with pytest.raises(ConfigError, match=message):
        EvalConfig(model="m", out="o", **changes)


@pytest.mark.parametrize("k", [4, 10**9])
def test_on_policy_kl_equals_that_of_dense_logits(teacher_folder, student_folder, k):
    teacher = load(teacher_folder)
    student = load(student_folder, batch_size=2)
    prompts = [Prompt(str(i), [5 + i, 6], None) for i in range(3)]
    sampled = student.generate([p.tokens for p in prompts], Sampling(9), [1, 2, 3])
    result = on_policy_kl(student, teacher, prompts, sampled, k)
    total, tokens = 0.0, 0
    for prompt, answer in zip(prompts, sampled, strict=True):
        ids = torch.tensor([[*prompt.tokens, *answer.tokens.tolist()]])
        with torch.no_grad():
            p, q = (
                torch.softmax(engine.model(ids).logits[0, 1:-1].double(), -1)
                for engine in (student, teacher)
            )
        if k < q.shape[1]:
            top = q.topk(k).indices
            p, q = (
                torch.cat([x.gather(1, top), 1 - x.gather(1, top).sum(1, keepdim=True)], 1)
                for x in (p, q)
            )
        total += float((p * (p / q).log()).sum())
        tokens += len(answer.tokens)
    assert result["tokens"] == tokens
    assert result["k"] == min(k, teacher.vocab_size)
    assert result["exact"] == (k == 10**9)
    assert (result["outside_lists"] < 1e-6) == result["exact"] and result["outside_lists"] < 1
    assert result["nats_per_token"] == pytest.approx(total / tokens, rel=1e-4)


def test_model_has_no_kl_to_itself(teacher_folder):
    engine = load(teacher_folder)
    prompts = [Prompt("a", [5, 6], None)]
    sampled = engine.generate([[5, 6]], Sampling(9), [1])
    assert abs(on_policy_kl(engine, engine, prompts, sampled, 8)["nats_per_token"]) < 1e-6


def test_on_policy_kl_takes_a_class_of_ids_as_one_token(teacher_folder, student_folder):
    teacher, student, merged = load(teacher_folder), load(student_folder), [3, 17, 40]
    prompts = [Prompt(str(i), [5 + i, 6], None) for i in range(2)]
    sampled = student.generate([p.tokens for p in prompts], Sampling(9), [1, 2])
    result = on_policy_kl(student, teacher, prompts, sampled, teacher.vocab_size, (3, 17, 40))
    apart = on_policy_kl(student, teacher, prompts, sampled, teacher.vocab_size)
    others = [i for i in range(teacher.vocab_size) if i not in merged]
    total, tokens = 0.0, 0
    for prompt, answer in zip(prompts, sampled, strict=True):
        ids = torch.tensor([[*prompt.tokens, *answer.tokens.tolist()]])
        with torch.no_grad():
            p, q = (
                torch.softmax(engine.model(ids).logits[0, 1:-1].double(), -1)
                for engine in (student, teacher)
            )
        p, q = (torch.cat([x[:, others], x[:, merged].sum(1, keepdim=True)], 1) for x in (p, q))
        total += float((p * (p / q).log()).sum())
        tokens += len(answer.tokens)
    assert result["nats_per_token"] == pytest.approx(total / tokens, rel=1e-4)
    assert result["exact"] and apart["nats_per_token"] > result["nats_per_token"] + 1e-4


@pytest.mark.thorough
@pytest.mark.parametrize("source", ["flag", "cache", "model", "nowhere"])
def test_eval_finds_the_class_of_ids_that_end_answers(
    teacher_folder, student_folder, prompt_file, tmp_path, capsys, source
):
    """The value depends only on the class, not on where it comes from."""
    teacher, model, cache = tmp_path / "teacher", student_folder, tmp_path / "cache"
    shutil.copytree(teacher_folder, teacher)
    config = json.loads((teacher / "generation_config.json").read_text())
    (teacher / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [7]}))
    argv = ["eval", "--teacher", teacher, "--prompts", prompt_file, "--out", tmp_path / "out"]
    if source == "flag":
        argv += ["--eos-class", "7,1"]
    elif source != "nowhere":
        (tmp_path / "more").mkdir()
        rollouts = make_rollouts(student_folder, tmp_path / "more")
        assert main(score_argv(teacher, rollouts, cache, "--eos-class", "1,7")) == 0
    if source == "cache":
        argv += ["--cache", cache]
    elif source == "model":
        model = tmp_path / "model"
        train = ["distill", "--student", student_folder, "--cache", cache, "--out", model]
        train += ["--learning-rate", 1e-12, "--max-steps", 1, "--save-every", 0, *COMMON]
        assert main(list(map(str, train))) == 0
    argv += ["--max-new-tokens", 4, "--num-samples", 1, "--model", model, *COMMON]
    capsys.readouterr()
    assert main(list(map(str, argv))) == 0
    assert ("--eos-class 1,7 counts them as one" in capsys.readouterr().err) == (
        source == "nowhere"
    )
    value = json.loads((tmp_path / "out/results.json").read_text())["kl"]["nats_per_token"]
    engine = load(student_folder)
    prompts = load_prompts(prompt_file, PromptEncoder(engine.tokenizer))
    sampled = generate_answers(engine, prompts, Sampling(4), 1, 0)
    merged = () if source == "nowhere" else (1, 7)
    result = on_policy_kl(engine, load(teacher), prompts, sampled, 64, merged)
    assert value == pytest.approx(result["nats_per_token"], rel=1e-5)


def test_a_class_beyond_the_vocabulary_is_refused(
    teacher_folder, student_folder, prompt_file, tmp_path, capsys
):
    argv = ["eval", "--teacher", teacher_folder, "--prompts", prompt_file, "--eos-class", "1,999"]
    argv += ["--model", student_folder, "--out", tmp_path / "out", "--max-new-tokens", 4, *COMMON]
    assert main(list(map(str, argv))) == 2
    assert "eos_class: found 999; expected ids in" in one_line(capsys)
