"""A model beside the teacher at every token, against dense log-probs in fp64."""

import numpy as np
import pytest
import torch

from lopd.engines.transformers import TransformersEngine
from lopd.evaluation.tokens import bucket_reverse_kl, compare_tokens
from lopd.store import TeacherCache


def test_both_lists_and_the_divergence(pipeline):
    engine = TransformersEngine.load(pipeline / "student", dtype="float32", device="cpu")
    cache = TeacherCache.open(pipeline / "cache")
    sequences = [cache[i] for i in range(3)]
    results = compare_tokens(engine, sequences, length=4)
    for sequence, found in zip(sequences, results, strict=True):
        rollout = sequence.rollout
        tokens = torch.from_numpy(rollout.tokens.astype(np.int64))[None]
        with torch.no_grad():
            logits = engine.model(tokens).logits[0, rollout.prompt_length - 1 : -1].double()
        logprobs = logits.log_softmax(-1)
        for t, token in enumerate(rollout.tokens[rollout.prompt_length :]):
            assert found.model_sampled[t] == pytest.approx(float(logprobs[t, token]), abs=1e-5)
            best = logprobs[t].topk(4)
            np.testing.assert_allclose(found.model_logprobs[t], best.values, atol=1e-5)
            ids = sequence.topk_ids[t][sequence.topk_ids[t] >= 0]
            stored = sequence.topk_logprobs[t][: len(ids)]
            order = np.argsort(-stored, kind="stable")[:4]
            kept = found.teacher_ids[t][found.teacher_ids[t] >= 0]
            assert kept.tolist() == ids[order].tolist()
            lp = logprobs[t].numpy()
            rest = -np.expm1(np.logaddexp.reduce(lp[ids]))
            exact = (np.exp(lp[ids]) * (lp[ids] - stored)).sum()
            exact += rest * (np.log(rest) - sequence.tail_logprobs[t])
            assert found.divergence[t] == pytest.approx(exact, abs=1e-5)


def test_a_class_of_ids_is_one_token(pipeline):
    engine = TransformersEngine.load(pipeline / "student", dtype="float32", device="cpu")
    cache = TeacherCache.open(pipeline / "cache")
    members = cache[0].topk_ids[0][:3].tolist()
    (found,) = compare_tokens(engine, [cache[0]], length=4, eos_class=members)
    (apart,) = compare_tokens(engine, [cache[0]], length=4)
    ids, stored = (values[0] for values in (cache[0].topk_ids, cache[0].topk_logprobs))
    assert found.teacher_ids[0].tolist() == apart.teacher_ids[0].tolist()
    rollout = cache[0].rollout
    with torch.no_grad():
        tokens = torch.from_numpy(rollout.tokens.astype(np.int64))[None]
        logits = engine.model(tokens).logits[0, rollout.prompt_length - 1].double()
    p, q = logits.softmax(-1).numpy()[ids], np.exp(stored.astype(np.float64))
    p, q = (np.concatenate([[x[:3].sum()], x[3:], [1 - x.sum()]]) for x in (p, q))
    assert found.divergence[0] == pytest.approx((p * np.log(p / q)).sum(), abs=1e-5)
    assert abs(found.divergence[0] - apart.divergence[0]) > 1e-4


def test_a_list_of_all_ids_has_no_tail():
    lp, lq = np.log([[0.25, 0.75]]), np.log([[0.5, 0.5]])
    exact = 0.25 * np.log(0.5) + 0.75 * np.log(1.5)
    assert bucket_reverse_kl(lp, lq, np.array([-np.inf]))[0] == pytest.approx(exact)
