"""Problems, oracles and the accuracy gate that the kernels' tests share."""

import math
import os
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lopd_kernels import divergence, policy, reference
from lopd_kernels._core.chunks import loss_by_chunks
from lopd_kernels._core.rules import DIVERGENCES, TAILS

FORMS = [
    (divergence, tail)
    for divergence in DIVERGENCES
    for tail in TAILS
    if tail != "unbiased" or divergence == "reverse_kl"
]
HEAD = {"logit_scale": 1.3, "softcap": 4.0, "temperature": 0.7}
GATES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-3}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = os.environ.get("LOPD_PTX")  # a compute capability: the compiled PTX runs on the CPU


def skip_bf16_stores_of_the_interpreter(dtype: torch.dtype) -> None:
    """Triton's interpreter truncates where a kernel stores bf16, so only compiled runs count."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter truncates bf16")


@dataclass(frozen=True)
class Case:
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor  # [V]
    ids: Tensor  # [N, K], ragged
    logprobs: Tensor  # [N, K]
    tail: Tensor  # [N]
    sampled_ids: Tensor  # [N], some of them listed
    sampled_logprobs: Tensor  # [N]
    rollout_logprobs: Tensor  # [N]

    @property
    def teacher(self) -> tuple[Tensor, Tensor]:
        return self.ids, self.logprobs

    def double(self) -> "Case":
        fields = {k: v.double() for k, v in vars(self).items() if v.is_floating_point()}
        return replace(self, **fields)

    def form(self, divergence: str, tail: str, rows: Any = slice(None)) -> dict[str, Any]:
        """The arguments that select a form, of these rows; jsd is not symmetric here."""
        options: dict[str, Any] = {"divergence": divergence, "tail": tail}
        if divergence == "jsd":
            options["beta"] = 0.3
        if tail == "unbiased":
            names = ("sampled_ids", "sampled_logprobs", "rollout_logprobs")
            options |= {name: getattr(self, name)[rows] for name in names}
        return options


def make_case(
    regime: str = "far",
    dtype: torch.dtype = torch.float32,
    *,
    rows: int = 20,
    vocab: int = 211,
    width: int = 24,
    k: int = 6,
    seed: int = 0,
    **head,
) -> Case:
    """The teacher is independent ("far"), or the student's logits plus 0.25 nat noise ("near")."""
    torch.manual_seed(seed)
    hidden = torch.randn(rows, width).to(dtype)
    weight = (torch.randn(vocab, width) * 2.0 * width**-0.5).to(dtype)
    bias = torch.randn(vocab).to(dtype)
    used = {**head, "bias": bias.double()} if head.pop("with_bias", False) else head
    used.pop("with_bias", None)
    student = reference.linear_logits(hidden.double(), weight.double(), **used)
    noise = torch.randn(rows, vocab, dtype=torch.float64)
    teacher = (student + 0.25 * noise if regime == "near" else 3.0 * noise).log_softmax(1)
    logprobs, ids = teacher.topk(k, 1)
    counts = torch.arange(rows) % k + 1
    padding = torch.arange(k) >= counts.unsqueeze(1)
    ids = ids.masked_fill(padding, -1)
    logprobs = logprobs.masked_fill(padding, -math.inf)
    listed = torch.zeros(rows, vocab + 1, dtype=torch.bool).scatter(1, ids % (vocab + 1), True)
    tail = teacher.masked_fill(listed[:, :vocab], -math.inf).logsumexp(1)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    sampled = torch.randint(0, vocab, (rows,))
    sampled[::4] = ids[::4, 0]
    at_sampled = teacher.gather(1, sampled[:, None])[:, 0]
    rollout = student.log_softmax(1).gather(1, sampled[:, None])[:, 0] + 0.2 * torch.randn(rows)
    rollout = rollout.clamp(max=0.0)
    scores = (x.to(real) for x in (logprobs, tail, at_sampled, rollout))
    logprobs, tail, at_sampled, rollout = scores
    return Case(hidden, weight, bias, ids, logprobs, tail, sampled, at_sampled, rollout)


