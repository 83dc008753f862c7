"""linear_logprobs and linear_topk against the dense fp64 definition."""

import math

import pytest
import torch
from kernel_cases import GATES, HEAD, gradients, make_case, relative_error

from lopd_kernels import linear_logprobs, linear_sparse_divergence, linear_topk, reference
from lopd_kernels._core import workspace


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", [{}, HEAD], ids=["plain", "head"])
def test_logprobs_and_entropy(head, dtype):
    case = make_case(dtype=dtype)
    ids = torch.randint(0, 211, (20, 4))
    ids[:, 3] = ids[:, 0]
    weights = torch.randn(20, 4)

    def loss(function):
        def run(h, w):
            logprobs, entropy = function(h, w, ids, return_entropy=True, **head)
            return (weights * logprobs).sum(1) + 2.0 * entropy

        return run

    ours = gradients(loss(linear_logprobs), case.hidden, case.weight)
    exact = gradients(loss(reference.linear_logprobs), case.hidden.double(), case.weight.double())
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=2e-5)
    bound = GATES.get(dtype, 3e-3)
    for grad, expected in zip(ours[1:], exact[1:], strict=True):
        assert relative_error(grad, expected) < bound


def test_pads_give_minus_infinity_and_no_gradient():
    case = make_case()
    ids = torch.tensor([[3, -1]]).repeat(20, 1)
    logprobs = linear_logprobs(case.hidden, case.weight, ids)
    assert (logprobs[:, 1] == -math.inf).all()
    padded = gradients(lambda h: linear_logprobs(h, case.weight, ids)[:, 0], case.hidden)
    plain = gradients(lambda h: linear_logprobs(h, case.weight, ids[:, :1])[:, 0], case.hidden)
    torch.testing.assert_close(padded[1], plain[1])
    whole = gradients(lambda h: linear_logprobs(h, case.weight, ids).sum(1), case.hidden)
    torch.testing.assert_close(whole[1], plain[1])


@pytest.mark.parametrize("bad", [-2, 211])
def test_an_unchecked_invalid_id_makes_only_its_row_nan(bad):
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
    top = linear_topk(
        case.hidden, case.weight, 2, extra_ids=ids, sampled_ids=ids[:, 1], validate=False
    )
    for rows in (top.extra_logprobs, top.extra_tail_logprobs, top.sampled_logprobs):
        assert rows[4].isnan().all()
        assert not rows[others].isnan().any()
    for rows in (top.logprobs, top.tail_logprobs, top.entropy):
        assert rows.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_nan_and_inf_in_a_row_make_only_that_row_nan(softcap, value):
    case = make_case()
    hidden = case.hidden.clone()
    hidden[2, 0] = value
    others = torch.arange(20) != 2
    ids = torch.randint(0, 211, (20, 3))
    options = {"extra_ids": ids, "sampled_ids": ids[:, 0], "softcap": softcap}
    top = linear_topk(hidden, case.weight, 4, **options)
    for rows in top[1:]:
        assert rows[2].isnan().all()
        assert rows[others].isfinite().all()
    value, dhidden = gradients(
        lambda h: linear_logprobs(h, case.weight, ids, softcap=softcap), hidden
    )
    assert value[2].isnan().all()
    assert dhidden[2].isnan().all()
    assert dhidden[others].isfinite().all()


def test_padded_rows_of_a_batch_can_be_scored_and_are_ignored_with_weight_0():
    case = make_case()
    padded = torch.arange(20) % 4 == 3
    sampled = torch.randint(0, 211, (20,))
    whole = linear_topk(case.hidden, case.weight, 4, sampled_ids=sampled)
    top = linear_topk(case.hidden, case.weight, 4, sampled_ids=sampled.masked_fill(padded, -1))
    assert (top.sampled_logprobs[padded] == -math.inf).all()
    assert torch.equal(top.sampled_logprobs[~padded], whole.sampled_logprobs[~padded])
    assert torch.equal(top.tail_logprobs, whole.tail_logprobs)
    sample = {
        "sampled_ids": sampled.masked_fill(padded, -1),
        "sampled_logprobs": top.sampled_logprobs,
        "rollout_logprobs": top.sampled_logprobs,
        "tail": "unbiased",
    }
    lists = (top.ids, top.logprobs)
    moved = case.hidden + 0.1
    loss = linear_sparse_divergence(moved, case.weight, *lists, row_weights=~padded, **sample)
    rows = {
        key: value[~padded] if isinstance(value, torch.Tensor) else value
        for key, value in sample.items()
    }
    kept = (part[~padded] for part in lists)
    assert loss.item() != 0
    torch.testing.assert_close(
        loss, linear_sparse_divergence(moved[~padded], case.weight, *kept, **rows)
    )
    with pytest.raises(ValueError, match=r"sampled_ids has -100 in row 0.*-1 for padding"):
        linear_topk(case.hidden, case.weight, 4, sampled_ids=torch.full((20,), -100))


def test_the_gradient_at_confident_tokens_is_precise():
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


def entropy_gradients(function, ids, bias, *parameters, head):
    return gradients(
        lambda h, w, b: function(h, w, ids, return_entropy=True, bias=b + bias, **head)[1],
        *parameters,
    )


