"""The Triton kernels, interpreted on a CPU and compiled on a GPU.

Every kernel is compared with the torch implementation in fp64, which the other tests compare with
the definition. On a CPU the process needs TRITON_INTERPRET=1, which `make test` sets. The
interpreter rounds bf16 wrongly, so bf16 is left out there, and it does not reproduce races.
"""

import math
import os

import pytest
import torch
from kernel_cases import (
    EMULATED,
    FORMS,
    INTERPRETED,
    assert_close,
    gradients,
    make_case,
    relative_error,
)
from pairwise import label, pairwise
from row_cases import (
    HEADS,
    REVERSE_KL,
    RULES,
    make_head,
    make_target,
    oracle_pass,
    padded_rows,
    ragged_ids,
)

from lopd_kernels import (
    linear_cross_entropy,
    linear_logprobs,
    linear_policy_gradient,
    linear_sparse_divergence,
    linear_topk,
    sparse_divergence,
)
from lopd_kernels._core.buckets import student_buckets
from lopd_kernels._core.listed_ids import sort_entries
from lopd_kernels._core.rules import (
    DIVERGENCES,
    DivergenceRule,
    UnbiasedRule,
)
from lopd_kernels._core.types import LogitGrads, LogitOptions, RowState, SplitGrads
from lopd_kernels._torch import listed as torch_listed
from lopd_kernels._torch import rows as torch_rows

needs_interpreter = pytest.mark.skipif(
    not (INTERPRETED or EMULATED), reason="runs with TRITON_INTERPRET=1 or on a GPU: make test"
)
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=needs_interpreter),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def device(request):
    torch.manual_seed(0)
    with torch.device(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _emulated_kernels(request, monkeypatch):
    """With LOPD_PTX=80, 90 or 100 the compiled PTX is executed, see `tests/ptx`.

    With LOPD_PTX_ONE_PASS=1 as well, several programs share a row wherever they can.
    """
    if EMULATED:
        from ptx_launch import emulate, read_logits_once

        if os.environ.get("LOPD_PTX_ONE_PASS") == "1":
            read_logits_once(monkeypatch, columns=128, multiprocessors=4)
        schedule = os.environ.get("LOPD_PTX_SCHEDULE", "block")
        races = request.node.get_closest_marker("deliberate_race") is None
        emulate(monkeypatch, int(EMULATED), schedule=schedule, races=races)


@pytest.fixture
def triton_rows(device):
    from lopd_kernels._triton import rows as triton_rows

    return triton_rows


PAIRS = pairwise(
    rule=list(RULES),
    head=list(HEADS),
    vocab=[33, 211, 1000],
    k=[1, 2, 8, 64, 300],
    weights=["ones", "mixed", "tiny"],
    ids=[torch.int64, torch.int32],
)


@pytest.mark.parametrize("case", PAIRS, ids=label)
def test_the_row_kernel(case, triton_rows):
    vocab, rule = case["vocab"], RULES[case["rule"]]
    k = case["k"] if isinstance(rule, DivergenceRule | UnbiasedRule) else 1
    rows = 5
    u, ids = padded_rows(rows, vocab), ragged_ids(rows, vocab, min(k, vocab))
    weights = torch.ones(rows)
    if case["weights"] == "mixed":
        weights, ids[3] = torch.tensor([0.5, -2.0, 0.0, 1.0, 3.0]), -1
    elif case["weights"] == "tiny":
        weights = weights * 1e-6
    head = make_head(case["head"], vocab)
    target = make_target(rule, ids, u)
    stats, exact = oracle_pass(u, ids, target, weights, rule, head)
    listed_ids = triton_rows.locate(ids.to(case["ids"]), weights, vocab)
    ours = torch.zeros(rows, 4 + len(rule.extras))
    triton_rows.row_pass(u, listed_ids, target, weights, rule, head, True, ours, u)
    inactive = (weights == 0.0) | (ids == -1).all(1)
    assert (u[inactive] == 0.0).all()
    assert relative_error(u, exact) < 1e-5
    error = (ours.double() - stats).abs()
    assert (error <= 1e-5 * (1.0 + stats.abs()))[stats.isfinite()].all()


@pytest.mark.parametrize("case", PAIRS[::4], ids=label)
def test_rows_split_into_list_and_rest(case, triton_rows):
    """Put together again they are the gradient of `row_pass`, for any rows in any order."""
    vocab, rule, rows = case["vocab"], RULES[case["rule"]], 5
    k = min(case["k"], vocab) if isinstance(rule, DivergenceRule | UnbiasedRule) else 1
    u, ids = padded_rows(rows, vocab), ragged_ids(rows, vocab, k)
    ids[3] = -1
    head, weights = make_head(case["head"], vocab), torch.tensor([0.5, -2.0, 0.0, 1.0, 3.0])
    target = make_target(rule, ids, u)
    _, exact = oracle_pass(u, ids, target, weights, rule, head)
    listed_ids = triton_rows.locate(ids.to(case["ids"]), weights, vocab)
    whole, stats = u.clone(), torch.zeros(2, rows, 4 + len(rule.extras))
    triton_rows.row_pass(whole, listed_ids, target, weights, rule, head, True, stats[0], whole)
    split = SplitGrads.zeros(u, rows, k, torch.float32)
    triton_rows.row_pass(
        u, listed_ids, target, weights, rule, head, True, stats[1], None, split=split
    )
    torch.testing.assert_close(stats[0], stats[1], rtol=1e-5, atol=1e-6)
    picked = torch.tensor([4, 0, 1, 1])
    out = padded_rows(4, vocab)
    factor = 2.0 * split.factor[picked]
    triton_rows.write_unlisted(u, picked, split.unlisted_max[picked], factor, head, out)
    at = ids[picked]
    listed = torch.zeros(4, vocab + 1).scatter_(1, at % (vocab + 1), split.listed[picked])
    assert relative_error(out + 2.0 * listed[:, :-1], 2.0 * whole[picked]) < 1e-6
    if head.softcap is None:
        total = (split.listed_l1 + split.unlisted_l1).double()
        torch.testing.assert_close(total, exact.abs().sum(1), rtol=1e-4, atol=1e-5)
        at_list = exact.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, 0.0).abs().sum(1)
        torch.testing.assert_close(split.listed_l1.double(), at_list, rtol=1e-4, atol=1e-5)
    assert (split.unlisted[[2, 3]] == 0.0).all() and (split.listed[[2, 3]] == 0.0).all()


