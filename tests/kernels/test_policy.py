"""Policy gradient and cross-entropy against the dense fp64 definition."""

import math

import pytest
import torch
from kernel_cases import HEAD, assert_close, gradients, make_case

from lopd_kernels import linear_cross_entropy, linear_policy_gradient, reference

FORMS = [
    {},
    {"advantage_clip": 0.5},
    {"importance": "token"},
    {"importance": "token_truncated", "importance_cap": 1.1},
    {"clip_range": 0.2},
]


def sampled(dtype, head):
    case = make_case("near", dtype, **head)
    ids = torch.randint(0, 211, (20,))
    logits = reference.linear_logits(case.hidden.double(), case.weight.double(), **head)
    logprobs = logits.log_softmax(1).gather(1, ids[:, None])[:, 0]
    teacher = logprobs + 0.7 * torch.randn(20).double()
    rollout = logprobs + 0.3 * torch.randn(20).double()
    return case, ids, teacher.float(), rollout.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_policy_gradient(form, explicit, dtype):
    if explicit and "advantage_clip" in form:
        pytest.skip("the clip belongs to derived advantages")
    case, ids, teacher, rollout = sampled(dtype, HEAD)
    options = {**form, **HEAD, "reduction": "none", "row_weights": torch.linspace(-1, 1, 20)}
    if "importance" in form or "clip_range" in form:
        options["rollout_logprobs"] = rollout
    advantages = torch.randn(20) if explicit else None
    ours = gradients(
        lambda h, w: linear_policy_gradient(h, w, ids, teacher, advantages=advantages, **options),
        case.hidden,
        case.weight,
    )
    exact = gradients(
        lambda h, w: reference.linear_policy_gradient(
            h, w, ids, teacher.double(), advantages=advantages, **options
        ),
        case.hidden.double(),
        case.weight.double(),
    )
    assert_close(ours, exact, dtype)


def test_on_stored_tokens_the_gradient_is_that_of_least_squares():
    case, ids, teacher, _ = sampled(torch.float64, {})

    def squares(h, w):
        logprobs = reference.linear_logprobs(h, w, ids[:, None])[:, 0]
        return 0.5 * (teacher - logprobs).square().sum()

    offline = gradients(
        lambda h, w: linear_policy_gradient(h, w, ids, teacher, reduction="sum"),
        case.hidden,
        case.weight,
    )
    online = gradients(squares, case.hidden, case.weight)
    assert_close((online[0], *offline[1:]), online, torch.float64)


def test_where_the_student_sampled_every_importance_gives_the_same_gradient():
    case, ids, teacher, _ = sampled(torch.float64, {})
    rollout = reference.linear_logprobs(case.hidden, case.weight, ids[:, None])[:, 0].detach()
    results = [
        gradients(
            lambda h, w, form=form: linear_policy_gradient(
                h, w, ids, teacher, rollout_logprobs=rollout, **form
            ),
            case.hidden,
            case.weight,
        )
        for form in FORMS
        if "advantage_clip" not in form
    ]
    for result in results[1:]:
        assert_close((results[0][0], *result[1:]), results[0], torch.float64)


def test_policy_stats():
    case, ids, teacher, rollout = sampled(torch.float32, {})
    weights = torch.ones(20)
    weights[4] = 0.0
    loss, stats = linear_policy_gradient(
        case.hidden, case.weight, ids, teacher, advantage_clip=0.5, rollout_logprobs=rollout,
        importance="token", row_weights=weights, reduction="none", return_stats=True,
    )  # fmt: skip
    logprobs, entropy = reference.linear_logprobs(
        case.hidden.double(), case.weight.double(), ids[:, None], return_entropy=True
    )
    logprobs = logprobs[:, 0]
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(stats.logprobs.double(), logprobs * weights, **close)
    advantages = (teacher - logprobs).clamp(-0.5, 0.5)
    torch.testing.assert_close(stats.advantages.double(), advantages * weights, **close)
    ratio = (logprobs - rollout).exp()
    torch.testing.assert_close(stats.importance.double(), ratio * weights, **close)
    torch.testing.assert_close(stats.student_entropy.double(), entropy * weights, **close)
    torch.testing.assert_close(loss, stats.loss)


