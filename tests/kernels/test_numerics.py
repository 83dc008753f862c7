"""Precision and values that are not finite: edge cases of the losses, against fp64."""

import math

import pytest
import torch
from kernel_cases import assert_close, gradients, make_case, relative_error

from lopd_kernels import (
    linear_cross_entropy,
    linear_logprobs,
    linear_sparse_divergence,
    linear_topk,
    reference,
    sparse_divergence,
)
from lopd_kernels._core.rules import TAILS


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("bad", [-2, 211, 2**31 - 1, "twice"])
def test_an_unchecked_invalid_id_makes_only_its_row_nan(bad, tail):
    case = make_case()
    ids = case.ids.clone()
    ids[5, 0] = ids[5, 1] if bad == "twice" else bad
    form = case.form("reverse_kl", tail)
    losses = linear_sparse_divergence(
        case.hidden, case.weight, ids, case.logprobs, reduction="none", validate=False, **form
    )
    assert losses[5].isnan()
    others = torch.arange(20) != 5
    assert losses[others].isfinite().all()
    _, dhidden, dweight = gradients(
        lambda h, w: linear_sparse_divergence(h, w, ids, case.logprobs, validate=False, **form),
        case.hidden,
        case.weight,
    )
    assert dhidden[5].isnan().all()
    assert dhidden[others].isfinite().all()
    assert dweight.isnan().any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("tail", TAILS)
def test_nan_and_inf_in_a_row_make_only_that_row_nan(tail, reduction, softcap, value):
    case = make_case()
    hidden = case.hidden.clone()
    hidden[2, 0] = value
    form = case.form("reverse_kl", tail)
    options = dict(**form, softcap=softcap, reduction=reduction)

    def loss(h, w):
        return linear_sparse_divergence(h, w, *case.teacher, **options)

    losses, dhidden, dweight = gradients(loss, hidden, case.weight)
    others = torch.arange(20) != 2
    expected = ~others if reduction == "none" else torch.tensor(True)
    assert torch.equal(losses.isnan(), expected)
    assert dhidden[2].isnan().all()
    assert dhidden[others].isfinite().all()
    assert dweight.isnan().any()
    if softcap is None:
        logits = reference.linear_logits(case.hidden, case.weight)
        logits[2, 0] = math.inf if tail != "renormalize" else math.nan
        logits[2, case.ids[2, 0]] = math.nan
        _, dlogits = gradients(
            lambda z: sparse_divergence(z, *case.teacher, reduction=reduction, **form), logits
        )
        assert dlogits[2].isnan().any()
        assert dlogits[others].isfinite().all()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("tail", TAILS)
def test_an_infinite_weight_makes_every_row_that_uses_it_nan(tail, softcap):
    case = make_case()
    weight = case.weight.clone()
    weight[case.ids[4, 0], 3] = math.inf
    options = dict(**case.form("reverse_kl", tail), softcap=softcap, reduction="none")
    losses = linear_sparse_divergence(case.hidden, weight, *case.teacher, **options)
    affected = torch.ones(20, dtype=torch.bool)
    if tail == "renormalize":
        affected = (case.ids == case.ids[4, 0]).any(1)
    assert losses.isnan().tolist() == affected.tolist()
    if softcap is not None:
        bias = torch.zeros(211).index_fill(0, case.ids[4, 0], -math.inf)
        losses = linear_sparse_divergence(
            case.hidden, case.weight, *case.teacher, bias=bias, **options
        )
        assert losses.isnan().tolist() == affected.tolist()


def test_a_bias_of_minus_infinity_removes_an_id_from_the_vocabulary():
    case = make_case()
    bias = torch.zeros(211).index_fill(0, torch.arange(150, 211), -math.inf)
    labels = torch.arange(20)
    masked = gradients(lambda h, w: linear_cross_entropy(h, w, labels, bias=bias),
                       case.hidden, case.weight)  # fmt: skip
    cut = gradients(lambda h, w: linear_cross_entropy(h, w[:150], labels),
                    case.hidden, case.weight)  # fmt: skip
    assert_close(masked, [x.double() for x in cut], torch.float32)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("tail", [tail for tail in TAILS if tail != "unbiased"])