@pytest.mark.parametrize("block", [128, 256])
@pytest.mark.parametrize("list_block", [16, 64])
def test_rows_and_lists_in_many_blocks(block, list_block, triton_rows, monkeypatch):
    options = {"BLOCK": block, "KBLOCK": list_block, "num_warps": 4}
    monkeypatch.setattr(triton_rows, "launch", lambda *_: options)
    u, ids = padded_rows(4, 700), ragged_ids(4, 700, 130)
    head, weights = LogitOptions(), torch.ones(4)
    target = make_target(REVERSE_KL, ids, u)
    stats, exact = oracle_pass(u, ids, target, weights, REVERSE_KL, head)
    ours = torch.zeros(4, 4)
    listed_ids = triton_rows.locate(ids, None, 700)
    triton_rows.row_pass(u, listed_ids, target, weights, REVERSE_KL, head, True, ours, u)
    assert relative_error(u, exact) < 1e-5
    torch.testing.assert_close(ours.double(), stats, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab", [33, 4100])
def test_16_bit_gradients_may_use_the_first_half_of_their_row(vocab, triton_rows):
    u, ids = padded_rows(3, vocab), ragged_ids(3, vocab, 8)
    rule, head = DivergenceRule("forward_kl", "bucket"), make_head("capped", vocab)
    weights = torch.full((3,), 256.0)  # avoids subnormal entries
    target = make_target(rule, ids, u)
    _, exact = oracle_pass(u, ids, target, weights, rule, head)
    apart, stats = torch.empty(3, vocab, dtype=torch.float16), torch.zeros(3, 4)
    listed_ids = triton_rows.locate(ids, None, vocab)
    triton_rows.row_pass(u.clone(), listed_ids, target, weights, rule, head, True, stats, apart)
    inside = u.view(torch.float16)[:, :vocab]
    triton_rows.row_pass(u, listed_ids, target, weights, rule, head, True, stats, inside)
    assert torch.equal(inside, apart)
    assert relative_error(inside, exact) < 1e-3


@pytest.mark.parametrize("columns", [7, 100, 211])
@pytest.mark.parametrize("name", HEADS)
def test_reduce_and_write_by_panels(name, columns, triton_rows):
    rows, vocab = 5, 211
    u, ids = padded_rows(rows, vocab), ragged_ids(rows, vocab, 12)
    ids[3] = -1
    head = make_head(name, vocab)
    wide = LogitOptions(head.logit_scale, head.softcap, head.temperature,
                None if head.bias is None else head.bias.double())  # fmt: skip
    grads = LogitGrads(torch.randn(rows), torch.randn(rows), torch.randn(rows),
                          torch.randn(rows, 12))  # fmt: skip
    sides = []
    for functions, dtype, used in ((triton_rows, torch.float32, head),
                                   (torch_rows, torch.float64, wide)):  # fmt: skip
        listed_ids = functions.locate(ids, None, vocab)
        state = RowState.start(u, rows, 12, dtype)
        out = torch.empty(rows, vocab, dtype=dtype)
        grads = LogitGrads(*(x.to(dtype) for x in grads))
        for first in range(0, vocab, columns):
            panel = u[:, first : first + columns].to(dtype, copy=True)
            functions.reduce(panel, first, listed_ids, used, True, state)
        for first in range(0, vocab, columns):
            panel = u[:, first : first + columns].to(dtype, copy=True)
            functions.write(panel, first, listed_ids, used, grads, state.listed,
                            out[:, first : first + columns])  # fmt: skip
        sides.append((student_buckets(state), out, listed_ids.active))
    (ours, ours_out, active), (exact, exact_out, _) = sides
    for field, expected in zip(ours, exact, strict=True):
        field, expected = field[active].double(), expected[active]
        torch.testing.assert_close(field, expected, rtol=1e-5, atol=1e-5)
    assert (ours_out[~active] == 0.0).all()
    assert relative_error(ours_out, exact_out) < 1e-5


@pytest.mark.parametrize(
    "bad",
    [
        # threads store their positions in one place, and all but one read another's back
        pytest.param("repeated", marks=pytest.mark.deliberate_race),
        pytest.param("repeated far away", marks=pytest.mark.deliberate_race),
        "below",
        "beyond",
        "inf",
        "-inf",
        "nan",
    ],
)
@pytest.mark.parametrize("columns", [64, 211])
def test_an_invalid_id_or_logit_makes_only_its_row_nan(columns, bad, triton_rows):
    vocab = 211
    u, ids = padded_rows(4, vocab), torch.rand(4, vocab).topk(20, 1).indices
    if bad.startswith("repeated"):
        ids[2, 17] = ids[2, 16 if bad == "repeated" else 1]
    elif bad in ("below", "beyond"):
        ids[2, 5] = {"below": -2, "beyond": vocab}[bad]
    else:
        u[2, 40] = float(bad)
    head, listed_ids = LogitOptions(), triton_rows.locate(ids, None, vocab)
    state = RowState.start(u, 4, 20, torch.float32)
    for first in range(0, vocab, columns):
        panel = u[:, first : first + columns].clone()
        triton_rows.reduce(panel, first, listed_ids, head, True, state)
    affected = [False, False, True, False]
    assert student_buckets(state).logprobs.isnan().any(1).tolist() == affected
    stats, target = torch.zeros(4, 4), make_target(REVERSE_KL, ids.clamp(0, 210), u)
    triton_rows.row_pass(u, listed_ids, target, torch.ones(4), REVERSE_KL, head, True, stats, u)
    assert stats[:, 0].isnan().tolist() == affected
    assert u[2].isnan().all() and u[[0, 1, 3]].isfinite().all()


def test_minus_infinity_in_logits_masks_an_id(device):
    case = make_case()
    logits = case.hidden @ case.weight.t()
    logits[:, 100:] = -math.inf
    ids = torch.rand(20, 100).topk(4, 1).indices
    logprobs = torch.full((20, 4), math.log(0.2))
    ours = gradients(lambda z: sparse_divergence(z, ids, logprobs), logits)
    cut = gradients(lambda z: sparse_divergence(z, ids, logprobs), logits[:, :100].double())
    torch.testing.assert_close(ours[0].double(), cut[0], rtol=1e-5, atol=1e-5)
    assert relative_error(ours[1][:, :100], cut[1]) < 1e-5
    assert (ours[1][:, 100:] == 0.0).all()
    logits[3:5] = -math.inf
    weights = torch.ones(20).index_fill(0, torch.tensor([4]), 0.0)
    loss, grad = gradients(
        lambda z: sparse_divergence(z, ids, logprobs, row_weights=weights, reduction="none"), logits
    )
    assert loss.isnan().nonzero().tolist() == [[3]]
    assert grad.isnan().any(1).nonzero().tolist() == [[3]]


LISTED = pairwise(rows=[1, 7], width=[24, 300], k=[1, 5, 40], vocab=[50, 211], unused=[False, True])


@pytest.mark.parametrize("case", LISTED, ids=label)
def test_products_with_listed_rows(case, device):
    from lopd_kernels._triton import listed as triton_listed

    n, d, k, v = case["rows"], case["width"], case["k"], case["vocab"]
    hidden, weight = torch.randn(n, d), torch.randn(v, d)
    ids, grad = torch.randint(0, min(v, 20), (n, k)), torch.randn(n, k)
    if case["unused"]:
        grad[0] = 0.0
        hidden[0] = math.nan
    wide = [x.double() for x in (hidden, weight, grad)]
    u = triton_listed.dots(hidden, weight, ids, 1)
    exact = torch_listed.dots(wide[0], wide[1], ids, 3)
    used = slice(1 if case["unused"] else 0, None)
    assert (n == 1 and case["unused"]) or relative_error(u[used], exact[used]) < 1e-6
    dhidden = triton_listed.hidden_grad(grad, weight, ids, 1, torch.float32)
    exact = torch_listed.hidden_grad(wide[2], wide[1], ids, 3, torch.float64)
    assert relative_error(dhidden, exact) < 1e-6
    entries, wide_entries = sort_entries(grad, ids, v), sort_entries(wide[2], ids, v)
    for add, first in ((False, 0), (True, 0), (True, 9)):
        out, expected = torch.ones(v - first, d), torch.ones(v - first, d, dtype=torch.float64)
        triton_listed.weight_grad(entries, hidden, 1, first, out, add)
        torch_listed.weight_grad(wide_entries, wide[0], 3, first, expected, add)
        assert relative_error(out, expected) < 1e-6


PUBLIC = {
    **{
        f"{divergence}:{tail}": lambda h, w, case, d=divergence, t=tail, **options: (
            linear_sparse_divergence(h, w, *case.teacher, **case.form(d, t), **options)
        )
        for divergence, tail in FORMS
    },
    "policy_gradient": lambda h, w, case, **options: linear_policy_gradient(
        h, w, case.ids[:, 0], case.logprobs[:, 0], advantage_clip=1.0, **options
    ),
    "cross_entropy": lambda h, w, case, **options: linear_cross_entropy(
        h, w, case.ids[:, 0], **options
    ),
    "logprobs": lambda h, w, case, reduction, **options: sum(
        x.masked_fill(x == -math.inf, 0.0).sum()
        for x in linear_logprobs(h, w, case.ids, return_entropy=True, **options)
    ),
}
CALLS = pairwise(
    loss=list(PUBLIC),
    reduction=["sum", "none"],
    head=[{}, {"softcap": 4.0, "temperature": 0.7}, {"logit_scale": 1.3}],
    dtype=[torch.float32, torch.float16],
    regime=["far", "near"],
)


@pytest.mark.parametrize("call", CALLS, ids=label)
def test_public_functions_reach_the_kernels_and_pass_the_gate(call, device, monkeypatch):
    case = make_case(call["regime"], call["dtype"], rows=6, vocab=67, k=4, **call["head"])
    loss = PUBLIC[call["loss"]]
    options = {"reduction": call["reduction"], **call["head"]}
    launched = spy_on_launches(monkeypatch)
    ours = gradients(lambda h, w: loss(h, w, case, **options), case.hidden, case.weight)
    assert launched
    launched.clear()
    wide = case.double()
    exact = gradients(lambda h, w: loss(h, w, wide, **options), wide.hidden, wide.weight)
    assert not launched
    assert_close(ours, exact, call["dtype"])


def spy_on_launches(monkeypatch):
    from lopd_kernels._triton import listed as triton_listed
    from lopd_kernels._triton import rows as triton_rows

    launched = []
    for module in (triton_rows, triton_listed):
        context = module.on_device

        def recorded(device, context=context):
            launched.append(device)
            return context(device)

        monkeypatch.setattr(module, "on_device", recorded)
    return launched


@pytest.mark.parametrize("bias", [False, True])
def test_topk(bias, device):
    case = make_case(rows=6, vocab=67, k=4)
    options = dict(softcap=9.0, temperature=0.8, sampled_ids=case.ids[:, 0])
    ours = linear_topk(case.hidden, case.weight, 5, extra_ids=case.ids,
                       bias=case.bias if bias else None, **options)  # fmt: skip
    wide = case.double()
    exact = linear_topk(wide.hidden, wide.weight, 5, extra_ids=case.ids,
                        bias=wide.bias if bias else None, **options)  # fmt: skip
    assert torch.equal(ours.ids, exact.ids)
    for actual, expected in zip(ours[1:], exact[1:], strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_small_tails_are_precise(triton_rows):
    """At a student tail of e^-30, a difference from one would have no digits left."""
    u = torch.zeros(1, 48)
    u[0, 0] = 30.0
    ids, target = torch.tensor([[0]]), torch.tensor([[math.log(0.5), math.log(0.5)]])
    stats, listed_ids = torch.zeros(1, 4), triton_rows.locate(ids, None, 48)
    exact, grad = oracle_pass(u, ids, target, torch.ones(1), REVERSE_KL, LogitOptions())
    triton_rows.row_pass(
        u, listed_ids, target, torch.ones(1), REVERSE_KL, LogitOptions(), True, stats, u
    )
    assert abs(float(stats[0, 2]) - float(exact[0, 2])) < 1e-5
    assert relative_error(u, grad) < 1e-5


def test_an_offset_of_all_logits_costs_no_precision(triton_rows):
    ids = torch.arange(4).repeat(3, 1)
    plain = torch.randn(3, 96).mul(64).round().div(64)
    rule = DivergenceRule("jsd", "bucket", 0.3)
    target = make_target(rule, ids, plain)
    listed_ids, weights = triton_rows.locate(ids, None, 96), torch.ones(3)
    grads = []
    for offset in (0.0, 1e4, -1e4):
        u, stats = plain + offset, torch.zeros(3, 4)
        triton_rows.row_pass(u, listed_ids, target, weights, rule, LogitOptions(), True, stats, u)
        grads.append((u, stats[:, 0]))
    for u, loss in grads[1:]:
        torch.testing.assert_close(u, grads[0][0], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(loss, grads[0][1], rtol=1e-5, atol=1e-7)


def test_the_tables_of_divergences_agree(device):
    """The tables in torch and in Triton have the same divergences with the same constants."""
    from lopd_kernels._triton.kernels import rules

    assert set(rules.DIVERGENCES) == set(rules.SHIFTS) == set(DIVERGENCES)
    assert all(DIVERGENCES[name].shift == shift for name, shift in rules.SHIFTS.items())
