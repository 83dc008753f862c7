"""Tail "unbiased": its expectation by exact enumeration, its parts, and what it refuses."""

import math

import pytest
import torch
from kernel_cases import assert_close, gradients, make_case

from lopd_kernels import (
    LinearSparseDivergence,
    linear_logprobs,
    linear_sparse_divergence,
    linear_topk,
    reference,
    sparse_divergence,
)

V, D, K = 40, 6, 4


class Enumeration:
    """One row whose every possible sampled token is tried, weighted by the rollout policy."""

    def __init__(self, drift: float) -> None:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        try:
            self.hidden, self.weight = torch.randn(1, D), torch.randn(V, D)
            self.teacher = (1.5 * torch.randn(V)).log_softmax(0)
            student = (self.hidden @ self.weight.t())[0]
            self.rollout = (student + drift * torch.randn(V)).log_softmax(0)
        finally:
            torch.set_default_dtype(torch.float32)
        self.logprobs, self.ids = self.teacher.topk(K)
        self.tail = self.teacher.scatter(0, self.ids, -math.inf).logsumexp(0)

    def full(self) -> tuple[torch.Tensor, ...]:
        """(value, dH, dW) of the KL over the whole vocabulary."""

        def kl(hidden, weight):
            p = (hidden @ weight.t()).log_softmax(1)[0]
            return (p.exp() * (p - self.teacher)).sum()

        return gradients(kl, self.hidden, self.weight)

    def relative_bias(self, function, **options) -> list[float]:
        """|E x - exact| / |exact| of value, dH and dW."""
        exact, means = self.full(), [0.0, 0.0, 0.0]
        for token in range(V):
            sampled = torch.tensor([token])
            given = {
                "sampled_ids": sampled,
                "sampled_logprobs": self.teacher[sampled],
                "rollout_logprobs": self.rollout[sampled],
            }
            if options.get("tail") != "unbiased":
                given = {}
            drawn = gradients(
                lambda h, w, given=given: function(
                    h, w, self.ids[None], self.logprobs[None],
                    tail_logprobs=self.tail[None], **given, **options,
                ),
                self.hidden, self.weight,
            )  # fmt: skip
            share = self.rollout[token].exp()
            means = [mean + share * x for mean, x in zip(means, drawn, strict=True)]
        return [float((mean - x).norm() / x.norm()) for mean, x in zip(means, exact, strict=True)]


def on_logits(hidden, weight, *teacher, **options):
    return sparse_divergence(hidden @ weight.t(), *teacher, **options)


FUNCTIONS = {
    "linear": linear_sparse_divergence,
    "panels": lambda *a, **o: linear_sparse_divergence(*a, reduction="none", **o).sum(),
    "logits": on_logits,
    "reference": reference.linear_sparse_divergence,
}


@pytest.mark.parametrize("drift", [0.0, 0.7])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_expectation_is_the_full_reverse_kl(name, drift):
    biases = Enumeration(drift).relative_bias(FUNCTIONS[name], tail="unbiased")
    assert max(biases) < 1e-12


@pytest.mark.parametrize(
    "options", [{"tail": "bucket"}, {"tail": "unbiased", "importance_cap": 0.5}], ids=str
)
def test_the_enumeration_finds_a_bias(options):
    biases = Enumeration(0.7).relative_bias(linear_sparse_divergence, **options)
    assert min(biases) > 1e-2


def test_the_control_variate_of_the_papers_form_has_more_variance():
    """The published correction subtracts r_tail grad log p_tail instead of r_tail grad log p_A."""
    problem = Enumeration(0.0)
    p = (problem.hidden @ problem.weight.t()).log_softmax(1)[0]
    listed = torch.zeros(V, dtype=torch.bool).index_fill(0, problem.ids, True)
    tail = p.masked_fill(listed, -math.inf).logsumexp(0)
    slopes = torch.eye(V, dtype=torch.float64) - p.exp()  # grad log p_A with respect to z
    in_tail = (p - tail).exp().masked_fill(listed, 0.0) - p.exp()
    ratio, tail_ratio = p - problem.teacher, tail - problem.tail
    ours = (ratio - tail_ratio)[:, None] * slopes
    papers = ratio[:, None] * slopes - tail_ratio * in_tail
    unlisted = (~listed)[:, None]
    spreads = []
    for form in (ours, papers):
        form = torch.where(unlisted, form, 0.0)
        mean = (p.exp()[:, None] * form).sum(0)
        spreads.append(float((p.exp()[:, None] * (form - mean).square()).sum()))
    assert spreads[0] < spreads[1]


def test_the_gradient_is_that_of_its_parts():
    """The bucket's plus c grad log p_A with c a constant; both parts pass gradcheck."""
    case = make_case(dtype=torch.float64)
    form = case.form("reverse_kl", "unbiased")
    _, stats = linear_sparse_divergence(
        case.hidden, case.weight, *case.teacher, tail_logprobs=case.tail, return_stats=True, **form
    )
    listed = (case.ids == case.sampled_ids[:, None]).any(1)
    assert listed.any() and not listed.all()
    assert (stats.correction[listed] == 0.0).all() and (stats.importance[listed] == 0.0).all()

    def parts(h, w):
        bucket = linear_sparse_divergence(
            h, w, *case.teacher, tail_logprobs=case.tail, reduction="sum"
        )
        at_sampled = linear_logprobs(h, w, case.sampled_ids[:, None])[:, 0]
        correction = stats.correction * (1.0 + at_sampled - at_sampled.detach())
        return bucket + correction.sum()

    def whole(h, w):
        return linear_sparse_divergence(
            h, w, *case.teacher, tail_logprobs=case.tail, reduction="sum", **form
        )

    ours = gradients(whole, case.hidden, case.weight)
    assert_close(ours, gradients(parts, case.hidden, case.weight), torch.float64)


