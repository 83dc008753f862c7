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
    wrong = linear_logprobs(case.hidden, case.weight, ids + 300, validate=False)
    assert wrong.isnan().all()


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
