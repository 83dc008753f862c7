"""What a cache says about student and teacher, against the distributions it was sampled from."""

import json

import numpy as np
import pytest
from helpers_cache import log_softmax, make_manifest, write_cache

from lopd.cli import main
from lopd.evaluation.agreement import LOW_COVERAGE, MOST_SEQUENCES, low_coverage, measure
from lopd.store import CacheWriter, Rollout, TeacherCache, TeacherScores

V, K, E = 12, 4, 3
RAW = {"sampling": {"temperature": 1.0, "top_p": 1.0}}


def make_distributions(prompts, length):
    """Log-probs [prompts, length, V] of student and teacher; each prompt has a drift of its own."""
    rng = np.random.default_rng(0)
    p = log_softmax(rng.normal(size=(prompts, length, V)) * 1.5)
    drift = rng.uniform(0.2, 1.5, size=(prompts, 1, 1))
    return p, log_softmax(p + rng.normal(size=p.shape) * drift)


def write(folder, p, q, samples, *, extra_ids=0, mask_first=False, **manifest):
    """A cache of answers that were sampled from p and scored with q; returns their tokens."""
    rng, pairs = np.random.default_rng(1), []
    rows = np.arange(p.shape[1])
    for prompt, (student, teacher) in enumerate(zip(p, q, strict=True)):
        for sample in range(samples):
            noise = rng.gumbel(size=student.shape)
            tokens = (student + noise).argmax(1).astype(np.int32)
            mask = np.concatenate([[False], np.ones(len(rows), bool)])
            mask[1] = not mask_first
            order = np.argsort(-teacher, 1)[:, :K]
            logprobs = np.take_along_axis(teacher, order, 1)
            sampled = student[rows, tokens].astype(np.float32)
            extra = np.argsort(-student, 1)[:, :extra_ids].astype(np.int32)
            rollout = Rollout(
                prompt_id=f"p{prompt}",
                sample=sample,
                tokens=np.concatenate([[0], tokens]).astype(np.int32),
                prompt_length=1,
                finish_reason="stop" if (prompt + sample) % 4 else "length",
                loss_mask=mask,
                rollout_logprobs=sampled,
                rollout_logprobs_raw=sampled,
            )
            scores = TeacherScores(
                teacher_logprobs=teacher[rows, tokens].astype(np.float32),
                teacher_entropy=-(np.exp(teacher) * teacher).sum(1).astype(np.float32),
                topk_ids=order.astype(np.int32),
                topk_logprobs=logprobs.astype(np.float32),
                tail_logprobs=np.log1p(-np.exp(logprobs).sum(1)).astype(np.float32),
                extra_ids=extra if extra_ids else None,
                extra_logprobs=np.take_along_axis(teacher, extra, 1).astype(np.float32)
                if extra_ids
                else None,
            )
            pairs.append((rollout, scores))
    settings = {"vocab_size": V, "k": K, "plan": (len(pairs),), "rollouts": RAW}
    with CacheWriter.create(folder, make_manifest(**(settings | manifest))) as writer:
        writer.write(0, pairs)
        writer.finish()
    return np.array([pair[0].tokens[1:] for pair in pairs])


def agreement(folder):
    return measure(TeacherCache.open(folder, support="list"))


def test_estimates_are_those_of_the_distributions(tmp_path):
    p, q = make_distributions(160, 5)
    write(tmp_path, p, q, samples=3)
    found = agreement(tmp_path)
    listed = np.argsort(-q, 2)[:, :, :K]
    expected = {
        "log_ratio": (np.exp(p) * (p - q)).sum(2).mean(),
        "shared": np.minimum(np.exp(p), np.exp(q)).sum(2).mean(),
        "covered": np.sort(np.exp(q), 2)[:, :, -K:].sum(2).mean(),
        "sampled_listed": np.take_along_axis(np.exp(p), listed, 2).sum(2).mean(),
    }
    for name, value in expected.items():
        mean = getattr(found, name)
        # The prompts are those of `expected`, so the error of drawing them only adds.
        assert abs(mean.value - value) < 3 * mean.error < 0.3 * value, name
    assert found.is_kl and found.sequences == 480
    assert found.ess == pytest.approx(1 / np.exp(2 * q - p).sum(2).mean(), rel=0.15)
    assert found.truncated == pytest.approx(0.25, abs=0.02)


def test_the_answers_to_a_prompt_are_one_draw(tmp_path):
    p, q = make_distributions(8, 4)
    tokens = write(tmp_path, p, q, samples=5, mask_first=True)
    rows = np.arange(4)
    ratios = [
        [(p - q)[i, rows, answer][1:] for answer in tokens[5 * i : 5 * i + 5]] for i in range(8)
    ]
    of_prompts = np.mean(ratios, axis=(1, 2))
    found = agreement(tmp_path).log_ratio
    assert found.value == pytest.approx(of_prompts.mean(), rel=1e-5)
    assert found.error == pytest.approx(of_prompts.std(ddof=1) / np.sqrt(8), rel=1e-5)


@pytest.mark.parametrize("codec", ["exact", "packed", "compact"])
def test_students_top_ids_in_the_lists_follow_from_their_lengths(tmp_path, codec):
    p, q = make_distributions(5, 6)
    support = {"support": {"ids": "both", "extra_ids": E}}
    write(tmp_path, p, q, samples=2, extra_ids=E, codec=codec, scoring=support)
    students, teachers = np.argsort(-p, 2)[:, :, :E], np.argsort(-q, 2)[:, :, :K]
    shared = (students[..., None] == teachers[:, :, None]).any(3).mean()
    assert 0.1 < shared < 0.95
    assert agreement(tmp_path).student_top_listed.value == pytest.approx(shared)


