"""Argument errors: their type, and a message that names the argument."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lopd_kernels import (
    linear_cross_entropy,
    linear_logprobs,
    linear_policy_gradient,
    linear_sparse_divergence,
    linear_topk,
    sparse_divergence,
)

HIDDEN, WEIGHT = torch.randn(3, 4), torch.randn(10, 4)
IDS = torch.tensor([[0, 1], [2, 3], [4, -1]])
LOGPROBS = torch.full((3, 2), 0.25).log()
LABELS, ROW = torch.tensor([1, 2, 3]), torch.tensor([-1.0, -2.0, -3.0])


def changed(tensor, row, value):
    tensor = tensor.clone()
    tensor[row] = value
    return tensor


SPARSE = [
    (dict(hidden=HIDDEN[0]), "expected \\[N, D\\] or \\[B, T, D\\]"),
    (dict(hidden=HIDDEN[None]), "topk_ids has shape \\[3, 2\\], expected \\[1, 3, K\\]"),
    (dict(hidden=HIDDEN.tolist()), "hidden is of type list.*torch.as_tensor\\(hidden\\)"),
    (dict(weight=torch.nn.Linear(4, 10)), "weight is the module Linear.*bias="),
    (dict(weight=WEIGHT[None]), "weight has shape"),
    (dict(bias=[0.0] * 10), "bias is of type list"),
    (dict(topk_ids=IDS.numpy()), "topk_ids is of type ndarray"),
    (dict(topk_logprobs=LOGPROBS.tolist()), "topk_logprobs is of type list"),
    (dict(row_weights=[1.0, 2.0, 3.0]), "row_weights is of type list"),
    (dict(hidden=HIDDEN.int()), "hidden is torch.int32"),
    (dict(hidden=torch.randn(3, 5)), "last dimension"),
    (dict(hidden=HIDDEN.bfloat16()), "cast one"),
    (dict(weight=WEIGHT[:0]), "no rows"),
    (dict(weight=WEIGHT.to("meta")), "weight is on meta"),
    (dict(bias=torch.zeros(9)), "bias has shape"),
    (dict(bias=torch.zeros(10).bfloat16()), "bias is"),
    (dict(bias=torch.zeros(10, dtype=torch.int64)), "bias is torch.int64"),
    (dict(topk_ids=IDS[:2]), "topk_ids has shape"),
    (dict(topk_ids=IDS[:, :0], topk_logprobs=LOGPROBS[:, :0]), "at least one column"),
    (dict(topk_ids=IDS.float()), "topk_ids is torch.float32"),
    (dict(topk_ids=changed(IDS, (1, 0), 10)), "topk_ids has 10 in row 1"),
    (dict(topk_ids=changed(IDS, (1, 0), -2)), "topk_ids has -2 in row 1.*mark padding by -1"),
    (dict(topk_ids=changed(IDS, (1, 0), 3)), "id 3 twice in row 1"),
    (dict(topk_logprobs=LOGPROBS[:, :1]), "topk_logprobs has shape"),
    (dict(topk_logprobs=changed(LOGPROBS, (0, 1), math.nan)), "topk_logprobs is nan in row 0"),
    (dict(topk_logprobs=changed(LOGPROBS, (0, 1), -math.inf)), "drop ids without mass"),
    (dict(topk_logprobs=changed(LOGPROBS, (0, 1), 0.0)), "sum to 1.25 in row 0"),
    (dict(topk_logprobs=LOGPROBS.exp()), "not logits or probabilities"),
    (dict(topk_logprobs=LOGPROBS.clone().requires_grad_()), "requires grad"),
    (dict(tail_logprobs=ROW[:2]), "tail_logprobs has shape"),
    (dict(tail_logprobs=changed(ROW, 2, math.nan)), "tail_logprobs is nan in row 2"),
    (dict(tail_logprobs=changed(ROW, 0, 0.0)), "sum to 1.5 in row 0"),
    (dict(tail_logprobs=ROW.clone().requires_grad_()), "tail_logprobs requires grad"),
    (dict(divergence="kl"), "divergence is 'kl'"),
    (dict(tail="drop"), "tail is 'drop'"),
    (dict(divergence="jsd", beta=0.0), "'forward_kl' or 'reverse_kl'"),
    (dict(divergence="jsd", beta=1.0), "'forward_kl' or 'reverse_kl'"),
    (dict(beta=0.5), "reverse_kl has no mixture"),
    (dict(reduction="average"), "reduction is 'average'"),
    (dict(row_weights=ROW[:2]), "row_weights has shape"),
    (dict(row_weights=ROW, reduction="mean"), "negative"),
    (dict(row_weights=changed(ROW, 1, math.inf)), "row_weights is inf in row 1"),
    (dict(row_weights=ROW.clone().requires_grad_()), "row_weights requires grad"),
    (dict(temperature=0.0), "temperature is 0.0"),
    (dict(temperature=math.inf), "temperature is inf"),
    (dict(softcap=-1.0), "softcap is -1.0"),
    (dict(logit_scale=math.nan), "logit_scale is nan"),
    (dict(temperature=None), "temperature is None, expected a number"),
    (dict(temperature=torch.tensor(1.0)), "pass a Python float"),
    (dict(softcap="30"), "softcap is '30', expected a number"),
    (dict(workspace_bytes="1GiB"), "workspace_bytes is '1GiB', expected None or a number of bytes"),
    (dict(workspace_bytes=0), "workspace_bytes is 0"),
    (dict(workspace_bytes=10, tail="renormalize"), "needs at least"),
    (dict(weight_grad_buffer=torch.zeros(4, 10)), "weight_grad_buffer has shape"),
    (dict(weight_grad_buffer=torch.zeros(10, 4).half()), "expected torch.float32"),
    (dict(weight_grad_buffer=torch.zeros(10, 4)), "does not require grad"),
    (
        dict(weight=WEIGHT.clone().requires_grad_(),
             weight_grad_buffer=torch.zeros(10, 4).requires_grad_()),
        "weight_grad_buffer requires grad",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), SPARSE, ids=[m for _, m in SPARSE])
def test_sparse_divergence(wrong, message):
    valid = dict(hidden=HIDDEN, weight=WEIGHT, topk_ids=IDS, topk_logprobs=LOGPROBS)
    linear_sparse_divergence(**valid)
    with pytest.raises((ValueError, TypeError), match=message) as error:
        linear_sparse_divergence(**{**valid, **wrong})
    assert "\n" not in str(error.value)


POLICY = [
    (dict(sampled_ids=IDS), "sampled_ids has shape"),
    (dict(sampled_ids=changed(LABELS, 1, -1)), "sampled_ids has -1 in row 1"),
    (dict(sampled_ids=changed(LABELS, 1, -7)), "pass the rows that bear loss"),
    (dict(sampled_ids=changed(LABELS, 2, 10)), "sampled_ids has 10 in row 2.*tokenizer"),
    (dict(ignore_index=None), "ignore_index is None, expected an integer"),
    (dict(teacher_logprobs=ROW.exp()), "teacher_logprobs is 0.367.*not probabilities"),
    (dict(rollout_logprobs=-ROW, importance="token"), "rollout_logprobs is 1 in row 0"),
    (dict(teacher_logprobs=None), "both None"),
    (dict(teacher_logprobs=ROW[:1]), "teacher_logprobs has shape"),
    (dict(teacher_logprobs=changed(ROW, 1, math.nan)), "teacher_logprobs is nan in row 1"),
    (dict(advantages=ROW, advantage_clip=1.0), "clip yours before"),
    (dict(advantages=ROW.clone().requires_grad_()), "advantages requires grad"),
    (dict(advantage_clip=0.0), "advantage_clip is 0.0"),
    (dict(importance="sequence"), "importance is 'sequence'"),
    (dict(importance="token"), "rollout_logprobs is None"),
    (dict(clip_range=0.2), "rollout_logprobs is None"),
    (dict(importance="token_truncated", rollout_logprobs=ROW), "importance_cap is None"),
    (dict(importance_cap=2.0), "belongs to 'token_truncated'"),
    (dict(importance="token", clip_range=0.2, rollout_logprobs=ROW), "its own ratio"),
    (dict(clip_range=-0.2, rollout_logprobs=ROW), "clip_range is -0.2"),
    (dict(reduction="average"), "reduction is 'average'"),
]


@pytest.mark.parametrize(("wrong", "message"), POLICY, ids=[m for _, m in POLICY])
def test_policy_gradient(wrong, message):
    valid = dict(hidden=HIDDEN, weight=WEIGHT, sampled_ids=LABELS, teacher_logprobs=ROW)
    linear_policy_gradient(**valid)
    with pytest.raises((ValueError, TypeError), match=message):
        linear_policy_gradient(**{**valid, **wrong})


def test_the_other_functions():
    with pytest.raises(ValueError, match="labels has -5 in row 0"):
        linear_cross_entropy(HIDDEN, WEIGHT, changed(LABELS, 0, -5))
    with pytest.raises(ValueError, match="logits are"):
        sparse_divergence(HIDDEN[0], IDS, LOGPROBS)
    with pytest.raises(ValueError, match="ids has 12 in row 0"):
        linear_logprobs(HIDDEN, WEIGHT, changed(IDS, (0, 0), 12))
    with pytest.raises(TypeError, match="k is 8.0, expected 1 to the vocabulary size 10"):
        linear_topk(HIDDEN, WEIGHT, 8.0)
    for k in (0, 11):
        with pytest.raises(ValueError, match=f"k is {k}, expected 1 to the vocabulary size 10"):
            linear_topk(HIDDEN, WEIGHT, k)
    with pytest.raises(ValueError, match="extra_ids has -2 in row 0"):
        linear_topk(HIDDEN, WEIGHT, 2, extra_ids=changed(IDS, (0, 0), -2))
    with pytest.raises(ValueError, match="sampled_ids has -2 in row 0"):
        linear_topk(HIDDEN, WEIGHT, 2, sampled_ids=changed(LABELS, 0, -2))


def test_validate_turns_checks_of_values_on_and_off():
    wrong = changed(IDS, (0, 0), 10)
    with pytest.raises(ValueError, match="topk_ids has 10"):
        linear_sparse_divergence(HIDDEN, WEIGHT, wrong, LOGPROBS, validate=True)
    linear_sparse_divergence(HIDDEN, WEIGHT, wrong, LOGPROBS, validate=False)
    with pytest.raises(ValueError, match="topk_ids has shape"):
        linear_sparse_divergence(HIDDEN, WEIGHT, wrong[:1], LOGPROBS, validate=False)
    torch._dynamo.reset()
    compiled = torch.compile(linear_sparse_divergence, fullgraph=True, backend="aot_eager")
    assert compiled(HIDDEN, WEIGHT, wrong, LOGPROBS).isnan()


def test_log_probs_that_were_rounded_to_16_bits_are_named():
    rounded = torch.full((3, 2), math.log(0.5) + 1e-3).bfloat16()
    for tail in (None, torch.full((3,), -9.0)):
        with pytest.raises(ValueError, match="softmax, computed in float32 and not in torch.bfl"):
            linear_sparse_divergence(HIDDEN, WEIGHT, IDS, rounded, tail_logprobs=tail)
    with pytest.raises(ValueError, match="of the full softmax, not logits"):
        linear_sparse_divergence(HIDDEN, WEIGHT, IDS, rounded.float())


def test_values_are_not_checked_where_there_are_none():
    hidden, weight, ids, logprobs, labels = (
        x.to("meta") for x in (HIDDEN, WEIGHT, IDS, LOGPROBS, LABELS)
    )
    hidden.requires_grad_()
    linear_sparse_divergence(hidden, weight, ids, logprobs).backward()
    linear_policy_gradient(hidden, weight, labels, logprobs[:, 0]).backward()
    assert linear_logprobs(hidden, weight, ids).is_meta
    assert linear_topk(hidden, weight, 2, extra_ids=ids).ids.is_meta


RENORMALIZED = torch.tensor([[0.7, 0.3], [0.9, 0.1], [1.0, 0.0]]).log()


def test_renormalised_lists_are_refused():
    """The likely first mistake: a log-softmax over the top k of the logits."""
    torch.manual_seed(0)
    logits, ids = torch.randn(64, 3000).topk(16)
    for dtype in (torch.float32, torch.float64):
        logprobs = logits.to(dtype).log_softmax(-1)
        with pytest.raises(ValueError, match="renormalised over the list.*tail='renormalize'"):
            linear_sparse_divergence(torch.randn(64, 4), torch.randn(3000, 4), ids, logprobs)
    for tail in ("bucket", "truncate"):
        with pytest.raises(ValueError, match="renormalised"):
            linear_sparse_divergence(HIDDEN, WEIGHT, IDS, RENORMALIZED, tail=tail)
    unweighted = torch.tensor([True, False, False])
    with pytest.raises(ValueError, match="renormalised"):
        linear_sparse_divergence(
            HIDDEN, WEIGHT, IDS, changed(RENORMALIZED, 1, math.nan), row_weights=unweighted
        )


def test_lists_that_rightly_have_mass_one_are_accepted():
    linear_sparse_divergence(HIDDEN, WEIGHT, IDS, RENORMALIZED, tail="renormalize")
    declared = torch.tensor([-math.inf, -30.0, -40.0])
    linear_sparse_divergence(HIDDEN, WEIGHT, IDS, RENORMALIZED, tail_logprobs=declared)
    one_row_has_a_tail = changed(RENORMALIZED, 1, math.log(0.25))
    linear_sparse_divergence(HIDDEN, WEIGHT, IDS, one_row_has_a_tail)
    linear_sparse_divergence(HIDDEN[:0], WEIGHT, IDS[:0], RENORMALIZED[:0])
    full = torch.randn(3, 10).log_softmax(1)
    linear_sparse_divergence(HIDDEN, WEIGHT, torch.arange(10).repeat(3, 1), full)
    peaked = (20.0 * torch.randn(3, 10)).double().log_softmax(1)
    logprobs, ids = peaked.topk(9)
    assert logprobs.exp().sum(1).min() > 1.0 - 1e-7
    linear_sparse_divergence(HIDDEN, WEIGHT, ids, logprobs)


def test_a_mask_is_a_row_weight():
    mask = torch.tensor([True, False, True])
    for reduction in ("mean", "sum"):
        options = {"reduction": reduction, "row_weights": mask}
        masked = linear_sparse_divergence(HIDDEN, WEIGHT, IDS, LOGPROBS, **options)
        rows = linear_sparse_divergence(
            HIDDEN[mask], WEIGHT, IDS[mask], LOGPROBS[mask], reduction=reduction
        )
        torch.testing.assert_close(masked, rows)
    assert linear_cross_entropy(HIDDEN, WEIGHT, LABELS, row_weights=~mask) > 0.0


def test_ignored_rows_have_no_loss():
    ignored = changed(LABELS, 1, -100)
    keep = torch.tensor([True, False, True])
    loss, stats = linear_policy_gradient(HIDDEN, WEIGHT, ignored, ROW, return_stats=True)
    rows = linear_policy_gradient(HIDDEN[keep], WEIGHT, LABELS[keep], ROW[keep])
    torch.testing.assert_close(loss, rows)
    assert stats.loss[1] == stats.logprobs[1] == 0.0
    with pytest.raises(ValueError, match="sampled_ids has -100 in row 1"):
        linear_policy_gradient(HIDDEN, WEIGHT, ignored, ROW, ignore_index=-1)


class HostReads(TorchDispatchMode):
    """Counts operations, and those that wait for the device on a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "equal", "masked_select")

    def __init__(self):
        super().__init__()
        self.operations, self.reads = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations += 1
        self.reads += any(name in function.name() for name in self.WAITING)
        return function(*args, **(kwargs or {}))


