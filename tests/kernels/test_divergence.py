"""The divergence losses: the dense fp64 definition, and properties they must have."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    FORMS,
    HEAD,
    assert_close,
    gradients,
    make_case,
    relative_error,
    skip_bf16_stores_of_the_interpreter,
)

from lopd_kernels import (
    linear_sparse_divergence,
    reference,
    sparse_divergence,
)
from lopd_kernels._core.rules import TAILS

OPTIONS = [
    dict(pairs)
    for size in (0, 1, 2)
    for pairs in itertools.combinations([*HEAD.items(), ("bias", True)], size)
]


def both(case, upstream=1.0, **kwargs):
    """(ours, oracle) of the sum, each (value, dH, dW) and, with bias=True, also db."""
    kwargs.setdefault("reduction", "sum")
    with_bias = kwargs.pop("bias", False)
    exact_case = case.double()
    sides = []
    functions = linear_sparse_divergence, reference.linear_sparse_divergence
    for function, side in zip(functions, (case, exact_case), strict=True):
        options = {
            k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point()
            and side is exact_case else v for k, v in kwargs.items()
        }  # fmt: skip
        parameters = [side.hidden, side.weight] + ([side.bias] if with_bias else [])

        def loss(hidden, weight, bias=None, function=function, side=side, options=options):
            return function(hidden, weight, *side.teacher, bias=bias, **options)

        sides.append(gradients(loss, *parameters, upstream=upstream))
    return sides


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("regime", ["far", "near"])
@pytest.mark.parametrize("size", [1.0, 1e-6])
@pytest.mark.parametrize(("divergence", "tail"), FORMS)
def test_accuracy_gate(divergence, tail, size, regime, dtype):
    if tail == "renormalize":
        skip_bf16_stores_of_the_interpreter(dtype)
    case = make_case(regime, dtype)
    weights = torch.full((len(case.hidden),), size)
    weights[::3] *= 0.5
    ours, exact = both(
        case, upstream=1.0 / size, **case.form(divergence, tail),
        row_weights=weights, reduction="none",
    )  # fmt: skip
    assert_close(ours, exact, dtype, size)
    ours, exact = both(
        case, upstream=1.0 / size, **case.form(divergence, tail),
        row_weights=weights, tail_logprobs=case.tail,
    )  # fmt: skip
    assert_close(ours, exact, dtype, size)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "none")
@pytest.mark.parametrize("tail", TAILS)
def test_head_options_pairwise(tail, options):
    case = make_case("near", **{k: v for k, v in options.items() if k != "bias"},
                     with_bias="bias" in options)  # fmt: skip
    for divergence in (d for d, t in FORMS if t == tail):
        ours, exact = both(case, **case.form(divergence, tail), **options)
        assert_close(ours, exact, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("divergence", "tail"), FORMS)
def test_sparse_divergence_equals_the_definition(divergence, tail, dtype):
    skip_bf16_stores_of_the_interpreter(dtype)
    case = make_case("near", temperature=0.7)
    logits = reference.linear_logits(case.hidden, case.weight).to(dtype)
    weights = torch.linspace(-1.0, 1.0, len(logits))
    options = dict(
        **case.form(divergence, tail), temperature=0.7, row_weights=weights, reduction="sum"
    )
    ours = gradients(lambda z: sparse_divergence(z, *case.teacher, **options), logits)
    exact = gradients(
        lambda z: reference.sparse_divergence(z, *case.double().teacher, **options),
        logits.double(),
    )
    assert_close(ours, exact, dtype)


def test_the_gate_leaves_room_for_the_rounding_of_the_result():
    """A few large entries, all of them rounded by nearly half a unit: 3.2e-3 of the norm."""
    exact = torch.full((6, 24), 1.0 + 0.49 * 2.0**-7, dtype=torch.float64)
    rounded = exact.to(torch.bfloat16)
    assert relative_error(rounded, exact) > 3.2e-3
    assert_close((torch.zeros(()), rounded), (torch.zeros(()), exact), torch.bfloat16)
    with pytest.raises(AssertionError):
        wrong = (exact * (1.0 + 2.0**-6)).to(torch.bfloat16)
        assert_close((torch.zeros(()), wrong), (torch.zeros(()), exact), torch.bfloat16)


MUTANTS = {
    "zeroed gradients": None,
    "swapped direction": {"divergence": "forward_kl"},
    "missing temperature": {"temperature": 1.0},
    "dropped tail": {"tail": "truncate"},
}


@pytest.mark.parametrize("regime", ["far", "near"])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_gate_catches_mutants(mutant, regime):
    case = make_case(regime, torch.bfloat16, temperature=0.7)
    correct, exact = both(case, temperature=0.7, reduction="none")
    assert_close(correct, exact, torch.bfloat16)
    if MUTANTS[mutant] is None:
        wrong = (correct[0], *(torch.zeros_like(grad) for grad in correct[1:]))
    else:
        options = {"temperature": 0.7, "reduction": "none", **MUTANTS[mutant]}
        wrong, _ = both(case, **options)
    with pytest.raises(AssertionError):
        assert_close((exact[0], *wrong[1:]), exact, torch.bfloat16)


def test_the_gate_catches_logits_rounded_to_16_bits():
    """Near the teacher, where training converges, this rounding costs several percent."""
    case = make_case("near", torch.bfloat16)
    correct, exact = both(case, reduction="none")
    assert_close(correct, exact, torch.bfloat16)

    def rounded(h, w):
        logits = (h.float() @ w.float().t()).bfloat16().float()
        return sparse_divergence(logits, *case.teacher, reduction="none")

    wrong = gradients(rounded, case.hidden, case.weight)
    for index in (1, 2):
        mixed = [exact[0], *correct[1:]]
        mixed[index] = wrong[index]
        with pytest.raises(AssertionError):
            assert_close(mixed, exact, torch.bfloat16)


@pytest.mark.parametrize(("divergence", "tail"), FORMS)
def test_which_forms_have_no_gradient_where_student_is_teacher(divergence, tail):
    case = make_case(dtype=torch.float64)
    teacher = reference.linear_logits(case.hidden, case.weight).log_softmax(1)
    logprobs, ids = teacher.topk(5, 1)
    form = case.form(divergence, tail)
    if tail == "unbiased":
        form["sampled_logprobs"] = teacher.gather(1, case.sampled_ids[:, None])[:, 0]
    value, *grads = gradients(
        lambda h, w: linear_sparse_divergence(h, w, ids, logprobs, **form),
        case.hidden,
        case.weight,
    )
    largest = max(float(grad.abs().max()) for grad in grads)
    assert abs(float(value)) < 1e-12
    assert (largest > 1e-4) == (tail == "truncate" and divergence != "jsd")
    assert largest > 1e-4 or largest < 1e-12


@pytest.mark.parametrize(("divergence", "tail"), FORMS)
def test_a_full_list_is_the_full_divergence(divergence, tail):
    case = make_case(vocab=37)
    full = torch.randn(20, 37).log_softmax(1)
    ids = torch.stack([torch.randperm(37) for _ in range(20)])

    def dense(hidden, weight):
        p = (hidden @ weight.t()).log_softmax(1)
        q = full.double()
        if divergence == "reverse_kl":
            return (p.exp() * (p - q)).sum()
        if divergence == "forward_kl":
            return (q.exp() * (q - p)).sum()
        m = (0.7 * p.exp() + 0.3 * q.exp()).log()
        return (0.7 * p.exp() * (p - m) + 0.3 * q.exp() * (q - m)).sum()

    ours = gradients(
        lambda h, w: linear_sparse_divergence(
            h, w, ids, full.gather(1, ids), **case.form(divergence, tail), reduction="sum"
        ),
        case.hidden,
        case.weight,
    )
    exact = gradients(dense, case.hidden.double(), case.weight.double())
    assert_close(ours, exact, torch.float32)


@given(st.integers(0, 10_000), st.sampled_from(FORMS))
@settings(max_examples=25, deadline=None)
def test_order_and_padding_of_the_list_do_not_matter(seed, form):
    divergence, tail = form
    case = make_case(seed=seed, rows=5, vocab=40, k=5, dtype=torch.float64)
    order = torch.stack([torch.randperm(8) for _ in range(5)])
    ids = torch.nn.functional.pad(case.ids, (0, 3), value=-1).gather(1, order)
    logprobs = torch.nn.functional.pad(case.logprobs, (0, 3), value=7.0).gather(1, order)

    def run(ids, logprobs):
        return gradients(
            lambda h, w: linear_sparse_divergence(
                h, w, ids, logprobs, **case.form(divergence, tail)
            ),
            case.hidden,
            case.weight,
        )

    assert_close(run(ids, logprobs), run(*case.teacher), torch.float64)


@given(st.lists(st.booleans(), min_size=6, max_size=6), st.sampled_from(FORMS))
@settings(max_examples=25, deadline=None)
def test_weight_zero_removes_a_row_whatever_it_holds(flags, form):
    divergence, tail = form
    case = make_case(rows=6, vocab=40, dtype=torch.float64)
    keep = torch.tensor(flags)
    hidden, ids, logprobs = case.hidden.clone(), case.ids.clone(), case.logprobs.clone()
    hidden[~keep], ids[~keep], logprobs[~keep] = math.nan, 10**6, math.nan
    form = case.form(divergence, tail)
    if tail == "unbiased":
        form["sampled_ids"] = form["sampled_ids"].masked_fill(~keep, -100)
        form["sampled_logprobs"] = form["sampled_logprobs"].masked_fill(~keep, math.nan)

    def all_rows(h, w):
        return linear_sparse_divergence(h, w, ids, logprobs, row_weights=keep.double(), **form)

    def selected_rows(h, w):
        options = case.form(divergence, tail, keep)
        return linear_sparse_divergence(h, w, ids[keep], logprobs[keep], **options)

    value, dhidden, dweight = gradients(all_rows, hidden, case.weight)
    expected = gradients(selected_rows, hidden[keep], case.weight)
    assert (dhidden[~keep] == 0.0).all()
    assert_close((value, dhidden[keep], dweight), expected, torch.float64)


def test_reductions():
    case = make_case()
    weights = torch.linspace(0.1, 2.0, 20)

    def run(reduction):
        return linear_sparse_divergence(
            case.hidden, case.weight, *case.teacher, row_weights=weights, reduction=reduction
        )

    assert run("none").shape == (20,)
    torch.testing.assert_close(run("sum"), run("none").sum())
    torch.testing.assert_close(run("mean"), run("none").sum() / weights.sum())
    zero, *slopes = gradients(
        lambda h, w: linear_sparse_divergence(
            h, w, *case.teacher, row_weights=torch.zeros(20), reduction="mean"
        ),
        case.hidden,
        case.weight,
    )
    assert zero == 0.0
    assert all((slope == 0.0).all() for slope in slopes)


def test_an_empty_row_and_an_empty_batch_add_nothing():
    case = make_case()
    hidden, ids = case.hidden.clone(), case.ids.clone()
    hidden[3], ids[3] = math.nan, -1
    for tail in TAILS:
        form, none = (case.form("reverse_kl", tail, rows) for rows in (slice(None), slice(0)))
        value, dhidden, dweight = gradients(
            lambda h, w, form=form: linear_sparse_divergence(
                h, w, ids, case.logprobs, tail_logprobs=case.tail, reduction="none", **form
            ),
            hidden,
            case.weight,
        )
        assert value[3] == 0.0
        assert (dhidden[3] == 0.0).all()
        assert dweight.isfinite().all()
        for reduction in ("sum", "mean", "none"):
            value, dhidden, dweight = gradients(
                lambda h, w, form=none, reduction=reduction: linear_sparse_divergence(
                    h, w, ids[:0], case.logprobs[:0], reduction=reduction, **form
                ),
                hidden[:0],
                case.weight,
            )
            assert value.sum() == 0.0
            assert dhidden.shape == (0, 24)
            assert (dweight == 0.0).all()


def test_stats():
    case = make_case("near", softcap=4.0)
    weights = torch.ones(20)
    weights[7] = 0.0
    loss, stats = linear_sparse_divergence(
        case.hidden, case.weight, *case.teacher, tail_logprobs=case.tail, softcap=4.0,
        row_weights=2.0 * weights, reduction="none", return_stats=True,
    )  # fmt: skip
    exact = case.double()
    logits = reference.linear_logits(exact.hidden, exact.weight, softcap=4.0)
    logprobs = logits.log_softmax(1)
    entropy = -(logprobs.exp() * logprobs).sum(1)
    torch.testing.assert_close(loss, 2.0 * stats.loss)
    torch.testing.assert_close(stats.student_lse.double(), logits.logsumexp(1) * weights)
    torch.testing.assert_close(stats.student_entropy.double(), entropy * weights, rtol=1e-5, atol=0)
    listed = torch.zeros(20, 212, dtype=torch.bool).scatter(1, case.ids % 212, True)[:, :211]
    tail = logprobs.masked_fill(listed, -math.inf).logsumexp(1) * weights
    torch.testing.assert_close(stats.student_tail_logprobs.double(), tail, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.teacher_tail_logprobs, case.tail * weights)
    assert stats.loss[7] == stats.student_entropy[7] == 0.0
    _, stats = linear_sparse_divergence(
        case.hidden, case.weight, *case.teacher, tail="renormalize", return_stats=True
    )
    assert stats.student_lse is None