@pytest.mark.parametrize(
    ("manifest", "reason", "has_ratio"),
    [
        ({"rollouts": {"sampling": {"temperature": 0.6, "top_p": 1.0}}}, "temperature 0.6", True),
        ({"rollouts": {"sampling": {"temperature": 1.0, "top_p": 0.9}}}, "top_p 0.9", True),
        ({"rollouts": {}}, "how the rollouts were sampled is unknown", True),
        ({"temperature": 0.6}, "scored at temperature 0.6", False),
        ({"scoring": {"support": {"ids": "x", "eos_class": [1, 2]}}}, "count as one", False),
    ],
)
def test_no_kl_is_claimed_that_the_samples_do_not_give(tmp_path, manifest, reason, has_ratio):
    p, q = make_distributions(3, 4)
    write(tmp_path, p, q, samples=1, **manifest)
    found = agreement(tmp_path)
    rows = found.rows()
    assert ("log_ratio_to_teacher" in rows) == has_ratio
    assert not {"kl_to_teacher", "shared_probability", "ess_as_teacher"} & rows.keys()
    assert rows["frozen rollouts"].startswith("cannot be judged: ")
    assert reason in rows["frozen rollouts"]
    assert "sampled_in_lists" in rows and "truncated" in rows


def test_a_temperature_of_both_is_a_kl(tmp_path):
    p, q = make_distributions(3, 4)
    sampling = {"sampling": {"temperature": 0.6, "top_p": 1.0}}
    write(tmp_path, p, q, samples=1, temperature=0.6, rollouts=sampling)
    assert agreement(tmp_path).is_kl


def test_advice_follows_the_worth_of_a_token(tmp_path):
    p, q = make_distributions(20, 5)
    write(tmp_path / "near", p, log_softmax(p + 0.05 * q), samples=2)
    write(tmp_path / "far", p, log_softmax(3 * q), samples=2)
    near, far = (agreement(tmp_path / name) for name in ("near", "far"))
    assert near.ess > 0.9 and near.advice().startswith("stay near: ")
    assert far.ess < 0.5 and far.advice().startswith("may go stale: ")
    assert "try --refresh-every" in far.advice() and "try --refresh-every" not in near.advice()


def test_a_large_cache_is_read_in_part(tmp_path):
    p, q = make_distributions(300, 2)
    write(tmp_path, p, q, samples=2)
    found = agreement(tmp_path)
    assert found.sequences == MOST_SEQUENCES == len(found.lengths) < 600


def test_inspect_has_the_values_and_warns_of_lists_that_hold_little(tmp_path, capsys):
    p, q = make_distributions(4, 5)
    write(tmp_path, p, q, samples=2)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    out, err = capsys.readouterr()
    rows, found = json.loads(out), agreement(tmp_path)
    assert rows["kl_to_teacher"] == found.log_ratio.value
    assert rows["kl_to_teacher_error"] == found.log_ratio.error
    assert rows["answer tokens"] == "10% <= 5, 50% <= 5, 90% <= 5, 100% <= 5"
    assert rows["teacher_in_lists"] == pytest.approx(rows["mean_covered_mass"])
    covered = f"{rows['teacher_in_lists']:.1%} of the teacher's probability"
    assert rows["teacher_in_lists"] < LOW_COVERAGE and covered in err
    assert f"{rows['sampled_in_lists']:.1%} of the sampled tokens" in err
    assert f"score with a larger --k than {K}, or train with --tail unbiased" in err


def test_no_loss_is_advised_that_the_cache_does_not_admit(tmp_path):
    p, q = make_distributions(4, 5)
    write(tmp_path, p, q, samples=2, rollouts={"sampling": {"temperature": 1.0, "top_p": 0.9}})
    cache = TeacherCache.open(tmp_path, support="list")
    warning = low_coverage(cache, measure(cache))
    assert warning.endswith(f"score with a larger --k than {K}")


def test_lists_that_hold_nearly_all_are_not_warned_of(tmp_path):
    write_cache(tmp_path, make_manifest(k=39))
    cache = TeacherCache.open(tmp_path, support="list")
    assert low_coverage(cache, measure(cache)) is None


def test_lists_that_lack_the_students_tokens_are_warned_of(tmp_path):
    write_cache(tmp_path, make_manifest(k=20), spread=5.0)  # tokens are drawn evenly of 40
    cache = TeacherCache.open(tmp_path, support="list")
    found = measure(cache)
    assert found.covered.value > LOW_COVERAGE > 0.7 > found.sampled_listed.value
    assert "of the sampled tokens; a loss over" in low_coverage(cache, found)


def test_only_tokens_that_bear_loss_count(tmp_path):
    p, q = make_distributions(6, 5)
    q[:, 0] -= np.log(np.exp(3 * q[:, 0]).sum(1, keepdims=True)) - 2 * q[:, 0]  # sharper
    tokens = write(tmp_path / "masked", p, q, samples=2, mask_first=True)
    rows = np.arange(1, 5)
    covered = np.sort(np.exp(q), 2)[:, 1:, -K:].sum(2).mean()
    found = agreement(tmp_path / "masked")
    assert found.covered.value == pytest.approx(covered, rel=1e-5)
    ratios = [(p - q)[i // 2, rows, answer[1:]] for i, answer in enumerate(tokens)]
    assert found.log_ratio.value == pytest.approx(np.mean(ratios), rel=1e-5)


def test_an_unfinished_cache_without_a_shard_has_no_values(tmp_path):
    write_cache(tmp_path, make_manifest(plan=(2,)))
    (tmp_path / "shard-00000.json").unlink()
    cache = TeacherCache.open(tmp_path, support="list", allow_incomplete=True)
    assert measure(cache) is None
