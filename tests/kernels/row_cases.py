"""Rows of logits, ids and targets for the row kernels, and their results in torch in fp64."""

import math

import torch

from lopd_kernels._core.rules import (
    DIVERGENCES,
    IMPORTANCE,
    CrossEntropyRule,
    DivergenceRule,
    PolicyGradientRule,
    UnbiasedRule,
    encode,
)
from lopd_kernels._core.types import LogitOptions
from lopd_kernels._torch import rows as torch_rows

DIVERGENCE_RULES = [
    DivergenceRule(name, tail, 0.3)
    for name in DIVERGENCES
    for tail in ("bucket", "truncate", "generalized")
]
POLICY_RULES = [
    PolicyGradientRule(from_teacher, importance, 1.0, 1.2, 0.2)
    for from_teacher in (False, True)
    for importance in (*IMPORTANCE, "clipped")
]
ALL_RULES = (*DIVERGENCE_RULES, UnbiasedRule(1.2), *POLICY_RULES, CrossEntropyRule())
RULES = {encode(rule)[0]: rule for rule in ALL_RULES}
REVERSE_KL = DivergenceRule("reverse_kl", "bucket")
HEADS = {
    "plain": dict(),
    "scaled": dict(logit_scale=1.3, temperature=0.7),
    "capped": dict(softcap=4.0, temperature=1.2),
    "biased": dict(bias=True, logit_scale=0.8),
    "capped+biased": dict(softcap=30.0, bias=True),
}


def make_head(name, vocab, dtype=torch.float32):
    options = dict(HEADS[name])
    if options.pop("bias", False):
        options["bias"] = torch.randn(vocab, generator=generator()).to(dtype)
    return LogitOptions(**options)


def generator():
    return torch.Generator(torch.get_default_device()).manual_seed(7)


def padded_rows(rows, vocab, scale=3.0):
    """u as the schedules allocate it: the columns beyond the vocabulary hold NaN."""
    buffer = torch.full((rows, vocab + 16 - vocab % 16), math.nan)
    buffer[:, :vocab] = scale * torch.randn(rows, vocab)
    return buffer[:, :vocab]


def ragged_ids(rows, vocab, k):
    ids = torch.rand(rows, vocab).topk(min(k, vocab), 1).indices
    ids = torch.nn.functional.pad(ids, (0, k - ids.shape[1]), value=-1)
    counts = torch.randint(1, k + 1, (rows, 1))
    return ids.masked_fill(torch.arange(k) >= counts, -1)


def make_target(rule, ids, u):
    """Teacher buckets near the student's, or the target of a rule on one id per row."""
    n = len(ids)
    if isinstance(rule, CrossEntropyRule):
        return torch.zeros(n, 1)
    if isinstance(rule, PolicyGradientRule):
        student = u.log_softmax(1).gather(1, ids[:, :1].clamp(min=0))
        return student + 0.5 * torch.randn(n, 2)
    teacher = (u + 0.25 * torch.randn_like(u)).log_softmax(1)
    if isinstance(rule, UnbiasedRule):  # the last id of each list is the sampled one
        lists = make_target(REVERSE_KL, ids[:, :-1], u) if ids.shape[1] > 1 else torch.zeros(n, 1)
        sampled = [x.log_softmax(1).gather(1, ids[:, -1:].clamp(min=0)) for x in (teacher, u)]
        return torch.cat([lists[:, :-1], sampled[0], lists[:, -1:], sampled[1] - 0.1], 1)
    on_list = teacher.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -math.inf)
    listed = torch.zeros(n, u.shape[1] + 1, dtype=torch.bool).scatter(
        1, ids % (u.shape[1] + 1), True
    )
    tail = teacher.masked_fill(listed[:, :-1], -math.inf).logsumexp(1, keepdim=True)
    return torch.cat([on_list, tail], 1)


def oracle_pass(u, ids, target, weights, rule, head):
    """(stats, gradient) of the torch implementation in fp64."""
    u, rows = u.double(), len(u)
    bias = None if head.bias is None else head.bias.double()
    head = LogitOptions(head.logit_scale, head.softcap, head.temperature, bias)
    listed_ids = torch_rows.locate(ids, weights, u.shape[1])
    stats = torch.zeros(rows, 4 + len(rule.extras), dtype=torch.float64)
    u = u.clone()
    torch_rows.row_pass(
        u, listed_ids, target.double(), weights.double(), rule, head, True, stats, u, inf_masks=True
    )
    return stats, u
