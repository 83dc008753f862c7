"""The rules: slopes against finite differences, special cases, and the teacher's buckets."""

import math

import pytest
import torch

from lopd_kernels._core.buckets import center
from lopd_kernels._core.rules import (
    DIVERGENCES,
    IMPORTANCE,
    TAIL_FLOOR,
    TAILS,
    CrossEntropyRule,
    DivergenceRule,
    PolicyGradientRule,
    UnbiasedRule,
    decode,
    encode,
    teacher_buckets,
)

DIVERGENCE_RULES = [
    DivergenceRule(d, t, 0.3) for d in DIVERGENCES for t in TAILS if t != "unbiased"
]
POLICY_RULES = [
    PolicyGradientRule(False, mode, math.inf, 1.1, 0.2) for mode in (*IMPORTANCE, "clipped")
]


def buckets(rows=6, k=4, seed=0):
    torch.manual_seed(seed)
    return torch.randn(rows, k + 1, dtype=torch.float64).log_softmax(1)


@pytest.mark.parametrize("rule", DIVERGENCE_RULES, ids=lambda rule: encode(rule)[0])
def test_the_gradient_of_the_logits_is_that_of_the_loss(rule):
    z = buckets(seed=1).requires_grad_()
    target = buckets()
    lp = z.log_softmax(1)
    if rule.ignores_unlisted:
        z = buckets(seed=1)[:, :-1].requires_grad_()
        no_tail = torch.full((6, 1), -math.inf, dtype=torch.float64)
        lp = torch.cat([z.log_softmax(1), no_tail], 1)
        target = torch.cat([target[:, :-1], no_tail], 1)
    g = center(rule.apply(lp.detach(), target)[1], lp.detach().exp())
    step = 1e-6
    for b in range(z.shape[1]):
        shift = torch.zeros_like(z).index_fill(1, torch.tensor([b]), step)
        sides = []
        for sign in (1.0, -1.0):
            moved = (z.detach() + sign * shift).log_softmax(1)
            if rule.ignores_unlisted:
                moved = torch.cat([moved, no_tail], 1)
            sides.append(rule.apply(moved, target)[0])
        slope = (sides[0] - sides[1]) / (2 * step)
        torch.testing.assert_close(g[:, b], slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rule", POLICY_RULES, ids=lambda rule: rule.importance)
def test_policy_rules_depend_only_on_the_sampled_id(rule):
    lp = buckets(k=1)
    target = torch.stack([torch.tensor([1.0, -1.0, 2.0, 0.0, -3.0, 0.5]), lp[:, 0] * 0.8], 1)
    _, g, (logprob, advantage, ratio) = rule.apply(lp, target)
    assert (g[:, 1] == 0.0).all()
    torch.testing.assert_close(logprob, lp[:, 0])
    torch.testing.assert_close(advantage, target[:, 0].double())
    rho = (lp[:, 0] - target[:, 1]).exp()
    if rule.importance == "none":
        torch.testing.assert_close(g[:, 0], -advantage)
    elif rule.importance == "token":
        torch.testing.assert_close(g[:, 0], -rho * advantage)
    elif rule.importance == "token_truncated":
        torch.testing.assert_close(g[:, 0], -rho.clamp(max=1.1) * advantage)
    assert (ratio > 0).all()


@pytest.mark.parametrize(
    "rule",
    [
        *DIVERGENCE_RULES,
        UnbiasedRule(),
        UnbiasedRule(2.0),
        *POLICY_RULES,
        PolicyGradientRule(True, "token"),
        CrossEntropyRule(),
    ],
    ids=lambda rule: encode(rule)[0],
)
def test_a_rule_survives_the_operators_schema(rule):
    assert decode(*encode(rule)) == rule


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_are_zero_at_the_teacher_and_positive_elsewhere(name):
    lp, apply = buckets(), DivergenceRule(name, "bucket").apply
    loss, g, _ = apply(lp, lp)
    assert loss.abs().max() < 1e-14
    assert center(g, lp.exp()).abs().max() < 1e-14
    assert (apply(lp, buckets(seed=3))[0] > 0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_empty_buckets_on_either_side(name):
    lp = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    lq = torch.tensor([[0.25, 0.75, 0.0]], dtype=torch.float64).log()
    apply = DivergenceRule(name, "bucket").apply
    loss, g, _ = apply(lp, lq)
    two, g_two, _ = apply(lp[:, :2], lq[:, :2])
    torch.testing.assert_close(loss, two)
    torch.testing.assert_close(g[:, :2], g_two)
    assert g[0, 2] == 0.0
    student_zero = torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64).log()
    teacher_full = torch.tensor([[0.25, 0.5, 0.25]], dtype=torch.float64).log()
    assert apply(student_zero, teacher_full)[0].isinf() == (name == "forward_kl")
    assert apply(teacher_full, student_zero)[0].isinf() == (name == "reverse_kl")


def test_the_gradient_of_a_bucket_with_all_the_mass_is_precise():
    exact_p = torch.tensor([[1.0 - 1e-6, 1e-6]], dtype=torch.float64)
    g = torch.tensor([[-1.0, 0.0]])
    assert abs(float(center(g, exact_p.float())[0, 0]) + 1e-6) < 1e-12


def test_teacher_buckets():
    logprobs = torch.tensor([[0.5, 0.3], [0.5, 0.5], [0.6, 9.0], [0.25, 0.25]]).log()
    ids = torch.tensor([[0, 1], [2, 1], [1, -1], [-1, -1]])
    teacher = teacher_buckets(ids, logprobs, None, 3)
    expected = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.5, 0.0], [0.6, 0.0, 0.4], [0.0, 0.0, 1.0]])
    expected[1, 2] = math.exp(TAIL_FLOOR)
    torch.testing.assert_close(teacher.logprobs.exp(), expected)
    assert teacher.floored.tolist() == [False, True, False, False]
    full = teacher_buckets(ids[:2], logprobs[:2], None, 2)
    assert (full.logprobs[:, 2] == -math.inf).all()
    assert not full.floored.any()
    explicit = teacher_buckets(ids, logprobs, torch.tensor([-1.0, -2.0, -3.0, -4.0]), 3)
    assert explicit.logprobs[:, 2].tolist() == [-1.0, -2.0, -3.0, -4.0]


