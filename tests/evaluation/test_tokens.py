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


def test_a_list_of_all_ids_has_no_tail():
    lp, lq = np.log([[0.25, 0.75]]), np.log([[0.5, 0.5]])
    exact = 0.25 * np.log(0.5) + 0.75 * np.log(1.5)
    assert bucket_reverse_kl(lp, lq, np.array([-np.inf]))[0] == pytest.approx(exact)