def test_a_row_of_logits_without_any_mass_is_nan_like_its_softmax(tail, divergence):
    case = make_case()
    logits = case.hidden @ case.weight.t()
    logits[3] = -math.inf
    loss, grad = gradients(
        lambda z: sparse_divergence(
            z, *case.teacher, tail=tail, divergence=divergence, reduction="none"
        ),
        logits,
    )
    assert loss.isnan().nonzero().tolist() == [[3]]
    assert grad.isnan().any(1).nonzero().tolist() == [[3]]


def test_a_row_of_weight_zero_ignores_a_nan_in_the_weight():
    case = make_case()
    weight = case.weight.clone()
    weight[7] = math.nan
    weights = torch.ones(20)
    weights[3] = 0.0
    for tail in TAILS:
        ids, form = case.ids.clone(), case.form("reverse_kl", tail)
        ids[3, 0] = 7
        losses, dhidden = gradients(
            lambda h, ids=ids, form=form: linear_sparse_divergence(
                h, weight, ids, case.logprobs, row_weights=weights, reduction="none", **form
            ),
            case.hidden,
        )
        assert losses[3] == 0.0
        assert (dhidden[3] == 0.0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("tail", TAILS)
def test_a_nonfinite_upstream_gradient_affects_only_its_row_of_dh(tail, value):
    case = make_case()
    upstream = torch.linspace(0.5, 1.5, 20)
    upstream[6] = value
    form = case.form("reverse_kl", tail)
    hidden = case.hidden.clone().requires_grad_()
    losses = linear_sparse_divergence(hidden, case.weight, *case.teacher, reduction="none", **form)
    losses.backward(upstream)
    dhidden = hidden.grad.clone()
    assert not dhidden[6].isfinite().any()
    upstream[6], hidden.grad = 0.0, None
    linear_sparse_divergence(hidden, case.weight, *case.teacher, reduction="none", **form).backward(
        upstream
    )
    others = torch.arange(20) != 6
    torch.testing.assert_close(dhidden[others], hidden.grad[others])


@pytest.mark.parametrize("offset", [1e2, 1e3, 1e4, -1e4])
def test_an_offset_of_all_logits_costs_no_precision(offset):
    case = make_case("near")
    logits = reference.linear_logits(case.hidden, case.weight) + offset
    ours = gradients(lambda z: sparse_divergence(z, *case.teacher, reduction="none"), logits)
    exact = gradients(
        lambda z: reference.sparse_divergence(z, *case.double().teacher, reduction="none"),
        logits.double(),
    )
    difference = (ours[0] - exact[0]).abs() / (1.0 + exact[0].abs())
    assert difference.max() < 2e-6
    assert relative_error(ours[1], exact[1]) < 1e-5
    labels = torch.arange(20)
    loss = linear_cross_entropy(torch.eye(20), logits.t(), labels, reduction="none")
    expected = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    assert ((loss - expected).abs() / (1.0 + expected)).max() < 2e-6
    logprobs = linear_logprobs(torch.eye(20), logits.t(), labels[:, None])[:, 0]
    assert ((logprobs + expected).abs() / (1.0 + expected)).max() < 2e-6
    top = linear_topk(torch.eye(20), logits.t(), 5)
    expected = logits.double().log_softmax(1).topk(5, 1).values
    assert ((top.logprobs - expected).abs() / (1.0 + expected.abs())).max() < 2e-6


def test_entropy_of_a_row_that_lists_every_id():
    hidden, weight = torch.ones(1, 1), torch.tensor([[-100.0], [-101.0], [-102.0]])
    _, stats = linear_sparse_divergence(
        hidden, weight, torch.arange(3)[None], torch.full((1, 3), 1 / 3).log(), return_stats=True
    )
    p = weight[:, 0].double().softmax(0)
    expected = torch.special.entr(p).sum()
    torch.testing.assert_close(stats.student_entropy[0].double(), expected)
    torch.testing.assert_close(linear_topk(hidden, weight, 3).entropy[0].double(), expected)


def test_the_teachers_tail_may_be_nan_where_the_loss_does_not_use_it():
    hidden, weight = torch.randn(2, 4), torch.randn(3, 4)
    ids = torch.tensor([[0, 1, 2], [0, 1, -1]])
    logprobs = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.0]]).log()
    tail = torch.tensor([math.nan, math.log(0.25)])
    loss = linear_sparse_divergence(hidden, weight, ids, logprobs, tail_logprobs=tail)
    assert loss.isfinite()
    for form in ("truncate", "renormalize"):
        linear_sparse_divergence(
            hidden, weight, ids, logprobs, tail_logprobs=torch.full((2,), math.nan), tail=form
        )


