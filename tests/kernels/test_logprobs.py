"""linear_logprobs and linear_topk against the dense fp64 definition."""

import math

import pytest
import torch
from kernel_cases import GATES, HEAD, gradients, make_case, relative_error

from lopd_kernels import linear_logprobs, linear_topk, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", [{}, HEAD], ids=["plain", "head"])
def test_logprobs_and_entropy(head, dtype):
    case = make_case(dtype=dtype)
    ids = torch.randint(0, 211, (20, 4))
    ids[:, 3] = ids[:, 0]
    pull = torch.randn(20, 4)

    def loss(function):
        def run(h, w):
            logprobs, entropy = function(h, w, ids, return_entropy=True, **head)
            return (pull * logprobs).sum(1) + 2.0 * entropy

        return run

    ours = gradients(loss(linear_logprobs), case.hidden, case.weight)
    exact = gradients(loss(reference.linear_logprobs), case.hidden.double(), case.weight.double())
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=2e-5)
    bound = GATES.get(dtype, 3e-3)
    for found, right in zip(ours[1:], exact[1:], strict=True):
        assert relative_error(found, right) < bound


def test_pads_give_minus_infinity_and_no_gradient():
    case = make_case()
    ids = torch.tensor([[3, -1]]).repeat(20, 1)
    found = linear_logprobs(case.hidden, case.weight, ids)
    assert (found[:, 1] == -math.inf).all()
    padded = gradients(lambda h: linear_logprobs(h, case.weight, ids)[:, 0], case.hidden)
    plain = gradients(lambda h: linear_logprobs(h, case.weight, ids[:, :1])[:, 0], case.hidden)
    torch.testing.assert_close(padded[1], plain[1])
    whole = gradients(lambda h: linear_logprobs(h, case.weight, ids).sum(1), case.hidden)
    torch.testing.assert_close(whole[1], plain[1])


@pytest.mark.parametrize("bad", [-2, 211])
def test_an_unchecked_bad_id_makes_its_row_nan_and_no_other(bad):
    case = make_case()
    ids = torch.tensor([[3, 5, -1, 5]]).repeat(20, 1)
    ids[4, 1] = bad
    others = torch.arange(20) != 4

    def both(h):
        return linear_logprobs(h, case.weight, ids, return_entropy=True, validate=False)

    logprobs, entropy = both(case.hidden)
    assert logprobs[4].isnan().all()
    assert entropy[4].isnan()
    assert entropy[others].isfinite().all()
    assert not logprobs[others].isnan().any()
    for which in (0, 1):
        _, dhidden = gradients(lambda h, which=which: both(h)[which][..., None][:, :1], case.hidden)
        assert dhidden[4].isnan().all()
        assert dhidden[others].isfinite().all()
    top = linear_topk(case.hidden, case.weight, 2, extra_ids=ids, validate=False)
    assert top.extra_logprobs[4].isnan().all()
    assert not top.extra_logprobs[others].isnan().any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_nan_and_inf_in_a_row_stay_there_as_nan(softcap, value):
    case = make_case()
    hidden = case.hidden.clone()
    hidden[2, 0] = value
    others = torch.arange(20) != 2
    ids = torch.randint(0, 211, (20, 3))
    found = linear_topk(hidden, case.weight, 4, extra_ids=ids, softcap=softcap)
    for rows in found[1:]:
        assert rows[2].isnan().all()
        assert rows[others].isfinite().all()
    value, dhidden = gradients(
        lambda h: linear_logprobs(h, case.weight, ids, softcap=softcap), hidden
    )
    assert value[2].isnan().all()
    assert dhidden[2].isnan().all()
    assert dhidden[others].isfinite().all()


def test_confident_tokens_keep_the_digits_of_their_gradient():
    weight = torch.zeros(30, 2)
    weight[0] = torch.tensor([16.0, 1.0])
    hidden = torch.tensor([[1.0, 0.5]])
    ids = torch.tensor([[0, -1, 0, 3]])

    def loss(function):
        def run(h, w):
            logprobs, entropy = function(h, w, ids, return_entropy=True)
            return logprobs[:, 0] + 2.0 * logprobs[:, 2] + 0.0 * entropy

        return run

    ours = gradients(loss(linear_logprobs), hidden, weight)
    exact = gradients(loss(reference.linear_logprobs), hidden.double(), weight.double())
    assert relative_error(ours[1], exact[1]) < 1e-5
    assert relative_error(ours[2], exact[2]) < 1e-5


def test_the_entropy_of_rows_of_pads_has_a_gradient():
    case = make_case()
    ids = torch.full((20, 2), -1)
    ours = gradients(
        lambda h: linear_logprobs(h, case.weight, ids, return_entropy=True)[1], case.hidden
    )
    exact = gradients(
        lambda h: reference.linear_logprobs(h, case.weight.double(), ids, return_entropy=True)[1],
        case.hidden.double(),
    )
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=1e-5)
    assert relative_error(ours[1], exact[1]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", [{}, HEAD], ids=["plain", "head"])
@pytest.mark.parametrize("k", [1, 7, 211])
def test_topk(k, head, dtype):
    case = make_case(dtype=dtype)
    extra = torch.randint(-1, 211, (20, 3))
    found = linear_topk(case.hidden, case.weight, k, extra_ids=extra, **head)
    ids, *exact = reference.linear_topk(
        case.hidden.double(), case.weight.double(), k, extra_ids=extra, **head
    )
    if k < 211:
        assert torch.equal(found.ids, ids)
    for ours, right in zip(found[1:], exact, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-5)
    assert (found.tail_logprobs == -math.inf).all() == (k == 211)
    assert linear_topk(case.hidden, case.weight, 1).extra_logprobs is None
    assert not found.logprobs.requires_grad


def test_topk_keeps_a_tiny_tail():
    weight = torch.zeros(50, 1)
    weight[0] = 40.0
    found = linear_topk(torch.ones(1, 1), weight, 1)
    assert abs(float(found.tail_logprobs) - (math.log(49) - 40.0)) < 1e-4


def test_no_rows():
    case = make_case()
    ids = torch.zeros(0, 2, dtype=torch.int64)
    found = linear_topk(case.hidden[:0], case.weight, 3, extra_ids=ids)
    assert found.ids.shape == (0, 3)
    assert linear_logprobs(case.hidden[:0], case.weight, ids).shape == (0, 2)
