"""The rules of `_core/rules.py` in Triton, as jit functions of a row's buckets.

A divergence maps the student's and the teacher's log-prob of a bucket to (phi, g), its term of
the loss and dphi/dlog p up to `SHIFTS[name] * p`. To add one, add it to `DIVERGENCES` and
`SHIFTS` here and to `DIVERGENCES` in `_core/rules.py`.
"""

import triton
import triton.language as tl

from lopd_kernels._triton.kernels.math import expm1, log1p

NO_MASS = tl.constexpr(float("-inf"))


@triton.jit
def reverse_kl(lp, lq, beta):
    terms = tl.exp(lp) * (lp - lq)
    terms = tl.where(lq == NO_MASS, float("inf"), terms)
    terms = tl.where(lp == NO_MASS, 0.0, terms)
    return terms, terms


@triton.jit
def forward_kl(lp, lq, beta):
    q = tl.exp(lq)
    return tl.where(lq == NO_MASS, 0.0, q * (lq - lp)), tl.exp(lp) - q


@triton.jit
def jsd(lp, lq, beta):
    # Where the clamp acts, p or q is below e^-80, and so is the error of the clamp.
    ratio = lq - lp
    ratio = tl.where(ratio > 80.0, 80.0, tl.where(ratio < -80.0, -80.0, ratio))
    student = (beta - 1.0) * tl.exp(lp) * log1p(beta * expm1(ratio))
    teacher = -beta * tl.exp(lq) * log1p((1.0 - beta) * expm1(-ratio))
    student = tl.where(lp == NO_MASS, 0.0, student)
    return student + tl.where(lq == NO_MASS, 0.0, teacher), student


DIVERGENCES = {"reverse_kl": reverse_kl, "forward_kl": forward_kl, "jsd": jsd}
SHIFTS = {"reverse_kl": 1.0, "forward_kl": -1.0, "jsd": 0.0}


@triton.jit
def policy_terms(
    lp, score, rollout, advantage_clip, importance_cap, clip_range,
    FROM_TEACHER: tl.constexpr, IMPORTANCE: tl.constexpr,
):  # fmt: skip
    """(loss, dloss/dlp, advantage, ratio) of the sampled token."""
    advantage = score + 0.0 * lp
    if FROM_TEACHER:
        advantage = score - lp
        advantage = tl.where(advantage > advantage_clip, advantage_clip, advantage)
        advantage = tl.where(advantage < -advantage_clip, -advantage_clip, advantage)
    ratio = tl.exp(lp - rollout)
    if IMPORTANCE == "clipped":
        low, high = 1.0 - clip_range, 1.0 + clip_range
        bounded = tl.where(ratio > high, high, tl.where(ratio < low, low, ratio))
        free, bounded = -ratio * advantage, -bounded * advantage
        loss = tl.where(free >= bounded, free, bounded)
        loss = tl.where(free != free, free, loss)
        slope = tl.where(free >= bounded, free, 0.0)
        slope = tl.where(free != free, free, slope)
    else:
        if IMPORTANCE == "none":
            ratio = 1.0 + 0.0 * lp
        elif IMPORTANCE == "token_truncated":
            ratio = tl.where(ratio > importance_cap, importance_cap, ratio)
        slope = -ratio * advantage
        loss = slope * lp
    return loss, slope, advantage, ratio


@triton.jit
def unbiased_terms(sampled, rest, target_row, K, importance_cap):
    """(student's tail, correction, importance weight) of a row whose last id was sampled."""
    high, low = tl.maximum(sampled, rest), tl.minimum(sampled, rest)
    tail = high + log1p(tl.exp(low - high))
    tail = tl.where(high == NO_MASS, NO_MASS, tail)
    lq_sampled, lq_tail = tl.load(target_row + K - 1), tl.load(target_row + K)
    weight = tl.exp(sampled - tl.load(target_row + K + 1))
    weight = tl.where(weight > importance_cap, importance_cap, weight)
    correction = weight * ((sampled - lq_sampled) - (tail - lq_tail))
    no_sample = sampled == NO_MASS
    return tail, tl.where(no_sample, 0.0, correction), tl.where(no_sample, 0.0, weight)


@triton.jit
def bucket_rule(
    lp,  # log-probs of the buckets `k`; bucket K is the tail, -inf beyond
    k, K, target_row, student_tail, correction, option_0, option_1, option_2,
    RULE: tl.constexpr, DIVERGENCE: tl.constexpr, SHIFT: tl.constexpr, TAIL: tl.constexpr,
    FROM_TEACHER: tl.constexpr, IMPORTANCE: tl.constexpr,
):  # fmt: skip
    """(terms of the loss, g) of a block of buckets.

    `student_tail` and `correction` are those of `unbiased_terms`, and used by the unbiased rule
    only: there, bucket K - 1 is the sampled id, and buckets K - 1 and K share the tail.
    """
    if RULE == "divergence":
        lq = tl.load(target_row + k, mask=k <= K, other=NO_MASS)
        if TAIL == "unbiased":
            in_tail = (k >= K - 1) & (k <= K)
            share = tl.where(in_tail & (lp != NO_MASS), tl.exp(lp - student_tail), 0.0)
            lq = tl.where(in_tail, tl.load(target_row + K), lq)
            phi, g = DIVERGENCE(tl.where(in_tail, student_tail, lp), lq, option_0)
            g = tl.where(in_tail, g * share, g) + tl.where(k == K - 1, correction, 0.0)
            phi = tl.where(k == K - 1, correction, phi)
        else:
            phi, g = DIVERGENCE(lp, lq, option_0)
        if TAIL == "truncate":
            phi = tl.where(k < K, phi, 0.0)
            g = tl.where(k < K, g + SHIFT * tl.exp(lp), 0.0)
        elif TAIL == "generalized":
            phi = tl.where(k < K, phi + SHIFT * (tl.exp(lq) - tl.exp(lp)), 0.0)
            g = tl.where(k < K, g, 0.0)
    elif RULE == "cross_entropy":
        phi = tl.where(k == 0, -lp, 0.0)
        g = tl.where(k == 0, -1.0, 0.0)
    else:
        score, rollout = tl.load(target_row), tl.load(target_row + 1)
        phi, g, _advantage, _ratio = policy_terms(
            lp, score, rollout, option_0, option_1, option_2, FROM_TEACHER, IMPORTANCE
        )
        phi = tl.where(k == 0, phi, 0.0)
        g = tl.where(k == 0, g, 0.0)
    return phi, g
