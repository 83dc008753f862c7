"""The public surface: modules, batches of sequences, types, and transforms that are refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typed_api
from kernel_cases import gradients
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jvp, vmap

import lopd_kernels
from lopd_kernels import (
    LinearCrossEntropy,
    LinearPolicyGradient,
    LinearSparseDivergence,
    SparseDivergence,
    linear_cross_entropy,
    linear_logprobs,
    linear_policy_gradient,
    linear_sparse_divergence,
    linear_topk,
    sparse_divergence,
)

ROOT = Path(__file__).parents[2]


def test_the_typed_examples_run_and_use_every_public_name():
    torch.manual_seed(0)
    hidden, weight, sampled = torch.randn(3, 8), torch.randn(50, 8), torch.tensor([1, 2, 3])
    top = typed_api.scored(hidden, weight, sampled)
    assert all(x.isfinite() for x in typed_api.losses(hidden, weight, sampled, top))
    entropy, zero = typed_api.entropy_and_logprobs(hidden, weight, top.ids)
    assert (entropy > 0).all() and (zero == 0).all()
    assert typed_api.memory(hidden, weight) > 0
    assert set(lopd_kernels.__all__) <= set(vars(typed_api))


@pytest.mark.thorough
def test_the_typed_examples_pass_mypy_strictly():
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--config-file",
        str(ROOT / "pyproject.toml"),
    ]
    done = subprocess.run(
        [*command, str(ROOT / "tests/kernels/typed_api.py")],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    ours = [line for line in done.stdout.splitlines() if "typed_api.py" in line]
    assert not ours and "Success" in done.stdout, done.stdout + done.stderr


IDS = torch.tensor([[0, 3], [2, 5], [4, -1]])
LABELS, TEACHER = torch.tensor([1, 2, 3]), torch.tensor([-0.5, -1.0, -2.0])
HIDDEN = torch.linspace(-1.0, 1.0, 12).reshape(3, 4)
WEIGHT = torch.linspace(-2.0, 2.0, 40).reshape(10, 4).cos()
LOGPROBS = torch.tensor([[0.5, 0.25], [0.25, 0.25], [0.125, 1.0]]).log()
ROWS = torch.tensor([1.0, 0.5, 2.0])

# name: (module, function, tensors of forward, settings)
MODULES = {
    "divergence": (
        LinearSparseDivergence,
        linear_sparse_divergence,
        (HIDDEN, WEIGHT, IDS, LOGPROBS),
        dict(divergence="jsd", tail="truncate", beta=0.3, temperature=0.7, softcap=5.0),
    ),
    "logits": (
        SparseDivergence,
        sparse_divergence,
        (HIDDEN @ WEIGHT.t(), IDS, LOGPROBS),
        dict(divergence="forward_kl", temperature=0.7),
    ),
    "policy": (
        LinearPolicyGradient,
        linear_policy_gradient,
        (HIDDEN, WEIGHT, LABELS, TEACHER),
        dict(advantage_clip=0.5, ignore_index=2, logit_scale=1.3),
    ),
    "cross-entropy": (
        LinearCrossEntropy,
        linear_cross_entropy,
        (HIDDEN, WEIGHT, LABELS),
        dict(ignore_index=2, workspace_bytes=1 << 20),
    ),
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_its_function(name, reduction):
    module, function, tensors, settings = MODULES[name]
    loss_of = module(**settings, reduction=reduction)
    assert f"reduction='{reduction}'" in repr(loss_of)
    assert not list(loss_of.parameters()) and not loss_of.state_dict()
    first, *rest = tensors
    ours = gradients(lambda x: loss_of(x, *rest, row_weights=ROWS), first)
    expected = gradients(
        lambda x: function(x, *rest, row_weights=ROWS, reduction=reduction, **settings), first
    )
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", MODULES)
def test_every_loss_is_a_mean_by_default(name):
    module, function, tensors, _ = MODULES[name]
    losses = function(*tensors, row_weights=ROWS, reduction="none")
    mean = losses.sum() / ROWS.sum()
    torch.testing.assert_close(function(*tensors, row_weights=ROWS), mean)
    torch.testing.assert_close(module()(*tensors, row_weights=ROWS), mean)


@pytest.mark.parametrize(
    ("module", "wrong", "message"),
    [
        (LinearSparseDivergence, dict(divergence="kl"), "divergence is 'kl'"),
        (LinearSparseDivergence, dict(beta=0.5), "no mixture"),
        (SparseDivergence, dict(temperature=0.0), "temperature is 0.0"),
        (SparseDivergence, dict(importance_cap=2.0), "only 'unbiased' uses it"),
        (LinearSparseDivergence, dict(tail="unbiased", importance_cap=0.0), "importance_cap is 0"),
        (LinearPolicyGradient, dict(importance_cap=2.0), "belongs to 'token_truncated'"),
        (LinearCrossEntropy, dict(reduction="avg"), "reduction is 'avg'"),
        (LinearCrossEntropy, dict(workspace_bytes="1GiB"), "workspace_bytes is '1GiB'"),
    ],
)
def test_a_module_checks_its_settings_when_it_is_built(module, wrong, message):
    with pytest.raises(ValueError, match=message):
        module(**wrong)


BATCHED = {
    "divergence": lambda rows: linear_sparse_divergence(
        rows(HIDDEN), WEIGHT, rows(IDS), rows(LOGPROBS), tail_logprobs=rows(TEACHER - 2.0),
        row_weights=rows(ROWS), reduction="none", return_stats=True,
    ),
    "logits": lambda rows: sparse_divergence(
        rows(HIDDEN @ WEIGHT.t()), rows(IDS), rows(LOGPROBS), reduction="none", return_stats=True
    ),
    "policy": lambda rows: linear_policy_gradient(
        rows(HIDDEN), WEIGHT, rows(LABELS), rows(TEACHER), rollout_logprobs=rows(TEACHER),
        importance="token", reduction="none", return_stats=True,
    ),
    "cross-entropy": lambda rows: linear_cross_entropy(
        rows(HIDDEN), WEIGHT, rows(LABELS), row_weights=rows(ROWS > 0.7), reduction="none"
    ),
    "logprobs": lambda rows: linear_logprobs(rows(HIDDEN), WEIGHT, rows(IDS)),
    "logprobs-entropy": lambda rows: linear_logprobs(
        rows(HIDDEN), WEIGHT, rows(IDS), return_entropy=True
    ),
    "topk": lambda rows: linear_topk(
        rows(HIDDEN), WEIGHT, 2, extra_ids=rows(IDS), sampled_ids=rows(LABELS)
    ),
}  # fmt: skip


def tensors_of(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [x for part in result if part is not None for x in tensors_of(part)]


@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", BATCHED)
def test_batches_of_sequences_and_both_types_of_ids(name, ids):
    flat = tensors_of(BATCHED[name](lambda x: x))
    batched = tensors_of(
        BATCHED[name](lambda x: (x if x.is_floating_point() or x.dtype == torch.bool
                                 else x.to(ids)).reshape(3, 1, *x.shape[1:]))
    )  # fmt: skip
    assert len(flat) == len(batched)
    for a, b in zip(flat, batched, strict=True):
        assert b.shape == (3, 1, *a.shape[1:])
        assert torch.equal(b.reshape(a.shape), a)


def test_a_scalar_loss_of_a_batch_is_that_of_its_rows():
    flat = linear_sparse_divergence(HIDDEN, WEIGHT, IDS, LOGPROBS)
    batch = [x[None] for x in (HIDDEN, IDS, LOGPROBS)]
    _, grad = gradients(lambda h: linear_sparse_divergence(h, WEIGHT, *batch[1:]), batch[0])
    assert torch.equal(linear_sparse_divergence(batch[0], WEIGHT, *batch[1:]), flat)
    assert grad.shape == (1, 3, 4)
    with pytest.raises(ValueError, match=r"topk_ids has shape \[3, 2\], expected \[1, 3, K\]"):
        linear_sparse_divergence(batch[0], WEIGHT, IDS, LOGPROBS)


FORWARD_MODE = {
    "divergence": lambda h: linear_sparse_divergence(h, WEIGHT, IDS, LOGPROBS),
    "weight": lambda w: linear_cross_entropy(HIDDEN, w.repeat(2, 1), LABELS),
    "logits": lambda h: sparse_divergence(h @ WEIGHT.t(), IDS, LOGPROBS),
    "policy": lambda h: linear_policy_gradient(h, WEIGHT, LABELS, TEACHER),
    "logprobs": lambda h: linear_logprobs(h, WEIGHT, IDS).exp().sum(),
}


@pytest.mark.parametrize("name", FORWARD_MODE)
def test_forward_mode_raises_rather_than_give_a_zero_tangent(name):
    function, ones = FORWARD_MODE[name], torch.ones_like(HIDDEN)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        jvp(function, (HIDDEN,), (ones,))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        jacfwd(function)(HIDDEN)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        function(forward_ad.make_dual(HIDDEN, ones))


@pytest.mark.parametrize("name", FORWARD_MODE)
def test_vmap_is_a_loop_and_functorch_gradients_raise(name):
    function = FORWARD_MODE[name]
    both = torch.stack([HIDDEN, HIDDEN + 0.5])
    torch.testing.assert_close(vmap(function)(both), torch.stack([function(x) for x in both]))
    with pytest.raises(RuntimeError, match="functorch"):
        grad(function)(HIDDEN)
