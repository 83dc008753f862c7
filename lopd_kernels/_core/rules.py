"""Every loss as one rule on the buckets of a row: its K listed ids and the tail.

The tail bucket holds the rest of the vocabulary. With `l_b = log p_b` the student's log-probs
of these K + 1 buckets, a rule gives the row's loss and `g_b = dL/dl_b`. The gradient with
respect to the logits is then, with `G = sum_b g_b`,

    listed ids   dL/dz_k = g_k - p_k G
    other ids    dL/dz_j = p_j / p_tail * (g_tail - p_tail G)

so one row pass serves every loss. A divergence is one elementwise function of the student's
and the teacher's log-probs; to add one, add it to `DIVERGENCES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lopd_kernels._core.types import SKIP_STATS, STATS, Skip

TAILS = ("bucket", "renormalize", "truncate", "generalized", "unbiased")
IMPORTANCE = ("none", "token", "token_truncated")
TAIL_FLOOR = -23 * math.log(2.0)
RowResult = tuple[Tensor, Tensor, tuple[Tensor, ...]]


class Divergence(NamedTuple):
    """phi(l, t, beta) -> (phi, g) per bucket, with dphi/dl = g + shift * p.

    The constant is separate because it cancels wherever the buckets sum to one, where adding it
    would only cost digits. A truncated sum needs it. `phi + shift * (q - p)` has the gradient g
    and is zero and smallest at p = q: the generalised divergence, which needs no tail.
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
    # Where the clamp acts, p or q is below e^-80, and so is the error of the clamp.
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


@dataclass(frozen=True)
class DivergenceRule:
    """A divergence to the teacher's buckets; target [N, K+1] are their log-probs."""

    divergence: str  # a key of DIVERGENCES
    tail: str  # one of TAILS but "unbiased"
    beta: float = 0.5

    extras: ClassVar[tuple[str, ...]] = ()

    @property
    def ignores_unlisted(self) -> bool:
        """Whether the loss depends on the listed ids only and needs no LM-head GEMM."""
        return self.tail == "renormalize"

    def apply(self, lp: Tensor, target: Tensor) -> RowResult:
        phi, shift = DIVERGENCES[self.divergence]
        if self.tail == "truncate":
            terms, g = phi(lp[:, :-1], target[:, :-1], self.beta)
            g = g + shift * lp[:, :-1].exp()
            return terms.sum(1), torch.cat([g, torch.zeros_like(lp[:, -1:])], 1), ()
        if self.tail == "generalized":
            terms, g = phi(lp[:, :-1], target[:, :-1], self.beta)
            terms = terms + shift * (target[:, :-1].exp() - lp[:, :-1].exp())
            return terms.sum(1), torch.cat([g, torch.zeros_like(lp[:, -1:])], 1), ()
        if self.tail == "renormalize":
            listed = target[:, :-1]
            listed = listed - listed.logsumexp(1, keepdim=True)
            target = torch.cat([listed, target[:, -1:]], 1)
        terms, g = phi(lp, target, self.beta)
        return terms.sum(1), g, ()


@dataclass(frozen=True)
class UnbiasedRule:
    """The bucketed reverse KL, corrected at one sampled id A outside the list.

    A is the last of the K ids, -1 in rows whose list holds the sampled id; S are the others. The
    tail consists of A and the rest. With r = log p - log q and the constant c = w (r_A - r_tail),
    w = min(p_A / p_rollout, importance_cap), the loss is KL_bucket(S) + c and its gradient that of
    KL_bucket(S) + c log p_A. In expectation over A ~ p_rollout both are those of the full KL.

    The target [N, K+2] is the teacher's log-probs of S, of A and of the tail, and A's under the
    policy that sampled it.
    """

    importance_cap: float = math.inf

    extras: ClassVar[tuple[str, ...]] = ("sampled_logprobs", "correction", "importance")
    ignores_unlisted: ClassVar[bool] = False

    def apply(self, lp: Tensor, target: Tensor) -> RowResult:
        sampled, rest = lp[:, -2:-1], lp[:, -1:]
        lq_sampled, lq_tail, rollout = target[:, -3:].split(1, 1)
        tail = torch.logaddexp(sampled, rest)
        terms, g = _reverse_kl(
            torch.cat([lp[:, :-2], tail], 1), torch.cat([target[:, :-3], lq_tail], 1), 0.0
        )
        no_sample = sampled == -math.inf
        weight = torch.exp(sampled - rollout).clamp(max=self.importance_cap)
        correction = weight * ((sampled - lq_sampled) - (tail - lq_tail))
        weight, correction = (x.masked_fill(no_sample, 0.0) for x in (weight, correction))
        parts = torch.cat([sampled, rest], 1)
        shares = (parts - tail).exp().masked_fill(parts == -math.inf, 0.0)
        g_parts = g[:, -1:] * shares
        g_sampled = g_parts[:, :1] + correction
        g = torch.cat([g[:, :-1], g_sampled, g_parts[:, 1:]], 1)
        extras = (sampled[:, 0], correction[:, 0], weight[:, 0])
        return terms.sum(1) + correction[:, 0], g, extras