def test_the_gradient_at_confident_tokens_is_precise():
    weight = torch.zeros(30, 1)
    weight[0] = 16.0
    hidden = torch.ones(1, 1)
    ids = torch.tensor([0])
    _, dhidden, _ = gradients(lambda h, w: linear_cross_entropy(h, w, ids), hidden, weight)
    rest = 29 * math.exp(-16.0)
    assert abs(float(dhidden) / (-16.0 * rest / (1.0 + rest)) - 1.0) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("head", [{}, HEAD], ids=["plain", "head"])
def test_cross_entropy(head, reduction, dtype):
    case = make_case(dtype=dtype)
    labels = torch.randint(0, 211, (20,))
    labels[::4] = -100
    for weights in (None, torch.linspace(0.1, 2.0, 20)):
        options = {**head, "reduction": reduction, "row_weights": weights}
        ours = gradients(
            lambda h, w, o=options: linear_cross_entropy(h, w, labels, **o),
            case.hidden, case.weight, upstream=8.0,
        )  # fmt: skip
        exact = gradients(
            lambda h, w, o=options: reference.linear_cross_entropy(h, w, labels, **o),
            case.hidden.double(), case.weight.double(), upstream=8.0,
        )  # fmt: skip
        assert_close(ours, exact, dtype)


def test_ignored_rows_may_hold_anything():
    case = make_case()
    hidden = case.hidden.clone()
    hidden[0] = math.nan
    labels = torch.randint(0, 211, (20,))
    labels[0] = 7
    value, dhidden, _ = gradients(
        lambda h, w: linear_cross_entropy(h, w, labels, ignore_index=7), hidden, case.weight
    )
    assert value.isfinite()
    assert (dhidden[0] == 0.0).all()


@pytest.mark.parametrize("rows", [20, 0])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_a_mean_over_nothing_is_zero_with_zero_gradients(reduction, rows):
    """Where torch's cross-entropy is NaN: a process without tokens can take part in a step."""
    case, ids = make_case(), torch.full((rows,), -100)
    hidden, teacher = case.hidden[:rows], torch.zeros(rows)
    for loss_of in (
        lambda h, w: linear_cross_entropy(h, w, ids, reduction=reduction),
        lambda h, w: linear_policy_gradient(h, w, ids, teacher, reduction=reduction),
    ):
        value, dhidden, dweight = gradients(loss_of, hidden, case.weight)
        assert value.sum() == 0.0
        assert (dhidden == 0.0).all() and (dweight == 0.0).all()


@pytest.mark.parametrize("bad", [-1, 211])
def test_an_unchecked_invalid_id_makes_only_its_row_nan(bad):
    case = make_case()
    ids = torch.zeros(20, dtype=torch.int64)
    ids[3] = bad
    options = {"validate": False, "reduction": "none"}
    for losses in (
        linear_cross_entropy(case.hidden, case.weight, ids, **options),
        linear_policy_gradient(case.hidden, case.weight, ids, torch.zeros(20), **options),
    ):
        assert losses.isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("options", [{}, {"clip_range": 0.2}], ids=str)
def test_nan_and_inf_in_a_row_make_only_that_row_nan(options, softcap):
    case, ids, teacher, rollout = sampled(torch.float32, {})
    hidden = case.hidden.clone()
    hidden[2, 0], hidden[5, 1] = math.inf, math.nan
    affected = torch.zeros(20, dtype=torch.bool).index_fill(0, torch.tensor([2, 5]), True)
    common = {"softcap": softcap, "reduction": "none"}
    for loss in (
        lambda h: linear_cross_entropy(h, case.weight, ids, **common),
        lambda h: linear_policy_gradient(
            h, case.weight, ids, teacher, rollout_logprobs=rollout, **options, **common
        ),
    ):
        value, dhidden = gradients(loss, hidden)
        assert torch.equal(value.isnan(), affected)
        assert dhidden[affected].isnan().all()
        assert dhidden[~affected].isfinite().all()