CALLS = {
    "sparse": lambda **o: linear_sparse_divergence(
        HIDDEN, WEIGHT, IDS, LOGPROBS, tail_logprobs=ROW, row_weights=-ROW, **o
    ),
    "unbiased": lambda **o: linear_sparse_divergence(
        HIDDEN, WEIGHT, IDS, LOGPROBS, tail="unbiased", sampled_ids=LABELS, sampled_logprobs=ROW,
        rollout_logprobs=ROW, **o
    ),
    "logits": lambda **o: sparse_divergence(HIDDEN @ WEIGHT.t(), IDS, LOGPROBS, **o),
    "policy": lambda **o: linear_policy_gradient(
        HIDDEN, WEIGHT, LABELS, ROW, rollout_logprobs=ROW, importance="token", **o
    ),
    "cross-entropy": lambda **o: linear_cross_entropy(HIDDEN, WEIGHT, LABELS, **o),
    "logprobs": lambda **o: linear_logprobs(HIDDEN, WEIGHT, IDS, **o),
    "topk": lambda **o: linear_topk(
        HIDDEN, WEIGHT, 2, extra_ids=IDS, sampled_ids=LABELS, **o
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_call_waits_for_the_device_once_at_most(name):
    counts = {}
    for validate in (None, False):
        with HostReads() as counter:
            CALLS[name](validate=validate)
        counts[validate] = counter
    assert (counts[None].reads, counts[False].reads) == (1, 0)
    checking = counts[None].operations - counts[False].operations
    assert checking <= (100 if name == "unbiased" else 60)  # it has three more columns