@dataclass(frozen=True)
class PolicyGradientRule:
    """The policy gradient of one id per row; target [N, 2] is (score, rollout's log-prob).

    The score is the advantage itself or, with `from_teacher`, the teacher's log-prob.
    """

    from_teacher: bool
    importance: str  # one of IMPORTANCE, or "clipped" for PPO's form
    advantage_clip: float = math.inf
    importance_cap: float = math.inf
    clip_range: float = 0.0

    extras: ClassVar[tuple[str, ...]] = ("logprobs", "advantages", "importance")
    ignores_unlisted: ClassVar[bool] = False

    def apply(self, lp: Tensor, target: Tensor) -> RowResult:
        logprob, (score, rollout) = lp[:, 0], target.unbind(1)
        advantage = score
        if self.from_teacher:
            advantage = (score - logprob).clamp(-self.advantage_clip, self.advantage_clip)
        ratio = torch.exp(logprob - rollout)
        if self.importance == "clipped":
            bounded = ratio.clamp(1.0 - self.clip_range, 1.0 + self.clip_range)
            free, bounded = -ratio * advantage, -bounded * advantage
            loss = torch.maximum(free, bounded)
            slope = torch.where(free >= bounded, free, 0.0)
            slope = torch.where(loss.isnan(), math.nan, slope)
        else:
            if self.importance == "none":
                ratio = torch.ones_like(logprob)
            elif self.importance == "token_truncated":
                ratio = ratio.clamp(max=self.importance_cap)
            slope = -ratio * advantage
            loss = slope * logprob
        g = torch.stack([slope, torch.zeros_like(slope)], 1)
        return loss, g, (logprob, advantage, ratio)


@dataclass(frozen=True)
class CrossEntropyRule:
    """-log p of one id per row; the target is not used."""

    extras: ClassVar[tuple[str, ...]] = ()
    ignores_unlisted: ClassVar[bool] = False

    def apply(self, lp: Tensor, target: Tensor) -> RowResult:
        g = torch.zeros_like(lp)
        g[:, 0] = -1.0
        return -lp[:, 0], g, ()


# apply(lp [R, K+1], target [R, M]) -> (loss [R], g [R, K+1], one [R] tensor per name in `extras`)
Rule = DivergenceRule | UnbiasedRule | PolicyGradientRule | CrossEntropyRule


class RowLoss(NamedTuple):
    """A loss of each row: on which ids, compared with what, times which weight."""

    ids: Tensor  # [N, K] int, -1 pads
    target: Tensor  # [N, M], see the rule
    row_weights: Tensor | None  # [N]
    rule: Rule
    skip: Skip | None = None  # None: the gradient of every row is formed

    @property
    def stats_width(self) -> int:
        """Columns of the stats: STATS, the rule's extras and, with `skip`, SKIP_STATS."""
        return len(STATS) + len(self.rule.extras) + len(SKIP_STATS) * (self.skip is not None)


def encode(rule: Rule) -> tuple[str, list[float]]:
    """The two arguments that stand for a rule in an operator's schema."""
    if isinstance(rule, DivergenceRule):
        return f"{rule.divergence}:{rule.tail}", [rule.beta]
    if isinstance(rule, UnbiasedRule):
        return "reverse_kl:unbiased", [rule.importance_cap]
    if isinstance(rule, PolicyGradientRule):
        score = "teacher" if rule.from_teacher else "advantage"
        options = [rule.advantage_clip, rule.importance_cap, rule.clip_range]
        return f"policy_gradient:{score}:{rule.importance}", options
    return "cross_entropy", []


def decode(name: str, options: list[float]) -> Rule:
    """The inverse of `encode`."""
    kind, *form = name.split(":")
    if kind == "cross_entropy":
        return CrossEntropyRule()
    if kind == "policy_gradient":
        return PolicyGradientRule(form[0] == "teacher", form[1], *options)
    if form[0] == "unbiased":
        return UnbiasedRule(*options)
    return DivergenceRule(kind, form[0], *options)


class TeacherBuckets(NamedTuple):
    logprobs: Tensor  # [N, K+1], -inf where an id is -1; the last column is the tail
    floored: Tensor  # [N] bool: a derived tail was raised to TAIL_FLOOR


def teacher_buckets(
    topk_ids: Tensor, topk_logprobs: Tensor, tail_logprobs: Tensor | None, vocab: int
) -> TeacherBuckets:
    """The teacher's K + 1 buckets; a missing tail is `log(1 - sum_k q_k)`.

    A missing tail is derived in fp64 and floored at log 2^-23, the rounding of fp32 near one. A
    row that lists the whole vocabulary has no tail: its bucket is -inf.
    """
    is_listed = topk_ids >= 0
    listed = topk_logprobs.masked_fill(~is_listed, -math.inf)
    if tail_logprobs is None:
        mass = listed.double().logsumexp(1)
        near_one = torch.log(-torch.expm1(mass.clamp(max=0.0)))
        tail = torch.where(mass > -math.log(2.0), near_one, torch.log1p(-torch.exp(mass)))
        floored = tail < TAIL_FLOOR
        tail = tail.clamp(min=TAIL_FLOOR).to(listed.dtype)
    else:
        tail = tail_logprobs
        floored = torch.zeros_like(tail, dtype=torch.bool)
    full = is_listed.sum(1) == vocab
    tail = tail.masked_fill(full, -math.inf)
    return TeacherBuckets(torch.cat([listed, tail.unsqueeze(1)], 1), floored & ~full)