@pytest.mark.parametrize("missing", [1e-3, 1e-4, 1e-5, 1e-6])
def test_a_derived_tail_is_precise(missing):
    torch.manual_seed(0)
    shares = torch.randn(50, 4, dtype=torch.float64).softmax(1) * (1.0 - missing)
    logprobs = shares.log().float()
    exact = torch.log1p(-logprobs.double().exp().sum(1))
    teacher = teacher_buckets(torch.arange(4).repeat(50, 1), logprobs, None, 100)
    torch.testing.assert_close(teacher.logprobs[:, -1].double(), exact, rtol=0, atol=2e-6)
    assert not teacher.floored.any()


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.9])
@pytest.mark.parametrize("distance", [1e-4, 1e-2, 1.0])
def test_jsd_is_precise_near_the_teacher(distance, beta):
    lp = buckets(40).float()
    lq = (lp + distance * torch.randn(40, 5)).float()
    apply = DivergenceRule("jsd", "bucket", beta).apply
    p, q = lp.double(), lq.double()
    mix = torch.log1p(beta * torch.expm1(q - p))
    exact = -(1.0 - beta) * p.exp() * mix
    g = apply(lp, lq)[1]
    assert (g - exact).norm() / exact.norm() < 2e-6
    far = torch.tensor([[-1e-3, -200.0]])
    loss = apply(far, far.flip(1))[0]
    expected = -(beta * math.log(beta) + (1.0 - beta) * math.log(1.0 - beta))
    assert abs(float(loss) / expected - 1.0) < 2e-2


def test_the_clipped_policy_rule_propagates_nan():
    target = torch.tensor([[1.0, -1.0]])
    lp = torch.tensor([[math.nan, math.nan]])
    rule = PolicyGradientRule(False, "clipped", clip_range=0.2)
    loss, g, _ = rule.apply(lp, target)
    assert loss.isnan().all()
    assert g[:, 0].isnan().all()