def test_the_entropy_of_rows_of_pads_has_a_gradient():
    case = make_case()
    ids, bias = torch.full((20, 2), -1), torch.zeros(211)
    parameters = case.hidden, case.weight, case.bias
    ours = entropy_gradients(linear_logprobs, ids, bias, *parameters, head={})
    exact = entropy_gradients(
        reference.linear_logprobs, ids, bias, *(x.double() for x in parameters), head={}
    )
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=1e-5)
    for grad, expected in zip(ours[1:], exact[1:], strict=True):
        assert relative_error(grad, expected) < 1e-5


@pytest.mark.parametrize("columns", [None, 50], ids=["one panel", "five panels"])
@pytest.mark.parametrize("head", [{}, {"logit_scale": 1.3, "temperature": 0.7}], ids=str)
def test_the_gradient_of_the_entropy_under_a_bias_of_minus_infinity(head, columns, monkeypatch):
    """Ids without mass, listed or not and also as a whole panel, have p log p = 0."""
    if columns is not None:
        monkeypatch.setitem(workspace.PANEL_BYTES, "cpu", columns * 20 * 4)
        monkeypatch.setitem(workspace.PANEL_BYTES, "cuda", columns * 20 * 4)
    case = make_case()
    masked = torch.cat([torch.arange(3), torch.arange(100, 160)])
    bias = torch.zeros(211).index_fill(0, masked, -math.inf)
    ids = torch.tensor([[5, 120, -1]]).repeat(20, 1)
    parameters = case.hidden, case.weight, case.bias
    ours = entropy_gradients(linear_logprobs, ids, bias, *parameters, head=head)
    exact = entropy_gradients(
        reference.linear_logprobs, ids, bias.double(), *(x.double() for x in parameters), head=head
    )
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=1e-5)
    for grad, expected in zip(ours[1:], exact[1:], strict=True):
        assert expected.isfinite().all()
        assert relative_error(grad, expected) < 1e-5
    assert (ours[2][masked] == 0.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", [{}, HEAD], ids=["plain", "head"])
@pytest.mark.parametrize("k", [1, 7, 211])
def test_topk(k, head, dtype):
    case = make_case(dtype=dtype)
    extra, sampled = torch.randint(-1, 211, (20, 3)), torch.randint(0, 211, (20,))
    options = {"extra_ids": extra, "sampled_ids": sampled, **head}
    top = linear_topk(case.hidden, case.weight, k, **options)
    ids, *exact = reference.linear_topk(case.hidden.double(), case.weight.double(), k, **options)
    if k < 211:
        assert torch.equal(top.ids, ids)
    for ours, expected in zip(top[1:], exact, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    assert (top.tail_logprobs == -math.inf).all() == (k == 211)
    assert linear_topk(case.hidden, case.weight, 1).extra_logprobs is None
    assert not top.logprobs.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("k", [1, 7, 205])
def test_the_extra_tail_excludes_the_top_k_and_the_extra_ids(k, dtype):
    """Extra ids that are pads, repeated or among the top k count once; sampled ids do not count."""
    case = make_case(dtype=dtype)
    logprobs = reference.linear_logits(case.hidden.double(), case.weight.double()).log_softmax(1)
    top_ids = logprobs.topk(k, 1).indices
    extra = torch.randint(0, 211, (20, 6))
    extra[:, 1], extra[:, 2], extra[:, 3] = extra[:, 0], -1, top_ids[:, 0]
    sampled = torch.randint(0, 211, (20,))
    top = linear_topk(case.hidden, case.weight, k, extra_ids=extra, sampled_ids=sampled)
    excluded = torch.zeros(20, 212, dtype=torch.bool)
    excluded.scatter_(1, torch.cat([top_ids, extra % 212], 1), True)
    exact = logprobs.masked_fill(excluded[:, :211], -math.inf).logsumexp(1)
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(top.extra_tail_logprobs.double(), exact, rtol=bound, atol=bound)
    plain = linear_topk(case.hidden, case.weight, k)
    torch.testing.assert_close(top.tail_logprobs, plain.tail_logprobs, rtol=bound, atol=bound)
    torch.testing.assert_close(top.entropy, plain.entropy, rtol=bound, atol=bound)
    assert plain.extra_tail_logprobs is None and plain.sampled_logprobs is None


def test_tiny_tails_are_precise():
    weight = torch.zeros(50, 1)
    weight[0] = 40.0
    top = linear_topk(torch.ones(1, 1), weight, 1)
    assert abs(float(top.tail_logprobs) - (math.log(49) - 40.0)) < 1e-4
    weight[1] = 20.0
    top = linear_topk(torch.ones(1, 1), weight, 1, extra_ids=torch.tensor([[1]]))
    assert abs(float(top.extra_tail_logprobs) - (math.log(48) - 40.0)) < 1e-4
    assert abs(float(top.tail_logprobs) - (math.log(48 + math.exp(20.0)) - 40.0)) < 1e-4


def test_lists_of_every_id_leave_no_extra_tail():
    weight = torch.randn(6, 2)
    extra = torch.arange(6).repeat(3, 1)
    top = linear_topk(torch.randn(3, 2), weight, 2, extra_ids=extra)
    assert (top.extra_tail_logprobs == -math.inf).all()
    assert top.tail_logprobs.isfinite().all()


def test_no_rows():
    case = make_case()
    ids = torch.zeros(0, 2, dtype=torch.int64)
    top = linear_topk(case.hidden[:0], case.weight, 3, extra_ids=ids)
    assert top.ids.shape == (0, 3)
    assert linear_logprobs(case.hidden[:0], case.weight, ids).shape == (0, 2)
