"""Every public name of `lopd_kernels` in use, without Any; `test_api.py` runs and checks it."""

import torch
from torch import Tensor

from lopd_kernels import (
    LinearCrossEntropy,
    LinearPolicyGradient,
    LinearSparseDivergence,
    PolicyStats,
    SkippingStats,
    SparseDivergence,
    SparseStats,
    TopK,
    linear_cross_entropy,
    linear_logprobs,
    linear_policy_gradient,
    linear_sparse_divergence,
    linear_topk,
    reference,
    sparse_divergence,
)
from lopd_kernels.workspace import workspace_needed


def scored(hidden: Tensor, weight: Tensor, sampled: Tensor) -> TopK:
    return linear_topk(hidden, weight, 4, sampled_ids=sampled)


def losses(hidden: Tensor, weight: Tensor, sampled: Tensor, top: TopK) -> list[Tensor]:
    plain = linear_sparse_divergence(hidden, weight, top.ids, top.logprobs)
    loss, stats = linear_sparse_divergence(
        hidden, weight, top.ids, top.logprobs, divergence="jsd", beta=0.3, return_stats=True
    )
    entropy = entropy_of(stats)
    sampled_rows, row_stats = linear_sparse_divergence(
        hidden, weight, top.ids, top.logprobs, dense_share=0.5, seed=1, return_stats=True
    )
    teacher_logprobs = top.sampled_logprobs
    assert teacher_logprobs is not None
    policy, policy_stats = linear_policy_gradient(
        hidden, weight, sampled, teacher_logprobs, return_stats=True
    )
    return [
        plain,
        loss,
        sampled_rows,
        share_of(row_stats.skipping),
        linear_cross_entropy(hidden, weight, sampled, tolerance=1e-3),
        entropy,
        policy,
        advantages_of(policy_stats),
        linear_policy_gradient(hidden, weight, sampled, advantages=torch.ones(sampled.shape)),
        linear_cross_entropy(hidden, weight, sampled),
        sparse_divergence(hidden @ weight.t(), top.ids, top.logprobs, tail="truncate"),
        LinearSparseDivergence("forward_kl")(hidden, weight, top.ids, top.logprobs),
        SparseDivergence()(hidden @ weight.t(), top.ids, top.logprobs),
        LinearPolicyGradient()(hidden, weight, sampled, teacher_logprobs),
        LinearCrossEntropy()(hidden, weight, sampled),
        reference.linear_sparse_divergence(hidden, weight, top.ids, top.logprobs),
    ]


def entropy_of(stats: SparseStats) -> Tensor:
    assert stats.student_entropy is not None
    return stats.student_entropy.mean()


def share_of(skipping: SkippingStats | None) -> Tensor:
    assert skipping is not None
    return skipping.share


def advantages_of(stats: PolicyStats) -> Tensor:
    return stats.advantages.mean()


def entropy_and_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = linear_logprobs(hidden, weight, ids)
    same, entropy = linear_logprobs(hidden, weight, ids, return_entropy=True)
    return entropy, logprobs - same


def memory(hidden: Tensor, weight: Tensor) -> int:
    (rows, width), vocab = hidden.shape, weight.shape[0]
    return workspace_needed(rows, vocab, width, 4, dtype=hidden.dtype, device="cpu")
