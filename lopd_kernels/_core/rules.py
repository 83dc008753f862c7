"""The bucket maths: every loss of this package as one rule on a row's support and tail.

A row has K support ids and one tail bucket that holds the rest of the vocabulary. With
`l_b = log p_b` the student's log-probs of these K + 1 buckets, a rule gives the row's
loss and `g_b = dL/dl_b`; the gradient with respect to the logits is then, with
`G = sum_b g_b`,

    on the support   dL/dz_k = g_k - p_k G
    off the support  dL/dz_j = p_j / p_tail * (g_tail - p_tail G)

so that one row pass serves every loss. A divergence is one elementwise function of the
student's and the teacher's log-probs; to add one, add it to `DIVERGENCES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

TAILS = ("bucket", "renormalize", "truncate")
IMPORTANCE = ("none", "token", "token_truncated")
TAIL_FLOOR = -23 * math.log(2.0)


class RowRule(NamedTuple):
    """A loss on the buckets of a block of rows.

    apply(l [R, K+1], target [R, M]) -> (loss [R], g [R, K+1], extras), where extras is a
    tuple of [R] tensors, one for each name in `extras`.
    """

    apply: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, tuple[Tensor, ...]]]
    name: str
    options: tuple[float, ...]
    extras: tuple[str, ...] = ()


class Divergence(NamedTuple):
    """phi(l, t, beta) -> (phi, g) per bucket, with dphi/dl = g + shift * p.

    The constant is kept apart because it cancels wherever the buckets sum to one, where
    adding it would only cost digits; a truncated sum needs it.
    """

    phi: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    shift: float


def _reverse_kl(lp: Tensor, lq: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    terms = lp.exp() * (lp - lq)
    terms = torch.where(lq == -math.inf, math.inf, terms)
    terms = torch.where(lp == -math.inf, 0.0, terms)
    return terms, terms


def _forward_kl(lp: Tensor, lq: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    q = lq.exp()
    return torch.where(lq == -math.inf, 0.0, q * (lq - lp)), lp.exp() - q


def _jsd(lp: Tensor, lq: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    # p or q is below e^-80 where the bound acts, and so is what it changes.
    ratio = (lq - lp).clamp(-80.0, 80.0)
    student = (beta - 1.0) * lp.exp() * torch.log1p(beta * torch.expm1(ratio))
    teacher = -beta * lq.exp() * torch.log1p((1.0 - beta) * torch.expm1(-ratio))
    student = torch.where(lp == -math.inf, 0.0, student)
    return student + torch.where(lq == -math.inf, 0.0, teacher), student


DIVERGENCES = {
    "reverse_kl": Divergence(_reverse_kl, 1.0),
    "forward_kl": Divergence(_forward_kl, -1.0),
    "jsd": Divergence(_jsd, 0.0),
}


def _divergence_rule(name: str, tail: str, options: tuple[float, ...]) -> RowRule:
    divergence, beta = DIVERGENCES[name], options[0]

    def bucket(lp: Tensor, target: Tensor):
        phi, g = divergence.phi(lp, target, beta)
        return phi.sum(1), g, ()

    def truncate(lp: Tensor, target: Tensor):
        phi, g = divergence.phi(lp[:, :-1], target[:, :-1], beta)
        g = g + divergence.shift * lp[:, :-1].exp()
        return phi.sum(1), torch.cat([g, torch.zeros_like(lp[:, -1:])], 1), ()

    def renormalize(lp: Tensor, target: Tensor):
        kept = target[:, :-1]
        return bucket(lp, torch.cat([kept - kept.logsumexp(1, keepdim=True), target[:, -1:]], 1))

    forms = {"bucket": bucket, "truncate": truncate, "renormalize": renormalize}
    return RowRule(forms[tail], f"{name}:{tail}", options)


def _policy_gradient_rule(source: str, importance: str, options: tuple[float, ...]) -> RowRule:
    advantage_clip, importance_cap, clip_range = options

    def apply(lp: Tensor, target: Tensor):
        logprob, (score, rollout) = lp[:, 0], target.unbind(1)
        advantage = score
        if source == "log_ratio":
            advantage = (score - logprob).clamp(-advantage_clip, advantage_clip)
        ratio = torch.exp(logprob - rollout)
        if importance == "clipped":
            bounded = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
            loss = torch.maximum(-ratio * advantage, -bounded * advantage)
            slope = torch.where(-ratio * advantage >= -bounded * advantage, -ratio * advantage, 0.0)
            slope = torch.where(loss.isnan(), math.nan, slope)
        else:
            if importance == "none":
                ratio = torch.ones_like(logprob)
            elif importance == "token_truncated":
                ratio = ratio.clamp(max=importance_cap)
            slope = -ratio * advantage
            loss = slope * logprob
        g = torch.stack([slope, torch.zeros_like(slope)], 1)
        return loss, g, (logprob, advantage, ratio)

    name = f"policy_gradient:{source}:{importance}"
    return RowRule(apply, name, options, ("logprobs", "advantages", "importance"))


def _cross_entropy_rule() -> RowRule:
    def apply(lp: Tensor, target: Tensor):
        g = torch.zeros_like(lp)
        g[:, 0] = -1.0
        return -lp[:, 0], g, ()

    return RowRule(apply, "cross_entropy", ())


def row_rule(name: str, options: list[float]) -> RowRule:
    """The rule of an operator's `rule` string: what a loss is, without its data.

    `<divergence>:<tail>` with options [beta] and target [N, K+1], the teacher's buckets;
    `policy_gradient:<given|log_ratio>:<importance>` with options [advantage_clip,
    importance_cap, clip_range] and target [N, 2], (advantage or teacher's log-prob,
    rollout's log-prob); `cross_entropy` with neither.
    """
    head, *rest = name.split(":")
    if head == "cross_entropy":
        return _cross_entropy_rule()
    if head == "policy_gradient":
        return _policy_gradient_rule(rest[0], rest[1], tuple(options))
    return _divergence_rule(head, rest[0], tuple(options))


class TeacherBuckets(NamedTuple):
    logprobs: Tensor  # [N, K+1], -inf where an id is -1; the last column is the tail
    floored: Tensor  # [N] bool, derived tails that rounding had left at or below the floor


def teacher_buckets(
    topk_ids: Tensor, topk_logprobs: Tensor, tail_logprobs: Tensor | None, vocab: int
) -> TeacherBuckets:
    """The teacher's K + 1 buckets; a missing tail is `log(1 - sum_k q_k)`.

    Derived tails are taken in fp64 and floored at log 2^-23, the rounding of fp32 near one. A row
    that lists the whole vocabulary has no tail: its bucket is -inf.
    """
    listed = topk_ids >= 0
    kept = topk_logprobs.masked_fill(~listed, -math.inf)
    if tail_logprobs is None:
        mass = kept.double().logsumexp(1)
        near_one = torch.log(-torch.expm1(mass.clamp(max=0.0)))
        tail = torch.where(mass > -math.log(2.0), near_one, torch.log1p(-torch.exp(mass)))
        floored = tail < TAIL_FLOOR
        tail = tail.clamp(min=TAIL_FLOOR).to(kept.dtype)
    else:
        tail = tail_logprobs
        floored = torch.zeros_like(tail, dtype=torch.bool)
    full = listed.sum(1) == vocab
    tail = tail.masked_fill(full, -math.inf)
    return TeacherBuckets(torch.cat([kept, tail.unsqueeze(1)], 1), floored & ~full)
