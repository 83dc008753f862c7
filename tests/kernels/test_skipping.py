"""`dense_share` and `tolerance`: their expectation, their certificate, and what they refuse."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import FORMS, assert_close, gradients, make_case, relative_error
from kernel_memory import Allocations
from pairwise import label, pairwise
from torch.library import opcheck

from lopd_kernels import (
    _calls,
    linear_cross_entropy,
    linear_policy_gradient,
    linear_sparse_divergence,
)
from lopd_kernels._core import skipping, workspace
from lopd_kernels._core.rules import DivergenceRule, RowLoss, teacher_buckets
from lopd_kernels._core.types import Skip
from lopd_kernels._ops import losses as ops
from lopd_kernels._ops.schema import HeadArgs, LossArgs

N, V, D, K = 14, 40, 6, 4
SAMPLED = ("policy", "clipped policy", "cross-entropy")
LOSSES = [
    *(f"{divergence}:{tail}" for divergence, tail in FORMS if tail != "renormalize"),
    *SAMPLED,
]


def problem(dtype=torch.float64, **sizes):
    return make_case("near", dtype, **{"rows": N, "vocab": V, "width": D, "k": K, **sizes})


def loss_of(name: str, case, hidden, weight, **options):
    """A loss by name; `options` may hold a bias, weights and the settings under test."""
    if name == "cross-entropy":
        return linear_cross_entropy(hidden, weight, case.sampled_ids, **options)
    if name in SAMPLED:
        if name == "clipped policy":
            options |= {"clip_range": 0.2, "rollout_logprobs": case.rollout_logprobs}
        scores = case.sampled_logprobs
        return linear_policy_gradient(hidden, weight, case.sampled_ids, scores, **options)
    form = case.form(*name.split(":"))
    given = {"tail_logprobs": case.tail, **form, **options}
    return linear_sparse_divergence(hidden, weight, *case.teacher, **given)


def both_signs(n: int, dtype=torch.float64) -> torch.Tensor:
    return torch.linspace(-1.0, 2.0, n, dtype=dtype)


HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weighted": {"row_weights": both_signs(N), "reduction": "sum"},
    "capped": {"softcap": 4.0, "temperature": 0.7, "logit_scale": 1.3},
}


def use_panels(monkeypatch) -> None:
    """As with a small workspace: the gradient in the backward, by panels of the vocabulary."""
    monkeypatch.setattr(_calls, "in_forward", lambda *_: False)


def use_chunks_of(rows: int, monkeypatch) -> None:
    monkeypatch.setitem(workspace.CHUNK_BYTES, "cpu", rows * workspace.padded(V) * 8)
    monkeypatch.setattr(workspace, "FEWEST_ROWS", 1)


SCHEDULES = {
    "one chunk": lambda monkeypatch: None,
    "chunks": lambda monkeypatch: use_chunks_of(5, monkeypatch),
    "panels": use_panels,
}


def expectation(name: str, head: dict[str, Any], monkeypatch, share=0.3):
    """(exact gradients, their mean over every offset, their mean squared deviation in dH).

    A sample depends on one uniform offset only, and changes where a running sum of the
    probabilities passes it.
    """
    case = problem()
    chosen: list[skipping.Selection] = []
    offset = 0.0
    select = skipping.select

    def record(*args, **kwargs):
        chosen.append(select(*args, **kwargs))
        return chosen[-1]

    monkeypatch.setattr(skipping, "select", record)
    monkeypatch.setattr(skipping, "uniform", lambda *_: torch.tensor(offset, dtype=torch.float64))

    def draw(**settings):
        return gradients(
            lambda h, w, b: loss_of(name, case, h, w, bias=b, **head, **settings),
            case.hidden, case.weight, case.bias,
        )  # fmt: skip

    exact = draw()
    draw(dense_share=share, seed=0)
    reach = torch.cat([selection.probability.cumsum(0) for selection in chosen])
    edges = sorted({0.0, 1.0, *(float(x) % 1.0 for x in reach)})
    means, spread = [torch.zeros_like(x) for x in exact], 0.0
    for low, high in itertools.pairwise(edges):
        if high - low < 1e-9:
            continue
        offset = (low + high) / 2
        drawn = draw(dense_share=share, seed=0)
        means = [mean + (high - low) * x for mean, x in zip(means, drawn, strict=True)]
        spread += (high - low) * float((drawn[1] - exact[1]).square().sum())
    return exact, means, spread


PLACES = pairwise(name=LOSSES, head=list(HEADS), schedule=list(SCHEDULES))


@pytest.mark.parametrize("place", PLACES, ids=label)
def test_the_expectation_is_the_exact_gradient(place, monkeypatch):
    SCHEDULES[place["schedule"]](monkeypatch)
    exact, means, spread = expectation(place["name"], HEADS[place["head"]], monkeypatch)
    assert spread > 0.0
    for mean, x in zip(means, exact, strict=True):
        assert relative_error(mean, x) < 1e-8


def test_the_enumeration_finds_a_bias(monkeypatch):
    sample = skipping.sample

    def biased(*args):
        selection = sample(*args)
        return selection._replace(factor=torch.ones_like(selection.factor))

    monkeypatch.setattr(skipping, "sample", biased)
    exact, means, _ = expectation("reverse_kl:bucket", {}, monkeypatch)
    assert min(relative_error(m, x) for m, x in zip(means[1:], exact[1:], strict=True)) > 1e-2


def test_the_bound_holds_for_the_variance(monkeypatch):
    """With the identity as weight, dH is dL/dz."""
    case = problem(width=V)
    object.__setattr__(case, "weight", torch.eye(V, dtype=torch.float64))
    monkeypatch.setitem(globals(), "problem", lambda: case)
    *_, spread = expectation("reverse_kl:bucket", {}, monkeypatch)
    hidden = case.hidden.clone().requires_grad_()
    _, stats = loss_of(
        "reverse_kl:bucket", case, hidden, case.weight, bias=case.bias, dense_share=0.3, seed=0,
        return_stats=True,
    )  # fmt: skip
    assert 0.1 * stats.skipping.variance_bound < spread <= stats.skipping.variance_bound


SLOW = pytest.mark.slow
DRAWN = [n if n == "reverse_kl:bucket" else pytest.param(n, marks=SLOW) for n in LOSSES]


@pytest.mark.parametrize("name", DRAWN)
def test_the_mean_of_1000_draws_is_as_near_as_their_variance_says(name):
    case, draws = problem(), 1000

    def draw(**settings):
        return gradients(lambda h, w: loss_of(name, case, h, w, **settings), case.hidden,
                         case.weight)[1:]  # fmt: skip

    exact = draw()
    sums, squares = [torch.zeros_like(x) for x in exact], [0.0, 0.0]
    for seed in range(draws):
        for i, x in enumerate(draw(dense_share=0.3, seed=seed)):
            sums[i] += x
            squares[i] += float((x - exact[i]).square().sum())
    for total, square, x in zip(sums, squares, exact, strict=True):
        # the ratio is 1 on average, and 9 is three standard deviations of one number
        assert float((total / draws - x).square().sum()) < 9.0 * square / draws**2
        assert square > 0.0


def test_offsets_are_uniform_and_depend_on_seed_and_stream():
    seeds = torch.cat([torch.arange(500), torch.arange(500) + (1 << 40), torch.arange(24) << 33])
    offsets = torch.stack([skipping.uniform(seed, 0) for seed in seeds])
    assert len(offsets.unique()) > 1020 and (offsets > 0).all() and (offsets < 1).all()
    distance = (offsets.sort().values - torch.linspace(0, 1, 1024, dtype=torch.float64)).abs()
    assert distance.max() < 1.63 * 1024**-0.5  # Kolmogorov-Smirnov at 1 %
    streams = torch.stack([skipping.uniform(seeds[5], i) for i in range(1000)])
    assert len(streams.unique()) > 995
    pairs = torch.stack([offsets[:500] - 0.5, streams[:500] - 0.5])
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.15


@pytest.mark.parametrize("masses", ["random", "equal", "few", "zero", "one large", "nan"])
def test_samples(masses):
    torch.manual_seed(0)
    mass = torch.rand(50) ** 4
    if masses == "equal":
        mass = torch.ones(50)
    elif masses == "few":
        mass[3:] = 0.0
    elif masses == "zero":
        mass = torch.zeros(50)
    elif masses == "one large":
        mass[7] = 1e6
    elif masses == "nan":
        mass[7] = math.nan
    positive = int((mass != 0.0).sum())
    for count, offset in ((1, 0.3), (10, 0.999), (25, 1e-9), (50, 0.5)):
        rows, factor, probability, kept = skipping.sample(
            mass, count, torch.tensor(offset).double()
        )
        assert len(rows) == count and int(kept.sum()) == min(count, positive)
        assert float(probability.sum()) == pytest.approx(min(count, positive), rel=1e-5)
        used = factor > 0.0
        assert (rows[used].diff() > 0).all() and int(used.sum()) == min(count, positive)
        torch.testing.assert_close(factor[used], 1.0 / probability[rows[used]])
        assert kept[rows[used]].all()
        if masses in ("one large", "nan") and count > 1:
            assert kept[7] and probability[7] == 1.0


FORM_NAMES = ["reverse_kl:bucket", "forward_kl:bucket", "jsd:bucket", "reverse_kl:generalized",
              "reverse_kl:unbiased", "policy", "cross-entropy"]  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(
    name=st.sampled_from(FORM_NAMES),
    sharpness=st.sampled_from([0.0, 1.0, 6.0, 30.0]),
    weights=st.sampled_from(["ones", "signs", "one large", "zeros among them"]),
    softcap=st.sampled_from([None, 25.0]),
    tolerance=st.floats(1e-7, 0.99),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_the_certificate_holds(name, sharpness, weights, softcap, tolerance, seed, dtype):
    """With the identity as weight, dH is dL/dz, up to the slope of the soft cap."""
    case = make_case("near", dtype, rows=12, vocab=30, width=30, k=3, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(12, 1, generator=generator, dtype=torch.float64).square()
    hidden = (sharpness * spread * case.hidden.double()).to(dtype)
    w = torch.ones(12)
    if weights == "signs":
        w = torch.randn(12, generator=generator)
    elif weights == "one large":
        w[3] = 1e4
    elif weights == "zeros among them":
        w[::3] = 0.0
    options = {"softcap": softcap, "row_weights": w, "reduction": "sum"}

    def dlogits(**given):
        _, dhidden = gradients(
            lambda h: loss_of(name, case, h, torch.eye(30, dtype=dtype), **options, **given), hidden
        )
        slope = 1.0 if softcap is None else 1.0 - (hidden.double() / softcap).tanh().square()
        return dhidden.double() / slope

    exact, got = dlogits(), dlogits(tolerance=tolerance)
    missing = (exact - got).abs()
    rounding = 1e-12 if dtype == torch.float64 else 1e-5
    assert missing.sum() <= tolerance * got.abs().sum() + rounding * exact.abs().sum()
    is_partial = missing.sum(1) > rounding * exact.abs().sum()
    leaf = hidden.clone().requires_grad_()
    if name == "cross-entropy":
        return
    _, stats = loss_of(name, case, leaf, torch.eye(30, dtype=dtype), **options,
                       tolerance=tolerance, return_stats=True)  # fmt: skip
    found = stats.skipping
    slack = 2e-5 * float(exact.abs().sum()) if dtype == torch.float32 else 1e-9
    assert float(found.dropped_l1) == pytest.approx(float(missing.sum()), abs=slack, rel=1e-4)
    assert float(found.kept_l1) == pytest.approx(float(got.abs().sum()), abs=slack, rel=1e-4)
    assert found.dropped_l1 <= tolerance * found.kept_l1
    assert float(found.share) <= 1.0 - float(is_partial.double().mean()) + 1e-6


def test_a_tolerance_drops_the_smallest_rows():
    listed, unlisted = torch.full((5,), 2.0), torch.tensor([0.5, 0.1, 4.0, 0.2, 0.1])
    rows, factor, _, kept = skipping.certify(listed, unlisted, 0.0300)
    assert rows.tolist() == [0, 2] and factor.tolist() == [1.0, 1.0]  # 0.4 of 14.5 are dropped
    assert kept.tolist() == [True, False, True, False, False]
    assert skipping.certify(listed, unlisted, 0.0275).rows.tolist() == [0, 2, 3]
    unlisted[2] = math.nan
    assert len(skipping.certify(listed, unlisted, 0.5).rows) == 5


SETTINGS = [{"dense_share": 0.4, "seed": 3}, {"tolerance": 0.02}]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["reverse_kl:bucket", "jsd:truncate", "policy"])
def test_accuracy_gate(name, dtype, setting):
    case = problem(dtype, rows=40, vocab=211, width=24)
    options = {"softcap": 9.0, "row_weights": both_signs(40), "reduction": "sum", **setting}
    sides = [
        gradients(lambda h, w, b, s=s: loss_of(name, s, h, w, bias=b, **options),
                  s.hidden, s.weight, s.bias)
        for s in (case, case.double())
    ]  # fmt: skip
    assert_close(*sides, dtype)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_equal_seeds_give_equal_bits_and_panels_the_same_rows(setting, monkeypatch):
    case = problem(torch.float32, rows=33, vocab=300)

    def run(**changes):
        return gradients(
            lambda h, w: loss_of("reverse_kl:bucket", case, h, w, **{**setting, **changes}),
            case.hidden, case.weight,
        )  # fmt: skip

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    if "seed" in setting:
        tensor = run(seed=torch.tensor(3))
        assert all(torch.equal(a, b) for a, b in zip(first, tensor, strict=True))
        assert not torch.equal(first[1], run(seed=4)[1])
    use_panels(monkeypatch)
    for columns in (V, 64, 7):
        monkeypatch.setitem(workspace.PANEL_BYTES, "cpu", columns * 33 * 4)
        for a, b in zip(run(), first, strict=True):
            assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("setting", [{"dense_share": 1.0, "seed": 0}, {"tolerance": 0.0}], ids=str)
def test_all_rows_are_the_exact_gradient_bit_for_bit(setting):
    case = problem(torch.float32)
    for name in ("reverse_kl:bucket", "policy", "cross-entropy"):
        sides = [
            gradients(lambda h, w, s=s, n=name: loss_of(n, case, h, w, **s), case.hidden,
                      case.weight)
            for s in ({}, setting)
        ]  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(*sides, strict=True))
    _, stats = loss_of("policy", case, case.hidden, case.weight, return_stats=True, **setting)
    assert stats.skipping is None


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("frozen", ["hidden", "weight", "buffer", "none"])
def test_each_gradient_alone(frozen, setting):
    case = problem(torch.float32)
    whole = gradients(
        lambda h, w: loss_of("reverse_kl:bucket", case, h, w, **setting), case.hidden, case.weight
    )
    hidden = case.hidden.clone().requires_grad_(frozen != "hidden")
    weight = case.weight.clone().requires_grad_(frozen != "weight")
    buffer = torch.ones_like(weight) if frozen == "buffer" else None
    value = loss_of("reverse_kl:bucket", case, hidden, weight, weight_grad_buffer=buffer, **setting)
    value.backward()
    dweight = weight.grad if buffer is None else buffer.detach() - 1.0
    if frozen != "hidden":
        assert relative_error(hidden.grad, whole[1]) < 1e-6
    if frozen != "weight":
        assert relative_error(dweight, whole[2]) < (1e-5 if buffer is None else 1e-4)
    assert (weight.grad is None) == (frozen in ("weight", "buffer"))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_full_graph(setting):
    case = problem(torch.float32)

    def loss(h, w):
        total, stats = loss_of("reverse_kl:bucket", case, h, w, return_stats=True, **setting)
        return total + stats.skipping.share * 0.0

    torch._dynamo.reset()
    graph = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, plain = (gradients(f, case.hidden, case.weight) for f in (graph, loss))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("skip", [Skip(0.5, 0.0, torch.tensor(7)), Skip(None, 0.05, None)])
def test_opcheck(skip):
    case = problem(torch.float32, rows=5)
    leaves = [x.requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    target = teacher_buckets(case.ids, case.logprobs, case.tail, V).logprobs
    rule = DivergenceRule("reverse_kl", "bucket")
    args = LossArgs.of(RowLoss(case.ids, target, torch.linspace(0.5, 2.0, 5), rule, skip))
    head = HeadArgs(*leaves, 1.3, 4.0, 0.7, True, True, True, None)
    opcheck(ops.row_losses, (*head, *args, False))
    opcheck(ops.fused_loss, (*head, *args, True))
    plain = HeadArgs(*(x.detach() for x in head[:3]), *head[3:])
    *_, unlisted, listed = ops.row_losses(*plain, *args, False)
    opcheck(ops.row_grads, (*plain, *args, unlisted, listed))
    into, buffer = plain._replace(need_weight=False), torch.zeros_like(plain.weight)
    opcheck(ops.row_grads_into_, (*into, *args, unlisted, listed, buffer))


def test_only_the_kept_rows_pass_through_the_gradient_gemms(monkeypatch):
    case = problem(torch.float32, rows=100, vocab=300)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()

    def gemms():
        with Allocations() as seen:
            loss_of("reverse_kl:bucket", case, hidden, weight, dense_share=0.2, seed=0).backward()
        return seen.gemms

    assert gemms() == [(100, 300), (20, D), (300, D)]
    use_panels(monkeypatch)
    assert gemms() == [(100, 300), (20, 300), (300, D), (20, D)]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_small_buffer_is_emptied_often(setting, monkeypatch):
    case = problem(torch.float32, rows=60)
    use_chunks_of(17, monkeypatch)

    def run():
        return gradients(
            lambda h, w, b: loss_of("reverse_kl:bucket", case, h, w, bias=b, **setting),
            case.hidden, case.weight, case.bias,
        )  # fmt: skip

    whole = run()
    for places in (1, 5, 100):
        monkeypatch.setattr(workspace.Sizes, "places", lambda *_, places=places: places)
        assert_close(run(), [x.double() for x in whole], torch.float32)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_rows_without_weight_or_list_and_rows_with_nan(setting):
    case = problem(torch.float32)
    weights = torch.ones(N)
    weights[2], case.ids[5] = 0.0, -1
    case.hidden[2] = math.nan

    def run(case, rows=slice(None)):
        return gradients(
            lambda h, w: loss_of("reverse_kl:bucket", case, h, w, row_weights=weights,
                                 **setting), case.hidden, case.weight,
        )  # fmt: skip

    value, dhidden, dweight = run(case)
    assert value.isfinite() and dweight.isfinite().all()
    assert (dhidden[[2, 5]] == 0.0).all() and (dhidden[0] != 0.0).any()
    case.hidden[7] = math.nan
    value, dhidden, dweight = run(case)
    assert value.isnan() and dhidden[7].isnan().all() and dweight.isnan().all()


def test_no_rows_and_no_weight():
    case = problem(torch.float32)
    for setting in SETTINGS:
        hidden = case.hidden[:0].clone().requires_grad_()
        ids, logprobs = case.ids[:0], case.logprobs[:0]
        loss, stats = linear_sparse_divergence(
            hidden, case.weight, ids, logprobs, return_stats=True, **setting
        )
        loss.backward()
        assert loss == 0.0 and hidden.grad.shape == (0, D) and stats.skipping.share == 0.0
        hidden = case.hidden.clone().requires_grad_()
        loss_of(
            "policy", case, hidden, case.weight, row_weights=torch.zeros(N), **setting
        ).backward()
        assert (hidden.grad == 0.0).all()
