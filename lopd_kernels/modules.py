"""The losses as `nn.Module`: settings in the constructor, tensors in `forward`.

The LM head's weight stays with the model and is passed to `forward`, as the functions take it. A
module has no parameters and no state, and returns the loss only; for statistics call the function.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lopd_kernels import _checks
from lopd_kernels._calls import Reduction
from lopd_kernels.divergence import (
    Divergence,
    Tail,
    linear_sparse_divergence,
    sparse_divergence,
)
from lopd_kernels.policy import Importance, linear_cross_entropy, linear_policy_gradient


class _Loss(nn.Module):
    """Settings of a function; the options of the head are checked when they are given."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        _checks.check_choice("reduction", settings["reduction"], _checks.REDUCTIONS)
        for name in ("logit_scale", "temperature"):
            _checks.check_positive(name, settings.get(name, 1.0))
        _checks.check_optional_positive("softcap", settings.get("softcap"))
        _checks.check_workspace(settings.get("workspace_bytes"))
        _checks.check_skipping(
            settings.get("dense_share"), settings.get("tolerance", 0.0), settings["reduction"],
            settings.get("tail"),
        )  # fmt: skip
        self.settings = settings

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


class LinearSparseDivergence(_Loss):
    """`linear_sparse_divergence` as a module: divergence to a top-k teacher from hidden states.

    The settings and the arguments of `forward` are those of the function.

    Raises:
        ValueError: an invalid argument; the message names it.

    >>> loss_of = LinearSparseDivergence(divergence="forward_kl", temperature=2.0)
    >>> hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(50, 8)
    >>> logprobs, ids = torch.randn(3, 50).log_softmax(1).topk(4)  # hidden [3, 8], lists [3, 4]
    >>> loss_of(hidden, weight, ids, logprobs).backward()
    >>> hidden.grad.shape
    torch.Size([3, 8])
    """

    def __init__(
        self,
        divergence: Divergence = "reverse_kl",
        tail: Tail = "bucket",
        *,
        beta: float | None = None,
        importance_cap: float | None = None,
        reduction: Reduction = "mean",
        logit_scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        dense_share: float | None = None,
        tolerance: float = 0.0,
        workspace_bytes: int | None = None,
        validate: bool | None = None,
    ) -> None:
        _checks.check_divergence(divergence, tail, beta)
        _checks.check_sample(tail, {"importance_cap": importance_cap})
        _checks.check_optional_positive("importance_cap", importance_cap)
        super().__init__(
            divergence=divergence,
            tail=tail,
            beta=beta,
            importance_cap=importance_cap,
            reduction=reduction,
            logit_scale=logit_scale,
            softcap=softcap,
            temperature=temperature,
            dense_share=dense_share,
            tolerance=tolerance,
            workspace_bytes=workspace_bytes,
            validate=validate,
        )

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        topk_ids: Tensor,
        topk_logprobs: Tensor,
        *,
        tail_logprobs: Tensor | None = None,
        sampled_ids: Tensor | None = None,
        sampled_logprobs: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
        row_weights: Tensor | None = None,
        bias: Tensor | None = None,
        seed: int | Tensor | None = None,
        weight_grad_buffer: Tensor | None = None,
    ) -> Tensor:
        """The loss [], or [N] with reduction "none", of hidden [N, D] and lists [N, K]."""
        return linear_sparse_divergence(
            hidden,
            weight,
            topk_ids,
            topk_logprobs,
            tail_logprobs=tail_logprobs,
            sampled_ids=sampled_ids,
            sampled_logprobs=sampled_logprobs,
            rollout_logprobs=rollout_logprobs,
            row_weights=row_weights,
            bias=bias,
            seed=seed,
            weight_grad_buffer=weight_grad_buffer,
            **self.settings,
        )


