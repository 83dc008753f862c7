"""The operators: opcheck, gradcheck, full graphs, and their use through autograd."""

import pytest
import torch
from kernel_cases import (
    FORMS,
    HEAD,
    assert_close,
    gradients,
    make_case,
    relative_error,
    skip_bf16_stores_of_the_interpreter,
)
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from lopd_kernels import (
    linear_cross_entropy,
    linear_logprobs,
    linear_policy_gradient,
    linear_sparse_divergence,
    linear_topk,
    sparse_divergence,
)
from lopd_kernels._core.rules import (
    TAILS,
    DivergenceRule,
    RowLoss,
    UnbiasedRule,
    teacher_buckets,
)
from lopd_kernels._ops import logits as logits_ops
from lopd_kernels._ops import logprobs
from lopd_kernels._ops import losses as ops
from lopd_kernels._ops.schema import HeadArgs, LossArgs


def operator_args(rule):
    """(HeadArgs, LossArgs) whose parameters require grad."""
    case = make_case(rows=5, vocab=30, width=6, k=3)
    leaves = [x.requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    target = teacher_buckets(case.ids, case.logprobs, case.tail, 30).logprobs
    if isinstance(rule, UnbiasedRule):  # the last id of each list is the sampled one
        target = torch.cat([target, case.rollout_logprobs[:, None]], 1)
    loss = RowLoss(case.ids, target, torch.linspace(0.5, 2.0, 5), rule)
    return HeadArgs(*leaves, 1.3, 4.0, 0.7, True, True, True, None), LossArgs.of(loss)


def detached(head):
    return head._replace(
        hidden=head.hidden.detach(), weight=head.weight.detach(), bias=head.bias.detach()
    )


@pytest.mark.parametrize("tail", TAILS)
def test_opcheck_losses(tail):
    rule = UnbiasedRule(1.5) if tail == "unbiased" else DivergenceRule("jsd", tail)
    head, args = operator_args(rule)
    opcheck(ops.row_losses, (*head, *args, False))
    plain = detached(head)
    *_, unlisted, listed = ops.row_losses(*plain, *args, False)
    opcheck(ops.row_grads, (*plain, *args, unlisted, listed))
    into = plain._replace(need_weight=False)
    buffer = torch.zeros_like(plain.weight)
    opcheck(ops.row_grads_into_, (*into, *args, unlisted, listed, buffer))
    if tail == "renormalize":
        return
    frozen = head._replace(hidden=plain.hidden, bias=None, need_hidden=False, need_bias=False)
    for operator in (ops.fused_loss, ops.stored_loss):
        opcheck(operator, (*head, *args, True))
        opcheck(operator, (*frozen, *args, False))
    _, _, dlogits, scale = ops.stored_loss(*plain, *args, False)
    opcheck(ops.stored_grads, (*plain, args.ids, args.row_weights, dlogits, scale))


def test_opcheck_logprobs_topk_and_logits():
    head, args = operator_args(DivergenceRule("reverse_kl", "bucket"))
    opcheck(logprobs.logprobs, (*head, args.ids, True))
    opcheck(logprobs.logprobs, (*head._replace(bias=None, need_bias=False), args.ids, False))
    plain = detached(head)._replace(bias=None)
    with torch.no_grad():
        opcheck(logprobs.topk, (*plain, 3, args.ids, args.ids[:, :1]))
    logits = (plain.hidden @ plain.weight.t()).requires_grad_()
    for rule in (DivergenceRule("reverse_kl", "generalized"), UnbiasedRule()):
        _, args = operator_args(rule)
        opcheck(logits_ops.logits_losses, (logits, 0.7, *args, True))


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize(("divergence", "tail"), [form for form in FORMS if form[1] != "unbiased"])
def test_gradcheck_divergences(divergence, tail, reduction):
    case = make_case(rows=4, vocab=11, width=4, k=3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    options = dict(**case.form(divergence, tail), reduction=reduction, **HEAD)
    assert gradcheck(
        lambda h, w, b: linear_sparse_divergence(
            h, w, *case.teacher, bias=b, row_weights=weights, **options
        ),
        leaves,
    )
    logits = torch.randn(4, 11, dtype=torch.float64, requires_grad=True)
    options = dict(**case.form(divergence, tail), reduction=reduction, temperature=0.7)
    assert gradcheck(lambda z: sparse_divergence(z, *case.teacher, **options), (logits,))


def test_gradcheck_of_the_others():
    case = make_case(rows=4, vocab=17, width=5, k=3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    ids = case.ids[:, 0]
    repeated = torch.tensor([[1, 2, 1], [3, -1, 0], [5, 5, 5], [16, 0, 1]])
    advantages = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    assert gradcheck(lambda h, w, b: linear_cross_entropy(h, w, ids, bias=b, **HEAD), leaves)
    assert gradcheck(
        lambda h, w, b: linear_policy_gradient(
            h, w, ids, None, advantages=advantages, bias=b, reduction="none", **HEAD
        ),
        leaves,
    )

    def finite_logprobs(h, w, b):
        logprobs, entropy = linear_logprobs(h, w, repeated, return_entropy=True, bias=b, **HEAD)
        return logprobs.masked_fill(repeated < 0, 0.0), entropy

    assert gradcheck(finite_logprobs, leaves)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("tail", TAILS)
def test_full_graph(tail, reduction):
    case = make_case()
    form = case.form("reverse_kl", tail)

    def loss(h, w):
        total, stats = linear_sparse_divergence(
            h, w, *case.teacher, **form, reduction=reduction, return_stats=True
        )
        return total.sum() + stats.loss.sum() * 0.0

    graph = gradients(compiled(loss), case.hidden, case.weight)
    assert_close(
        graph, [x.double() for x in gradients(loss, case.hidden, case.weight)], torch.float32
    )


def test_full_graph_of_the_others():
    case = make_case()
    ids = case.ids[:, 0]

    def everything(h, w):
        scores = linear_topk(h, w, 3, extra_ids=case.ids, sampled_ids=ids)
        logprobs, entropy = linear_logprobs(h, w, ids.unsqueeze(1), return_entropy=True)
        policy = linear_policy_gradient(h, w, ids, scores.logprobs[:, 0], advantage_clip=1.0)
        logits = sparse_divergence(h @ w.t(), *case.teacher)
        return linear_cross_entropy(h, w, ids) + logprobs.sum() + entropy.sum() + policy + logits

    graph = gradients(compiled(everything), case.hidden, case.weight)
    eager = gradients(everything, case.hidden, case.weight)
    assert_close(graph, [x.double() for x in eager], torch.float32)


def test_full_graph_with_a_weight_grad_buffer():
    case = make_case()

    def run(function):
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        buffer = torch.zeros_like(case.weight)
        loss = function(hidden, weight, buffer)
        loss.backward()
        return loss.detach(), hidden.grad, buffer

    def loss(h, w, buffer):
        return linear_sparse_divergence(h, w, *case.teacher, weight_grad_buffer=buffer)

    graph, eager = run(compiled(loss)), run(loss)
    assert_close(graph, [x.double() for x in eager], torch.float32)


def test_one_full_graph_serves_different_options_and_sizes():
    case = make_case()
    torch._dynamo.reset()
    graph = torch.compile(
        linear_sparse_divergence, fullgraph=True, backend="aot_eager", dynamic=True
    )
    for rows, temperature in ((20, 1.0), (20, 0.9), (12, 0.7)):
        args = case.hidden[:rows], case.weight, case.ids[:rows], case.logprobs[:rows]
        options = {"temperature": temperature, "softcap": 5.0 + temperature}
        torch.testing.assert_close(
            graph(*args, **options), linear_sparse_divergence(*args, **options)
        )
    torch._dynamo.reset()
    graph = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for temperature in (1.0, 0.9, 0.8):
        args = case.hidden, case.weight, torch.arange(20)
        torch.testing.assert_close(
            graph(*args, temperature=temperature),
            linear_cross_entropy(*args, temperature=temperature),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tail", [*TAILS, "logprobs", "cross_entropy", "buffer"])
def test_autocast_leaves_tensors_of_one_dtype_unchanged(tail, dtype, default_device):
    case = make_case("near", dtype)
    buffer = torch.zeros(211, 24)

    def loss(h, w):
        if tail == "logprobs":
            return linear_logprobs(h, w, case.ids[:, :1], return_entropy=True)[1]
        if tail == "cross_entropy":
            return linear_cross_entropy(h, w, torch.arange(20), bias=case.bias)
        if tail == "buffer":
            options = {"weight_grad_buffer": buffer, "tail": "renormalize"}
            return linear_sparse_divergence(h, w, *case.teacher, **options) + 0.0 * w.sum()
        return linear_sparse_divergence(h, w, *case.teacher, **case.form("reverse_kl", tail))

    plain = gradients(loss, case.hidden, case.weight)
    added = buffer.clone()
    with torch.autocast(default_device, torch.bfloat16):
        cast = gradients(loss, case.hidden, case.weight)
        top = linear_topk(case.hidden, case.weight, 3)
    for actual, expected in zip(cast, plain, strict=True):
        assert torch.equal(actual, expected)
    assert relative_error(buffer, 2.0 * added) < 1e-6
    assert torch.equal(top.logprobs, linear_topk(case.hidden, case.weight, 3).logprobs)


def test_autocast_casts_tensors_of_different_dtypes(default_device):
    """Like F.linear: under autocast, hidden states are bf16 and a model's weight is fp32."""
    case = make_case("near")
    hidden, labels = case.hidden.bfloat16(), torch.arange(20)

    def loss(h, w):
        return linear_cross_entropy(h, w, labels) + linear_sparse_divergence(h, w, *case.teacher)

    with torch.autocast(default_device, torch.bfloat16):
        ours = gradients(loss, hidden, case.weight)
    expected = gradients(loss, hidden, case.weight.bfloat16())
    assert ours[2].dtype == torch.float32
    for a, b in zip(ours, expected, strict=True):
        assert relative_error(a, b) < 3e-3
    with pytest.raises(TypeError, match="cast one"):
        loss(hidden, case.weight)


def losses_of(case, **options):
    return {
        "fused": lambda h, w: linear_sparse_divergence(h, w, *case.teacher, **options),
        "rows": lambda h, w: linear_sparse_divergence(
            h, w, *case.teacher, reduction="none", **options
        ).sum(),
        "logprobs": lambda h, w: linear_logprobs(h, w, case.ids[:, :1]).sum(),
        "logits": lambda h, w: sparse_divergence(h @ w.t(), *case.teacher, **options),
    }


@pytest.mark.parametrize("name", ["fused", "rows", "logprobs", "logits"])
def test_a_second_derivative_raises(name):
    case = make_case()
    hidden = case.hidden.requires_grad_()
    loss = losses_of(case)[name](hidden, case.weight.requires_grad_())
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(loss**2, hidden, create_graph=True)


@pytest.mark.parametrize("name", ["fused", "rows", "logprobs", "logits"])
def test_a_retained_graph_and_an_existing_grad_add_up(name):
    case = make_case()
    loss_of = losses_of(case)[name]
    _, once, weight_once = gradients(loss_of, case.hidden, case.weight)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    hidden.grad = torch.ones_like(hidden)
    loss = loss_of(hidden, weight)
    loss.backward(retain_graph=True)
    (2.0 * loss).backward()
    torch.testing.assert_close(hidden.grad, 1.0 + 3.0 * once, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad, 3.0 * weight_once, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["fused", "rows", "logprobs", "logits"])
def test_activation_checkpointing_changes_no_gradient(name):
    """Its hooks refuse a second access to the saved tensors of an operator."""
    case = make_case()
    loss_of = losses_of(case)[name]
    plain = gradients(loss_of, case.hidden, case.weight)
    recomputed = gradients(
        lambda *leaves: checkpoint(loss_of, *leaves, use_reentrant=False), case.hidden, case.weight
    )
    for actual, expected in zip(recomputed, plain, strict=True):
        assert torch.equal(actual, expected)


def test_a_tied_weight_gets_both_gradients():
    case = make_case()
    ids = torch.arange(20)

    def tied(w):
        return linear_cross_entropy(w[ids], w, ids)

    def parts(h, w):
        return linear_cross_entropy(h, w, ids)

    _, tied_grad = gradients(tied, case.weight)
    _, dhidden, dweight = gradients(parts, case.weight[ids], case.weight)
    dweight[ids] += dhidden
    assert relative_error(tied_grad, dweight) < 1e-5


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_grad_buffer_receives_the_gradient_of_the_weight(dtype, tail, reduction):
    if tail == "renormalize":
        skip_bf16_stores_of_the_interpreter(dtype)
    case = make_case(dtype=dtype)
    form = case.form("reverse_kl", tail)
    options = dict(reduction=reduction, row_weights=torch.linspace(0.1, 1.0, 20))
    buffer = torch.zeros(211, 24)
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    bias = case.bias.clone().requires_grad_()
    loss = linear_sparse_divergence(
        hidden, weight, *case.teacher, bias=bias, weight_grad_buffer=buffer, **options, **form
    ).sum()
    assert (buffer == 0.0).all()
    (3.0 * loss).backward(retain_graph=True)
    wide = case.double()
    value, dhidden, dweight, dbias = gradients(
        lambda h, w, b: linear_sparse_divergence(
            h, w, *wide.teacher, bias=b, **options, **wide.form("reverse_kl", tail)
        ),
        wide.hidden,
        wide.weight,
        wide.bias,
        upstream=3.0,
    )
    bound = 1e-5 if dtype == torch.float32 else 3e-3
    assert weight.grad is None
    assert relative_error(buffer, dweight) < bound
    assert relative_error(hidden.grad, dhidden) < bound
    assert relative_error(bias.grad, dbias) < bound
    torch.testing.assert_close(loss.double(), value.sum(), rtol=1e-5, atol=1e-5)
    (3.0 * loss).backward()
    assert relative_error(buffer, 2.0 * dweight.double()) < bound


def test_memory_layouts_do_not_matter():
    case = make_case()
    strided = case.hidden.t().contiguous().t()
    column_major = case.weight.t().contiguous().t()

    def loss(h, w):
        return linear_sparse_divergence(h, w, *case.teacher)

    torch.testing.assert_close(loss(strided, column_major), loss(case.hidden, case.weight))