def test_statistics_of_inactive_rows_are_zero():
    hidden, weight = torch.randn(4, 4), torch.randn(9, 4)
    ids, logprobs = torch.tensor([[0], [1], [-1], [2]]), torch.tensor([[0.0], [0.0], [0.0], [-1.0]])
    _, stats = linear_sparse_divergence(
        hidden, weight, ids, logprobs, row_weights=torch.tensor([1.0, 0.0, 1.0, 1.0]),
        return_stats=True,
    )  # fmt: skip
    assert stats.tail_floored.tolist() == [True, False, False, False]
    assert stats.teacher_tail_logprobs[1:3].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(1e-40, torch.float32), (1e38, torch.float32), (1e-60, torch.float64), (1e300, torch.float64)],
)
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_a_mean_does_not_depend_on_the_size_of_the_weights(tail, size, dtype):
    """Neither their sum nor its inverse is in the range of fp32."""
    case = make_case()
    weights = torch.linspace(0.5, 1.0, 20, dtype=torch.float64)

    def loss(scale, dtype):
        return lambda h: linear_sparse_divergence(
            h, case.weight, *case.teacher, tail=tail, row_weights=(scale * weights).to(dtype)
        )

    exact = gradients(loss(1.0, torch.float64), case.hidden)
    assert_close(gradients(loss(size, dtype), case.hidden), exact, torch.float32)
    total = linear_sparse_divergence(
        case.hidden.requires_grad_(), case.weight, *case.teacher, tail=tail, reduction="sum",
        row_weights=torch.full((20,), 1e-60, dtype=torch.float64),
    )  # fmt: skip
    [grad] = torch.autograd.grad(total, case.hidden)
    assert total == 0.0
    assert (grad == 0.0).all()


def test_derived_floored_and_explicit_tails():
    case = make_case(rows=4, vocab=30)
    ids = torch.arange(3).repeat(4, 1)
    logprobs = torch.tensor([[0.5, 0.25, 0.125], [0.5, 0.25, 0.25], [0.5, 0.3, 0.2005], [1, 1, 1]])
    logprobs[3] = torch.tensor([1e-3, 1e-3, 1e-3])
    loss, stats = linear_sparse_divergence(
        case.hidden, case.weight, ids, logprobs.log(), reduction="none", return_stats=True
    )
    floor = -23 * math.log(2)
    expected = torch.tensor([math.log(0.125), floor, floor, math.log1p(-3e-3)])
    torch.testing.assert_close(stats.teacher_tail_logprobs, expected, rtol=1e-5, atol=1e-6)
    assert stats.tail_floored.tolist() == [False, True, True, False]
    assert loss.isfinite().all()
    explicit = torch.tensor([math.log(0.125), -math.inf, -30.0, -1.0])
    loss = linear_sparse_divergence(
        case.hidden, case.weight, ids, logprobs.log(), tail_logprobs=explicit, reduction="none"
    )
    assert loss.isinf().tolist() == [False, True, False, False]


def test_small_student_tails_are_precise():
    weight = torch.zeros(50, 2)
    weight[0, 0] = 30.0
    weight[1:, 1] = torch.linspace(0.0, 1.0, 49)
    hidden = torch.tensor([[1.0, 1.0]])
    ids, logprobs = torch.tensor([[0]]), torch.tensor([[math.log(0.5)]])
    options = dict(divergence="reverse_kl", return_stats=True)
    _, stats = linear_sparse_divergence(hidden, weight, ids, logprobs, **options)
    logits = (hidden @ weight.t()).double()
    exact = logits[:, 1:].logsumexp(1) - logits.logsumexp(1)
    assert abs(float(stats.student_tail_logprobs.double() - exact)) < 1e-5
    ours = gradients(lambda h: linear_sparse_divergence(h, weight, ids, logprobs), hidden)
    expected = gradients(
        lambda h: reference.linear_sparse_divergence(h, weight.double(), ids, logprobs.double()),
        hidden.double(),
    )
    assert relative_error(ours[1], expected[1]) < 1e-5