class SparseDivergence(_Loss):
    """`sparse_divergence` as a module: divergence to a top-k teacher from logits.

    The settings and the arguments of `forward` are those of the function.

    Raises:
        ValueError: an invalid argument; the message names it.

    >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
    >>> loss_of = SparseDivergence()
    >>> loss_of(logits, torch.tensor([[0, 1]]), logits.log_softmax(1)[:, :2]).item() < 1e-6
    True
    """

    def __init__(
        self,
        divergence: Divergence = "reverse_kl",
        tail: Tail = "bucket",
        *,
        beta: float | None = None,
        importance_cap: float | None = None,
        reduction: Reduction = "mean",
        temperature: float = 1.0,
        validate: bool | None = None,
    ) -> None:
        _checks.check_divergence(divergence, tail, beta)
        _checks.check_sample(tail, {"importance_cap": importance_cap})
        _checks.check_optional_positive("importance_cap", importance_cap)
        super().__init__(
            divergence=divergence,
            tail=tail,
            beta=beta,
            importance_cap=importance_cap,
            reduction=reduction,
            temperature=temperature,
            validate=validate,
        )

    def forward(
        self,
        logits: Tensor,
        topk_ids: Tensor,
        topk_logprobs: Tensor,
        *,
        tail_logprobs: Tensor | None = None,
        sampled_ids: Tensor | None = None,
        sampled_logprobs: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
        row_weights: Tensor | None = None,
    ) -> Tensor:
        """The loss [], or [N] with reduction "none", of logits [N, V] and lists [N, K]."""
        return sparse_divergence(
            logits,
            topk_ids,
            topk_logprobs,
            tail_logprobs=tail_logprobs,
            sampled_ids=sampled_ids,
            sampled_logprobs=sampled_logprobs,
            rollout_logprobs=rollout_logprobs,
            row_weights=row_weights,
            **self.settings,
        )


class LinearPolicyGradient(_Loss):
    """`linear_policy_gradient` as a module: policy gradient of sampled tokens.

    The settings and the arguments of `forward` are those of the function.

    Raises:
        ValueError: an invalid argument; the message names it.

    >>> loss_of = LinearPolicyGradient(advantage_clip=5.0)
    >>> hidden, weight = torch.eye(2), torch.zeros(4, 2)
    >>> loss = loss_of(hidden, weight, torch.tensor([3, 0]), torch.tensor([0.5, 0.125]).log())
    >>> round(loss.item(), 4)  # the mean of log 4 log 2 and -log 4 log 2
    0.0
    """

    def __init__(
        self,
        *,
        advantage_clip: float | None = None,
        importance: Importance = "none",
        importance_cap: float | None = None,
        clip_range: float | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        logit_scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        dense_share: float | None = None,
        tolerance: float = 0.0,
        workspace_bytes: int | None = None,
        validate: bool | None = None,
    ) -> None:
        _checks.check_importance(importance, importance_cap, clip_range)
        super().__init__(
            advantage_clip=advantage_clip,
            importance=importance,
            importance_cap=importance_cap,
            clip_range=clip_range,
            ignore_index=ignore_index,
            reduction=reduction,
            logit_scale=logit_scale,
            softcap=softcap,
            temperature=temperature,
            dense_share=dense_share,
            tolerance=tolerance,
            workspace_bytes=workspace_bytes,
            validate=validate,
        )

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        sampled_ids: Tensor,
        teacher_logprobs: Tensor | None = None,
        *,
        advantages: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
        row_weights: Tensor | None = None,
        bias: Tensor | None = None,
        seed: int | Tensor | None = None,
        weight_grad_buffer: Tensor | None = None,
    ) -> Tensor:
        """The loss [], or [N] with reduction "none", of hidden [N, D] and sampled ids [N]."""
        return linear_policy_gradient(
            hidden,
            weight,
            sampled_ids,
            teacher_logprobs,
            advantages=advantages,
            rollout_logprobs=rollout_logprobs,
            row_weights=row_weights,
            bias=bias,
            seed=seed,
            weight_grad_buffer=weight_grad_buffer,
            **self.settings,
        )


class LinearCrossEntropy(_Loss):
    """`linear_cross_entropy` as a module: cross-entropy from hidden states.

    The settings and the arguments of `forward` are those of the function.

    Raises:
        ValueError: an invalid argument; the message names it.

    >>> loss_of = LinearCrossEntropy(ignore_index=-1)
    >>> loss = loss_of(torch.ones(2, 1), torch.zeros(8, 1), torch.tensor([5, -1]))
    >>> round(loss.item(), 4)
    2.0794
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        logit_scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        dense_share: float | None = None,
        tolerance: float = 0.0,
        workspace_bytes: int | None = None,
        validate: bool | None = None,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index,
            reduction=reduction,
            logit_scale=logit_scale,
            softcap=softcap,
            temperature=temperature,
            dense_share=dense_share,
            tolerance=tolerance,
            workspace_bytes=workspace_bytes,
            validate=validate,
        )

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        row_weights: Tensor | None = None,
        bias: Tensor | None = None,
        seed: int | Tensor | None = None,
        weight_grad_buffer: Tensor | None = None,
    ) -> Tensor:
        """The loss [], or [N] with reduction "none", of hidden [N, D] and labels [N]."""
        return linear_cross_entropy(
            hidden,
            weight,
            labels,
            row_weights=row_weights,
            bias=bias,
            seed=seed,
            weight_grad_buffer=weight_grad_buffer,
            **self.settings,
        )