def gradients(loss, *parameters: Tensor, upstream: float = 1.0) -> tuple[Tensor, ...]:
    """(value, gradient of each parameter); `loss` is called on leaves made from `parameters`."""
    leaves = [p.detach().clone().requires_grad_() for p in parameters]
    value = loss(*leaves)
    (value.sum() * upstream).backward()
    return (value.detach(), *(leaf.grad for leaf in leaves))


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """In the Frobenius norm; 0 if both are zero."""
    exact = exact.double()
    difference, size = (actual.double() - exact).norm(), exact.norm()
    return float(difference / size) if size > 0 else float(difference)


def assert_close(
    actual, exact, dtype: torch.dtype, size: float = 1.0, bounds: list[float] | None = None
) -> None:
    """The gate: gradients by relative Frobenius error, values within 1e-5 (1 + |L|).

    Args:
        actual, exact: (value, *gradients).
        size: scale of the row weights; values are compared without it.
        bounds: of the gradients, from `rounding_bounds`, where dlogits are rounded to 16 bits;
            without them in bf16 1.25 times the error of rounding the exact gradient, or 3e-3.
    """
    value, *grads = actual
    exact_value, *exact_grads = exact
    value, exact_value = value / size, exact_value / size
    slack = 1e-5 * (1.0 + exact_value.abs())
    assert ((value.double() - exact_value).abs() <= slack).all(), (value, exact_value)
    if bounds is None:
        bounds = [GATES.get(dtype, 3e-3)] * len(grads)
        if dtype == torch.bfloat16:
            bounds = [max(3e-3, 1.25 * relative_error(x.to(dtype), x)) for x in exact_grads]
    for grad, exact_grad, bound in zip(grads, exact_grads, bounds, strict=True):
        assert grad.dtype == dtype
        assert relative_error(grad, exact_grad) <= bound, relative_error(grad, exact_grad)


def rounding_bounds(loss, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> list[float]:
    """The gate for (dH, dW) in 16 bits: 1.25 times the error of rounding, and nothing else.

    `loss(hidden, weight)` calls a public function. Its dlogits are computed in fp64 and rounded
    as stored ones are, with weights of at most one; so are the gradients that follow from them.
    Losses without an LM head round no dlogits.
    """
    floor = {torch.bfloat16: 3e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
    if dtype == torch.float32:
        return [floor, floor]
    calls = []

    def record(head, row_loss, *_):
        calls.append((head, row_loss))
        return head.hidden.new_zeros(()), head.hidden.new_zeros((head.rows, 7))

    with (
        mock.patch.object(divergence, "reduced_loss", record),
        mock.patch.object(policy, "reduced_loss", record),
    ):
        loss(hidden.double(), weight.double())
    head, row_loss = calls[0]
    if row_loss.rule.ignores_unlisted:
        return [floor, floor]
    weight = head.weight
    dweight, rounded_dweight = torch.zeros_like(weight), torch.zeros_like(weight)
    squares = torch.zeros(2, dtype=torch.float64, device=weight.device)

    def use(dlogits, hidden, part, rows_of_weight):
        rounded = dlogits.to(dtype).double()
        dweight.add_(dlogits.t() @ hidden)
        rounded_dweight.add_(rounded.t() @ hidden)
        dhidden = dlogits @ weight
        squares[0] += dhidden.square().sum()
        squares[1] += ((rounded @ weight).to(dtype) - dhidden).square().sum()

    rows = max(1, (1 << 27) // len(weight))
    loss_by_chunks(head.linear, row_loss, True, False, rows, lambda u, part: u, use)
    errors = [
        (squares[1] / squares[0].clamp(min=1e-300)).sqrt(),
        (rounded_dweight.to(dtype) - dweight).norm() / dweight.norm(),
    ]
    return [max(floor, 1.25 * float(x)) if x == x else floor for x in errors]
