"""Distillation losses fused into the LM head: the [N, V] logits never exist in memory."""

from lopd_kernels._calls import SkippingStats
from lopd_kernels.divergence import SparseStats, linear_sparse_divergence, sparse_divergence
from lopd_kernels.logprobs import TopK, linear_logprobs, linear_topk
from lopd_kernels.modules import (
    LinearCrossEntropy,
    LinearPolicyGradient,
    LinearSparseDivergence,
    SparseDivergence,
)
from lopd_kernels.policy import PolicyStats, linear_cross_entropy, linear_policy_gradient

__all__ = [
    "LinearCrossEntropy",
    "LinearPolicyGradient",
    "LinearSparseDivergence",
    "PolicyStats",
    "SkippingStats",
    "SparseDivergence",
    "SparseStats",
    "TopK",
    "linear_cross_entropy",
    "linear_logprobs",
    "linear_policy_gradient",
    "linear_sparse_divergence",
    "linear_topk",
    "sparse_divergence",
]
