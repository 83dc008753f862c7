"""The vLLM engine on a tiny model, against the transformers engine (`make test-vllm`)."""

import json
import os

import numpy as np
import pytest
from conftest import TEXT, save_qwen3
from helpers_stages import make_rollouts, score_argv

from lopd.cli import main
from lopd.engines import load_engine
from lopd.engines.base import Sampling, sequence_seed
from lopd.engines.transformers import TransformersEngine
from lopd.engines.vllm import VllmEngine
from lopd.errors import ConfigError, DataError, ModelError
from lopd.store import RolloutStore, TeacherCache

pytestmark = pytest.mark.vllm

OPTIONS = {"enforce_eager": True, "gpu_memory_utilization": 0.15, "max_num_seqs": 16}
PROMPTS = [[5, 6, 7], [9, 8], [30, 31, 32, 33, 34], [12], [40, 41, 42]]
SEEDS = [sequence_seed(0, str(i), 0) for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("vllm")
    return save_qwen3(
        tmp_path_factory.mktemp("model"),
        seed=1,
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_hidden_layers=2,
    )


@pytest.fixture(scope="module")
def vllm(folder):
    return load_engine("vllm", folder, dtype="float32", options=OPTIONS)


@pytest.fixture(scope="module")
def hf(folder):
    return TransformersEngine.load(folder, dtype="float32", device="cpu")


def joined(prompts, answers):
    return [
        np.array([*prompt, *answer.tokens], np.int32)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def test_greedy_answers_are_those_of_transformers_token_for_token(vllm, hf):
    ours = vllm.generate(PROMPTS, Sampling(20, temperature=0), SEEDS)
    theirs = hf.generate(PROMPTS, Sampling(20, temperature=0), SEEDS)
    for a, b in zip(ours, theirs, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.finish_reason == b.finish_reason
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)
        np.testing.assert_allclose(a.logprobs_raw, b.logprobs_raw, atol=2e-5)


@pytest.mark.parametrize("sampling", [Sampling(12), Sampling(12, 0.7), Sampling(12, 1.3, 0.8)])
def test_logprobs_are_those_of_the_distribution_and_of_the_model(vllm, hf, sampling):
    prompts, seeds = PROMPTS * 4, [sequence_seed(1, str(i), 0) for i in range(4 * len(PROMPTS))]
    answers = vllm.generate(prompts, sampling, seeds)
    sequences, lengths = joined(prompts, answers), list(map(len, prompts))
    everything = hf.vocab_size
    raw = hf.score(sequences, lengths, everything)
    scaled = hf.score(sequences, lengths, everything, temperature=sampling.temperature)
    for answer, r, s in zip(answers, raw, scaled, strict=True):
        np.testing.assert_allclose(answer.logprobs_raw, r.teacher_logprobs, atol=2e-5)
        mass = np.exp(s.topk_logprobs.astype(np.float64))
        nucleus = mass.cumsum(1) - mass < sampling.top_p
        expected = s.teacher_logprobs - np.log((mass * nucleus).sum(1))
        np.testing.assert_allclose(answer.logprobs, expected, atol=2e-5)
    if not sampling.is_raw:
        assert max(np.abs(a.logprobs - a.logprobs_raw).max() for a in answers) > 0.1


def test_an_answer_depends_only_on_its_seed(vllm):
    together = vllm.generate(PROMPTS, Sampling(12), SEEDS)
    backwards = vllm.generate(PROMPTS[::-1], Sampling(12), SEEDS[::-1])[::-1]
    assert [a.tokens.tolist() for a in together] == [a.tokens.tolist() for a in backwards]
    other = vllm.generate([PROMPTS[0]] * 8, Sampling(12), list(range(8)))
    assert len({tuple(a.tokens) for a in other}) > 4


def test_the_end_of_sequence_token_is_stored_and_ends_the_answer(vllm):
    answers = vllm.generate([[5, 6]] * 200, Sampling(40), list(range(200)))
    stopped = [a for a in answers if a.finish_reason == "stop"]
    cut = [a for a in answers if a.finish_reason == "length"]
    assert len(stopped) > 3 and len(cut) > 3
    (eos,) = vllm.eos_ids
    assert all(a.tokens[-1] == eos and eos not in a.tokens[:-1] for a in stopped)
    assert all(len(a.tokens) == 40 and eos not in a.tokens for a in cut)


@pytest.mark.parametrize("k", [1, 8, 64])
def test_scores_are_those_of_transformers(vllm, hf, k):
    sequences = joined(PROMPTS, hf.generate(PROMPTS, Sampling(20), SEEDS))
    lengths = list(map(len, PROMPTS))
    pairs = zip(vllm.score(sequences, lengths, k), hf.score(sequences, lengths, k), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours.teacher_logprobs, theirs.teacher_logprobs, atol=2e-5)
        np.testing.assert_allclose(ours.topk_logprobs, theirs.topk_logprobs, atol=2e-5)
        assert (ours.topk_ids == theirs.topk_ids).mean() > 0.99
        np.testing.assert_allclose(ours.tail_logprobs, theirs.tail_logprobs, atol=1e-3)
        assert np.isnan(ours.teacher_entropy).all()


def test_scores_that_are_one_off_differ(vllm, hf):
    sequences = joined(PROMPTS, hf.generate(PROMPTS, Sampling(20), SEEDS))
    lengths = list(map(len, PROMPTS))
    ours, theirs = vllm.score(sequences, lengths, 8), hf.score(sequences, lengths, 8)
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a.teacher_logprobs[1:] - b.teacher_logprobs[:-1]).max() > 0.1
        assert np.abs(a.topk_logprobs[1:] - b.topk_logprobs[:-1]).max() > 0.1


def test_the_whole_vocabulary_leaves_no_tail(vllm):
    (score,) = vllm.score([np.array([5, 6, 7])], [1], vllm.vocab_size)
    assert np.isneginf(score.tail_logprobs).all()
    np.testing.assert_allclose(np.exp(score.topk_logprobs).sum(1), 1, rtol=1e-5)


def test_a_sequence_may_fill_the_context(vllm, hf):
    tokens = np.arange(64, dtype=np.int32) + 100
    (ours,), (theirs,) = vllm.score([tokens], [4], 4), hf.score([tokens], [4], 4)
    np.testing.assert_allclose(ours.teacher_logprobs, theirs.teacher_logprobs, atol=2e-5)
    (answer,) = vllm.generate([tokens[:60]], Sampling(4, temperature=0.7), [0])
    (score,) = hf.score([np.concatenate([tokens[:60], answer.tokens])], [60], 1)
    np.testing.assert_allclose(answer.logprobs_raw, score.teacher_logprobs, atol=2e-5)


@pytest.mark.parametrize(
    ("tokens", "prompt_length", "error"),
    [
        ([5] * 65, 1, "expected at most 64, the context of"),
        ([5, 6, 100000], 1, "token 2 has id 100000"),
        ([5, 6], 2, "2 of 2 tokens are the prompt"),
    ],
)
def test_sequences_that_cannot_be_scored(vllm, tokens, prompt_length, error):
    with pytest.raises(DataError, match=error):
        vllm.score([np.array(tokens)], [prompt_length], 2)


def test_what_this_engine_cannot_do_is_refused(vllm):
    one = ([np.array([5, 6])], [1], 2)
    with pytest.raises(ConfigError, match="vllm scores only at 1"):
        vllm.score(*one, temperature=0.7)
    with pytest.raises(ConfigError, match=r"would raise it to 0\.01"):
        vllm.generate([[5]], Sampling(4, temperature=0.001), [0])
    with pytest.raises(DataError, match="expected at most 64, the context of vllm"):
        vllm.generate([[5] * 60], Sampling(5), [0])


def test_the_stages_write_what_the_transformers_engine_reads_back(
    folder, vllm, hf, tmp_path, monkeypatch
):
    def running(path, *, options, **settings):
        assert (str(path), options) == (str(folder), OPTIONS)
        return vllm  # a second engine beside the first would need its memory again

    monkeypatch.setattr(VllmEngine, "load", running)
    prompts = tmp_path / "prompts.jsonl"
    words = TEXT.split()
    prompts.write_text("".join(json.dumps({"prompt": w}) + "\n" for w in words[:6]))
    engine = ["--engine", "vllm", "--engine-options", json.dumps(OPTIONS), "--dtype", "float32"]
    rollouts, cache = tmp_path / "rollouts", tmp_path / "cache"
    argv = ["rollout", "--student", str(folder), "--prompts", str(prompts), "--out", str(rollouts)]
    assert main([*argv, "--max-new-tokens", "8", "--shard-size", "4", *engine]) == 0
    argv = ["score", "--teacher", str(folder), "--rollouts", str(rollouts), "--out", str(cache)]
    assert main([*argv, "--k", "8", "--top-p", "1", *engine]) == 0
    store, scored = RolloutStore.open(rollouts), TeacherCache.open(cache, support="list")
    assert store.manifest.model.engine == scored.manifest.model.engine == "vllm"
    assert scored.manifest.scoring.tail == "derived"
    assert scored.manifest.scoring.entropy == "absent"
    assert scored.summary()["mean_entropy"] is None
    items = [scored[i] for i in range(len(scored))]
    rollout = [item.rollout for item in items]
    reference = hf.score([r.tokens for r in rollout], [r.prompt_length for r in rollout], 8)
    for item, score in zip(items, reference, strict=True):
        np.testing.assert_allclose(item.teacher_logprobs, score.teacher_logprobs, atol=2e-5)
        np.testing.assert_allclose(item.rollout.rollout_logprobs, score.teacher_logprobs, atol=2e-5)
        assert np.isnan(item.teacher_entropy).all()


def test_an_option_that_is_unknown_to_the_model_is_a_model_error(folder):
    assert "VLLM_ALLOW_LONG_MAX_MODEL_LEN" not in os.environ
    with pytest.raises(ModelError, match="vllm cannot run it"):
        load_engine("vllm", folder, dtype="float32", options={**OPTIONS, "max_num_seqs": 10**9})
    assert "VLLM_ALLOW_LONG_MAX_MODEL_LEN" not in os.environ


def test_a_cache_of_transformers_is_verified_with_vllm(folder, vllm, tmp_path, monkeypatch, capsys):
    student = save_qwen3(tmp_path / "student", seed=2)
    rollouts, cache = make_rollouts(student, tmp_path), tmp_path / "cache"
    assert main(score_argv(folder, rollouts, cache, "--k", "8", "--codec", "packed")) == 0
    monkeypatch.setattr(VllmEngine, "load", lambda *args, **settings: vllm)
    argv = ["verify", "--path", cache, "--rescore", 10, "--teacher", folder, "--student", student]
    assert main([*map(str, argv), "--engine", "vllm", "--dtype", "float32"]) == 0
    rows = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert float(rows["teacher"].split()[0]) < 1e-5
    assert float(rows["noise share"]) < 1e-3


@pytest.mark.parametrize("list_of", ["student", "union"])
def test_lists_of_the_students_ids_are_those_of_transformers(
    folder, vllm, hf, tmp_path, monkeypatch, list_of
):
    """A CPU build scores no chosen ids: they are read from the whole vocabulary."""
    assert not vllm.scores_chosen_ids
    student = save_qwen3(tmp_path / "student", seed=2)
    rollouts = make_rollouts(student, tmp_path)
    flags = ["--support", list_of, "--top-p", "1", "--eos-class", "1,7"]
    assert main(score_argv(folder, rollouts, tmp_path / "hf", *flags)) == 0
    monkeypatch.setattr(VllmEngine, "load", lambda *args, **settings: vllm)
    flags += ["--engine", "vllm", "--engine-options", json.dumps(OPTIONS)]
    assert main(score_argv(folder, rollouts, tmp_path / "vllm", *flags)) == 0
    theirs, ours = (TeacherCache.open(tmp_path / name, support="list") for name in ("hf", "vllm"))
    for a, b in zip(theirs, ours, strict=True):
        same = [set(x) == set(y) for x, y in zip(a.topk_ids, b.topk_ids, strict=True)]
        assert np.mean(same) > 0.99
        for row in np.flatnonzero(same):
            order = [np.argsort(item.topk_ids[row]) for item in (a, b)]
            p, q = (item.topk_logprobs[row][o] for item, o in zip((a, b), order, strict=True))
            np.testing.assert_allclose(p, q, atol=2e-5)
        np.testing.assert_allclose(a.tail_logprobs[same], b.tail_logprobs[same], atol=1e-3)


def test_a_vocabulary_that_is_too_much_to_read_is_refused(vllm, monkeypatch):
    monkeypatch.setattr("lopd.engines.vllm_output._ENTRIES_AT_ONCE", 2 * vllm.vocab_size)
    with pytest.raises(ConfigError, match="this vllm cannot score chosen ids, and 309 log-probs"):
        vllm.score([np.array([5, 6])], [1], 2, extra_ids=[np.array([[1]])])


def test_chosen_ids_are_asked_for_in_the_form_that_vllm_accepts(vllm, monkeypatch):
    """Only the runner that a CPU build has cannot score them."""
    monkeypatch.setattr(VllmEngine, "scores_chosen_ids", True)
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="requires the V2 model runner"):
        vllm.score([np.array([5, 6, 7])], [1], 2, extra_ids=[np.array([[1, 2], [3, -1]])])
