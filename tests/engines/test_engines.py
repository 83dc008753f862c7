"""Engines by name, their options, and vLLM's output as arrays, without vLLM."""

import importlib.util
from dataclasses import dataclass

import numpy as np
import pytest
from conftest import save_qwen3
from helpers_training import make_rollouts

from lopd.config.device import resolve_device
from lopd.config.inference import EngineOptions, parse_options
from lopd.engines import load_engine
from lopd.engines.base import Sampling, score_rollouts, sequence_seed
from lopd.engines.support import Support
from lopd.engines.transformers import TransformersEngine
from lopd.engines.vllm import gpus_of
from lopd.engines.vllm_output import (
    by_entries,
    read_prompt_logprobs,
    to_scores,
)
from lopd.errors import ConfigError, DataError, ModelError
from lopd.models.load import check_model_folder
from lopd.store import TeacherScores
from lopd.store.lists import TAIL_FLOOR, derived_tail, to_columns

PROMPTS = [[5, 6, 7], [9, 8], [30, 31, 32, 33, 34], [12], [40, 41, 42]]


@pytest.fixture(scope="module")
def engine(teacher_folder):
    return load_engine("transformers", teacher_folder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def sequences(engine):
    seeds = [sequence_seed(0, str(i), 0) for i in range(len(PROMPTS))]
    answers = engine.generate(PROMPTS, Sampling(12), seeds)
    return [
        np.array([*prompt, *answer.tokens], dtype=np.int32)
        for prompt, answer in zip(PROMPTS, answers, strict=True)
    ]


LENGTHS = list(map(len, PROMPTS))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_vllm_that_is_not_installed_is_said(teacher_folder):
    with pytest.raises(ConfigError, match=r"vllm is not installed here; pip install 'lopd"):
        load_engine("vllm", teacher_folder, dtype="float32")


def test_an_engine_that_does_not_exist():
    with pytest.raises(ConfigError, match="found 'sglang'; expected one of transformers, vllm"):
        EngineOptions(engine="sglang")


def test_options_are_a_yaml_mapping_for_the_engine():
    text = "{tensor_parallel_size: 2, enforce_eager: true, gpu_memory_utilization: 0.5}"
    options = EngineOptions(engine="vllm", engine_options=text).options()
    assert options == {
        "tensor_parallel_size": 2,
        "enforce_eager": True,
        "gpu_memory_utilization": 0.5,
    }
    assert parse_options("vllm", str({"max_model_len": 4096})) == {"max_model_len": 4096}
    assert parse_options("transformers", None) == {}


@pytest.mark.parametrize(
    ("engine", "text", "message"),
    [
        ("vllm", "max_num_seq: 3", "did you mean 'max_num_seqs'"),
        ("vllm", "tensor_parallel_size: 0", "found '0'; expected a positive integer"),
        ("vllm", "tensor_parallel_size: true", "found 'true'; expected a positive integer"),
        ("vllm", "enforce_eager: 1", "found '1'; expected true or false"),
        ("vllm", "gpu_memory_utilization: 0", r"expected a number in \(0, 1\]"),
        ("vllm", "gpu_memory_utilization: 90", r"expected a number in \(0, 1\]"),
        ("vllm", "max_model_len: .nan", "expected a positive integer"),
        ("vllm", "data_parallel_size: 2", "start that many with --worker i/n"),
        ("vllm", "enable_lora: true", "merge it into its base model first"),
        ("vllm", "max_logprobs: 5", "it follows from k"),
        ("transformers", "enforce_eager: true", "unknown setting 'enforce_eager'"),
        ("vllm", "fast", "found 'fast'; expected a mapping"),
        ("vllm", "{a", "engine_options: not YAML"),
    ],
)
def test_options_that_cannot_be_meant(engine, text, message):
    with pytest.raises(ConfigError, match=message):
        EngineOptions(engine=engine, engine_options=text)


def test_a_device_that_contradicts_the_engine():
    with pytest.raises(ConfigError, match="choose its GPUs with CUDA_VISIBLE_DEVICES"):
        EngineOptions(engine="vllm", device="cuda:1")
    with pytest.raises(ConfigError, match="leave device at auto"):
        EngineOptions(device="cpu", engine_options="device_map: auto")


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_is_not_a_model(teacher_folder, tmp_path, with_config):
    (tmp_path / "adapter_config.json").write_text('{"target_modules": ["lm_head"]}')
    if with_config:
        (tmp_path / "config.json").write_bytes((teacher_folder / "config.json").read_bytes())
    for call in (check_model_folder, lambda p: load_engine("transformers", p, dtype="float32")):
        with pytest.raises(ModelError, match="holds an adapter.*merge it into its base model"):
            call(tmp_path)


def test_gpus_go_to_processes_in_order():
    assert gpus_of(1, 2, ["4", "5", "6", "7"]) == ["6", "7"]
    with pytest.raises(ConfigError, match="needs GPUs 4 to 5, and 4 are visible"):
        gpus_of(2, 2, ["4", "5", "6", "7"])


def test_a_process_gets_the_gpu_of_its_rank(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [str(resolve_device("auto", rank)) for rank in (None, 0, 1)] == [
        "cuda",
        "cuda:0",
        "cuda:1",
    ]
    with pytest.raises(ConfigError, match="found 'cuda:2', but torch sees 2 CUDA devices"):
        resolve_device("cuda", 2)


def test_a_model_spread_by_a_device_map_scores_and_samples_alike(
    engine, sequences, student_folder, tmp_path
):
    """A layer that lies on disk is moved by hooks, as layers on other GPUs are."""
    whole = TransformersEngine.load(student_folder, dtype="float32", device="cpu")
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    parts |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = TransformersEngine.load(student_folder, dtype="float32", options={"device_map": parts})
    assert any(p.is_meta for p in spread.model.parameters())
    for a, b in zip(
        whole.score(sequences, LENGTHS, 4), spread.score(sequences, LENGTHS, 4), strict=True
    ):
        np.testing.assert_allclose(a.teacher_logprobs, b.teacher_logprobs, atol=1e-5)
    for a, b in zip(
        *(e.generate(PROMPTS, Sampling(6), [0] * 5) for e in (whole, spread)), strict=True
    ):
        assert a.tokens.tolist() == b.tokens.tolist()
    with pytest.raises(ModelError, match="offloads the LM head"):
        TransformersEngine.load(
            student_folder, dtype="float32", options={"device_map": parts | {"lm_head": "disk"}}
        )


def test_a_bf16_model_scores_close_to_its_fp32_self(engine, sequences, teacher_folder):
    half = load_engine("transformers", teacher_folder, dtype="bfloat16", device="cpu")
    for a, b in zip(
        engine.score(sequences, LENGTHS, 4), half.score(sequences, LENGTHS, 4), strict=True
    ):
        assert 0 < np.abs(a.teacher_logprobs - b.teacher_logprobs).max() < 0.2


def test_extra_ids_and_the_mass_outside_them_are_those_of_a_full_list(engine, sequences):
    rng = np.random.default_rng(0)
    rows = engine.vocab_size
    extra = [
        np.stack([rng.choice(rows, 5, replace=False) for _ in tokens[n:]])
        for tokens, n in zip(sequences, LENGTHS, strict=True)
    ]
    for ids in extra:
        ids[0, 0] = -1
    full = engine.score(sequences, LENGTHS, rows)
    scores = engine.score(sequences, LENGTHS, 4, extra_ids=extra)
    for everything, score, ids in zip(full, scores, extra, strict=True):
        dense = np.empty((len(ids), rows))
        np.put_along_axis(dense, everything.topk_ids.astype(int), everything.topk_logprobs, axis=1)
        got = np.take_along_axis(dense, np.maximum(ids, 0), axis=1)
        assert score.extra_ids.tolist() == ids.tolist()
        np.testing.assert_allclose(score.extra_logprobs[ids >= 0], got[ids >= 0], atol=2e-5)
        for row in range(len(ids)):
            out = np.setdiff1d(np.arange(rows), [*score.topk_ids[row], *ids[row]])
            expected = np.log(np.exp(dense[row, out]).sum())
            assert score.extra_tail_logprobs[row] == pytest.approx(expected, abs=2e-5)
        columns = to_columns(score, 1.0)
        lists, tail = columns.lists, columns.tail_logprobs
        ends = np.cumsum(lists.lengths)
        for row, (start, stop) in enumerate(zip(ends - lists.lengths, ends, strict=True)):
            mass = np.exp(lists.logprobs[start:stop].astype(float)).sum() + np.exp(float(tail[row]))
            assert mass == pytest.approx(1, abs=1e-5)
            assert set(ids[row]) - {-1} <= set(lists.ids[start:stop])


def test_extra_ids_may_differ_in_number(engine, sequences):
    """A sequence's scores are those that it has without neighbours of another width."""
    rng, rows = np.random.default_rng(1), engine.vocab_size
    extra = [
        np.stack([rng.choice(rows, width, replace=False) for _ in tokens[n:]])
        for width, tokens, n in zip((3, 0, 7, 1, 5), sequences, LENGTHS, strict=True)
    ]
    together = engine.score(sequences, LENGTHS, 4, extra_ids=extra)
    for tokens, length, ids, score in zip(sequences, LENGTHS, extra, together, strict=True):
        (alone,) = engine.score([tokens], [length], 4, extra_ids=[ids])
        assert score.extra_ids.tolist() == alone.extra_ids.tolist() == ids.tolist()
        for name in ("extra_logprobs", "extra_tail_logprobs", "tail_logprobs"):
            np.testing.assert_allclose(getattr(score, name), getattr(alone, name), atol=1e-5)


def test_extra_ids_of_other_rows_are_refused(engine, sequences):
    extra = [
        np.zeros((len(tokens) - n, 1), int) for tokens, n in zip(sequences, LENGTHS, strict=True)
    ]
    extra[0], extra[1] = extra[0][:-1], np.zeros((len(extra[1]) + 1, 1), int)
    with pytest.raises(DataError, match=r"sequence 0: extra_ids are int64 \[\d+, 1\]; expected"):
        engine.score(sequences, LENGTHS, 4, extra_ids=extra)


def test_extra_ids_beyond_the_vocabulary_are_refused(engine, sequences):
    extra = [
        np.full((len(tokens) - n, 2), -1) for tokens, n in zip(sequences, LENGTHS, strict=True)
    ]
    extra[1][0, 1] = engine.vocab_size
    with pytest.raises(DataError, match="sequence 1: extra_ids: token 0 has id .*; expected ids"):
        engine.score(sequences, LENGTHS, 4, extra_ids=extra)


class FixedIds:
    """An engine that records what is asked and lists the ids 0 to k - 1."""

    def __init__(self, vocab_size):
        self.name, self.vocab_size, self.asked = "fixed", vocab_size, []

    def score(
        self, sequences, prompt_lengths, k, *, temperature=1.0, extra_ids=None, progress=None
    ):
        self.asked.append((k, temperature, extra_ids))
        rows = [len(t) - n for t, n in zip(sequences, prompt_lengths, strict=True)]
        column = np.zeros(0)
        ids = [np.tile(np.arange(k), (r, 1)) for r in rows]
        return [TeacherScores(column, column, i, column, column) for i in ids]


def test_the_students_ids_beyond_the_teachers_vocabulary_are_left_out():
    rollouts = make_rollouts(3)
    teacher, student = FixedIds(6), FixedIds(40)
    support = Support(2, extra_ids=8)
    scores = score_rollouts(teacher, rollouts, support, temperature=0.5, student=student)
    assert len(scores) == 3 and student.asked == [(8, 0.5, None)]
    ((k, temperature, extra),) = teacher.asked
    assert (k, temperature) == (2, 0.5)
    assert all((ids == [0, 1, 2, 3, 4, 5, -1, -1]).all() for ids in extra)
    score_rollouts(teacher, rollouts, Support(2), student=student)
    assert teacher.asked[-1] == (2, 1.0, None) and len(student.asked) == 1


def test_extra_ids_that_hold_nearly_all_of_the_tail_keep_its_digits(engine, sequences):
    """Subtracting them from the tail would leave the floor, 2^-20 of it."""
    tokens, rows = sequences[:1], engine.vocab_size
    (full,) = engine.score(tokens, LENGTHS[:1], rows)
    extra = full.topk_ids[:, 1:-1]
    (score,) = engine.score(tokens, LENGTHS[:1], 1, extra_ids=[extra])
    np.testing.assert_allclose(score.extra_tail_logprobs, full.topk_logprobs[:, -1], atol=2e-5)
    columns = to_columns(score, 1.0)
    np.testing.assert_allclose(columns.tail_logprobs, full.topk_logprobs[:, -1], atol=2e-5)


@dataclass
class Flat:
    token_ids: list
    logprobs: list


def flat(tokens, k, shift=0):
    """What vLLM gives for tokens: own id, then ids 0 to k - 1."""
    ids, logprobs = [], []
    for token in np.roll(tokens, -shift)[1:]:
        ids += [int(token), *range(k)]
        logprobs += [-3.0, *np.log(np.full(k, 0.9 / k))]
    return Flat(ids, logprobs)


TOKENS = np.array([50, 51, 52, 53])


def test_prompt_logprobs_are_read_as_arrays():
    ids, logprobs = read_prompt_logprobs(0, flat(TOKENS, 2), TOKENS, 2)
    assert ids.tolist() == [[51, 0, 1], [52, 0, 1], [53, 0, 1]]
    score = to_scores(0, ids[1:], logprobs[1:], vocab_size=60)
    assert score.topk_ids.tolist() == [[0, 1]] * 2
    np.testing.assert_allclose(score.teacher_logprobs, -3)
    np.testing.assert_allclose(score.tail_logprobs, np.log(0.1), rtol=1e-5)
    assert np.isnan(score.teacher_entropy).all()


def test_prompt_logprobs_that_are_one_off_are_refused():
    with pytest.raises(ModelError, match="entry 1 is of token 52, expected 51; .* not aligned"):
        read_prompt_logprobs(0, flat(TOKENS, 2, shift=1), TOKENS, 2)


@pytest.mark.parametrize("lost", [1, 3, 9])
def test_too_few_logprobs_are_refused(lost):
    whole = flat(TOKENS, 2)
    cut = Flat(whole.token_ids[:-lost], whole.logprobs[:-lost])
    with pytest.raises(ModelError, match=rf"came back with {9 - lost} log-probs, expected 9"):
        read_prompt_logprobs(0, cut, TOKENS, 2)
    with pytest.raises(ModelError, match="came back with 0 log-probs"):
        read_prompt_logprobs(0, None, TOKENS, 2)


@pytest.mark.parametrize("value", [np.nan, 0.5, -np.inf])
def test_logprobs_that_are_none_are_refused(value):
    broken = flat(TOKENS, 2)
    broken.logprobs[4] = value
    with pytest.raises(ModelError, match=r"sequence 7: token 2 has log-prob"):
        read_prompt_logprobs(7, broken, TOKENS, 2)


def test_a_derived_tail():
    none = np.array([-np.inf])
    listed = np.log(np.array([[0.6, 0.3]])).astype(np.float32)
    np.testing.assert_allclose(derived_tail(listed, none, False), np.log(0.1), rtol=1e-6)
    assert derived_tail(listed, np.array([-0.5]), False) == pytest.approx(-0.5)
    one = np.log(np.array([[0.75, 0.25]])).astype(np.float32)
    assert derived_tail(one, none, False) == pytest.approx(TAIL_FLOOR)
    assert derived_tail(one, none, True) == -np.inf
    with pytest.raises(DataError, match=r"response token 0 has mass 1\.2"):
        derived_tail(np.log(np.array([[0.6, 0.6]])), none, False)
    with pytest.raises(DataError, match="sequence 4: the list of response token 0"):
        to_scores(4, np.array([[9, 1, 2]]), np.log(np.array([[0.1, 0.6, 0.6]])), 60)


def test_sequences_are_read_in_runs_that_are_bounded(monkeypatch):
    monkeypatch.setattr("lopd.engines.vllm_output._ENTRIES_AT_ONCE", 100)
    runs = list(by_entries([np.zeros(n) for n in (10, 10, 30, 60, 5, 5)], 2))
    assert runs == [range(0, 3), range(3, 4), range(4, 6)]
    assert list(by_entries([], 2)) == []


@pytest.mark.parametrize(
    "tokens, message", [([5] * 65, "at most 64, the context"), ([5], "are the prompt")]
)
def test_every_engine_refuses_what_it_cannot_score(tmp_path, tokens, message):
    from lopd.engines.vllm import VllmEngine

    vllm = VllmEngine(None, None, vocab_size=300, context=64, eos_ids=[1])
    with pytest.raises(DataError, match=message):
        vllm.score([np.array(tokens)], [1], 2)


class FakeLlm:
    """Answers that the test sets, in place of vLLM's."""

    def __init__(self, *answers):
        self.answers = answers

    def generate(self, requests, parameters, use_tqdm):
        return [type("Output", (), {"finished": True, "outputs": [a]}) for a in self.answers]


def answer(tokens, logprobs, finish_reason="length"):
    return type(
        "Answer",
        (),
        {
            "token_ids": tokens,
            "logprobs": Flat(tokens[: len(logprobs)], logprobs),
            "finish_reason": finish_reason,
        },
    )


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([answer([5, 6], [-1.0])], "2 tokens and 1 log-probs"),
        ([answer([5, 6], [-1.0, np.nan])], "has log-prob nan"),
        ([answer([], [])], "0 tokens"),
        ([answer([5, 6], [-1.0, -1.0], "abort")], "finish reason 'abort'"),
        ([answer([5, 6], [-1.0, -1.0], "stop")], "finish reason 'stop' on token 6"),
        ([], "1 requests, 0 finished"),
    ],
)
def test_answers_of_vllm_that_cannot_be_stored(monkeypatch, answers, message):
    import sys
    import types

    from lopd.engines.vllm import VllmEngine

    fake = types.ModuleType("vllm")
    fake.SamplingParams = lambda **settings: settings
    monkeypatch.setitem(sys.modules, "vllm", fake)
    vllm = VllmEngine(FakeLlm(*answers), None, vocab_size=300, context=64, eos_ids=[1])
    with pytest.raises(ModelError, match=message):
        vllm.generate([[5]], Sampling(4), [0])


def test_engines_agree_on_the_end_of_an_answer(tmp_path):
    from lopd.provenance import eos_ids_of

    folder = save_qwen3(tmp_path, seed=0)
    hf = TransformersEngine.load(folder, dtype="float32", device="cpu")
    assert eos_ids_of(folder) == hf.eos_ids
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    hf = TransformersEngine.load(folder, dtype="float32", device="cpu")
    assert eos_ids_of(folder) == hf.eos_ids == [1, 7]
    (folder / "generation_config.json").unlink()
    hf = TransformersEngine.load(folder, dtype="float32", device="cpu")
    assert eos_ids_of(folder) == hf.eos_ids == [1]