def test_stats():
    case = make_case(dtype=torch.float64)
    form = case.form("reverse_kl", "unbiased")
    options = {"tail_logprobs": case.tail, "return_stats": True}
    _, bucket = linear_sparse_divergence(case.hidden, case.weight, *case.teacher, **options)
    _, stats = linear_sparse_divergence(case.hidden, case.weight, *case.teacher, **options, **form)
    assert bucket.correction is None and bucket.importance is None
    for name in (
        "student_lse",
        "student_tail_logprobs",
        "teacher_tail_logprobs",
        "student_entropy",
    ):
        torch.testing.assert_close(getattr(stats, name), getattr(bucket, name))
    torch.testing.assert_close(stats.loss - stats.correction, bucket.loss)
    at_sampled = linear_logprobs(case.hidden, case.weight, case.sampled_ids[:, None])[:, 0]
    unlisted = ~(case.ids == case.sampled_ids[:, None]).any(1)
    ratio = (at_sampled - case.rollout_logprobs).exp() * unlisted
    torch.testing.assert_close(stats.importance, ratio)
    _, capped = linear_sparse_divergence(
        case.hidden, case.weight, *case.teacher, importance_cap=0.9, **options, **form
    )
    torch.testing.assert_close(capped.importance, ratio.clamp(max=0.9))


HIDDEN, WEIGHT = torch.randn(3, 4), torch.randn(10, 4)
IDS, LOGPROBS = torch.tensor([[0, 1], [2, 3], [4, -1]]), torch.full((3, 2), 0.25).log()
GOOD = {
    "sampled_ids": torch.tensor([1, 7, 8]),
    "sampled_logprobs": torch.full((3,), -2.0),
    "rollout_logprobs": torch.full((3,), -1.5),
}
REFUSED = [
    (dict(sampled_ids=None), "sampled_ids is None, but tail='unbiased' needs the token"),
    (dict(sampled_logprobs=None), "sampled_logprobs is None.*the teacher's log-probs"),
    (dict(rollout_logprobs=None), "rollout_logprobs is None.*top_p 1.*linear_topk"),
    (dict(divergence="forward_kl"), "divergence='reverse_kl'"),
    (dict(tail="bucket"), "sampled_ids is set, but tail is 'bucket'"),
    (dict(importance_cap=0.0), "importance_cap is 0.0"),
    (dict(sampled_ids=torch.tensor([1, -100, 8])), "sampled_ids has -100 in row 1"),
    (dict(sampled_ids=torch.tensor([1, 7, 10])), "sampled_ids has 10 in row 2"),
    (dict(sampled_ids=GOOD["sampled_ids"][:2]), "sampled_ids has shape"),
    (
        dict(sampled_logprobs=torch.tensor([-2.0, math.nan, -2.0])),
        "sampled_logprobs is nan in row 1",
    ),
    (dict(rollout_logprobs=torch.tensor([-2.0, 0.3, -2.0])), "rollout_logprobs is 0.3 in row 1"),
    (dict(rollout_logprobs=torch.full((3,), -math.inf)), "rollout_logprobs is -inf in row 0"),
    (dict(sampled_logprobs=torch.tensor([-2.0, -2.0, -0.1])), "outside its list.*same teacher"),
    (dict(tail_logprobs=torch.full((3,), -math.inf)), "outside its list"),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_bad_input_names_the_remedy(wrong, message):
    valid = dict(tail="unbiased", **GOOD)
    linear_sparse_divergence(HIDDEN, WEIGHT, IDS, LOGPROBS, **valid)
    with pytest.raises(ValueError, match=message):
        linear_sparse_divergence(HIDDEN, WEIGHT, IDS, LOGPROBS, **{**valid, **wrong})


@pytest.mark.parametrize("bad", [-1, -100, 10])
def test_an_unchecked_invalid_sample_makes_only_its_row_nan(bad):
    given = {**GOOD, "sampled_ids": torch.tensor([1, 7, bad])}  # row 2 has a pad
    losses = linear_sparse_divergence(
        HIDDEN, WEIGHT, IDS, LOGPROBS, tail="unbiased", reduction="none", validate=False, **given
    )
    assert losses.isnan().tolist() == [False, False, True]


def test_the_module_is_the_function():
    loss_of = LinearSparseDivergence(tail="unbiased", importance_cap=0.9)
    expected = linear_sparse_divergence(
        HIDDEN, WEIGHT, IDS, LOGPROBS, tail="unbiased", importance_cap=0.9, **GOOD
    )
    assert torch.equal(loss_of(HIDDEN, WEIGHT, IDS, LOGPROBS, **GOOD), expected)
    batch = [x[None] for x in (HIDDEN, IDS, LOGPROBS)]
    given = {name: x[None] for name, x in GOOD.items()}
    assert torch.equal(loss_of(batch[0], WEIGHT, *batch[1:], **given), expected)


def test_a_students_own_samples_have_weight_one():
    top = linear_topk(HIDDEN, WEIGHT, 1, sampled_ids=GOOD["sampled_ids"])
    _, stats = linear_sparse_divergence(
        HIDDEN, WEIGHT, IDS, LOGPROBS, tail="unbiased", return_stats=True,
        **{**GOOD, "rollout_logprobs": top.sampled_logprobs},
    )  # fmt: skip
    torch.testing.assert_close(stats.importance, torch.tensor([0.0, 1.0, 1.0]))
