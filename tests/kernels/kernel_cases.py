"""Problems, oracles and the accuracy gate that the kernel tests share."""

import math
import os
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch
from torch import Tensor

from lopd_kernels import divergence, policy, reference
from lopd_kernels._core.chunks import loss_by_chunks
from lopd_kernels._core.linear import make_linear
from lopd_kernels._core.rules import row_rule

HEAD = {"logit_scale": 1.3, "softcap": 4.0, "temperature": 0.7}
GATES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-3}


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def skip_what_the_interpreter_rounds_wrongly(dtype: torch.dtype) -> None:
    """Triton's interpreter truncates where a kernel stores bf16: that is judged compiled only."""
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

    @property
    def teacher(self) -> tuple[Tensor, Tensor]:
        return self.ids, self.logprobs

    def double(self) -> "Case":
        return replace(self, **{k: v.double() for k, v in vars(self).items() if k != "ids"})


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
    """`far`: a teacher of its own; `near`: the student's logits plus 0.25 nat of noise."""
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
    padded = torch.arange(k) >= counts.unsqueeze(1)
    ids = ids.masked_fill(padded, -1)
    logprobs = logprobs.masked_fill(padded, -math.inf)
    listed = torch.zeros(rows, vocab + 1, dtype=torch.bool).scatter(1, ids % (vocab + 1), True)
    tail = teacher.masked_fill(listed[:, :vocab], -math.inf).logsumexp(1)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    return Case(hidden, weight, bias, ids, logprobs.to(real), tail.to(real))


def gradients(loss, *parameters: Tensor, upstream: float = 1.0) -> tuple[Tensor, ...]:
    """(value, gradient of each parameter); loss is called on leaves made of `parameters`."""
    leaves = [p.detach().clone().requires_grad_() for p in parameters]
    value = loss(*leaves)
    (value.sum() * upstream).backward()
    return (value.detach(), *(leaf.grad for leaf in leaves))


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Frobenius; 0 when both are zero."""
    exact = exact.double()
    difference, size = (found.double() - exact).norm(), exact.norm()
    return float(difference / size) if size > 0 else float(difference)


def assert_close(
    found, exact, dtype: torch.dtype, size: float = 1.0, bounds: list[float] | None = None
) -> None:
    """The gate: gradients by relative Frobenius error, values within 1e-5 (1 + |L|).

    `size` is the scale of the row weights: values are compared without it. `bounds` of the
    gradients, from `rounding_bounds`, where dz is stored in 16 bits.
    """
    value, *grads = found
    exact_value, *exact_grads = exact
    value, exact_value = value / size, exact_value / size
    slack = 1e-5 * (1.0 + exact_value.abs())
    assert ((value.double() - exact_value).abs() <= slack).all(), (value, exact_value)
    bound = 3e-3 if dtype == torch.bfloat16 else GATES[dtype]
    bounds = [bound] * len(grads) if bounds is None else bounds
    for grad, exact_grad, bound in zip(grads, exact_grads, bounds, strict=True):
        assert grad.dtype == dtype
        assert relative_error(grad, exact_grad) <= bound, relative_error(grad, exact_grad)


def rounding_bounds(loss, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> list[float]:
    """The gate for (dH, dW) in 16 bits: 1.25 times what rounding the oracle's dz alone costs.

    `loss(hidden, weight)` calls a public function; its dz is taken in fp64 and rounded as dz is
    stored, with weights that are at most one. Without an LM head no dz is rounded.
    """
    floor = {torch.bfloat16: 3e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
    if dtype == torch.float32:
        return [floor, floor]
    calls = []

    def note(*given):
        calls.append(given)
        return given[0].new_zeros(()), given[0].new_zeros((len(given[0]), 7))

    with mock.patch.object(divergence, "run", note), mock.patch.object(policy, "run", note):
        loss(hidden.double(), weight.double())
    hidden, weight, bias, rows, head, *_ = calls[0]
    if rows.rule.endswith(":renormalize"):
        return [floor, floor]
    linear = make_linear(hidden, weight, bias, *head)
    exact, off = [torch.zeros_like(weight)], [torch.zeros_like(weight)]
    squares = torch.zeros(2, dtype=torch.float64, device=hidden.device)

    def use(dz, part_of_hidden, part, panels):
        lost = dz - dz.to(dtype).double()
        exact[0] += dz.t() @ part_of_hidden
        off[0] += lost.t() @ part_of_hidden
        squares[0] += (dz @ weight).square().sum()
        squares[1] += (lost @ weight).square().sum()

    loss_by_chunks(
        linear, rows.ids, rows.target, rows.row_weights, row_rule(rows.rule, rows.options), True,
        False, max(1, (1 << 27) // len(weight)), lambda u, part: u, use,
    )  # fmt: skip
    found = [(squares[1] / squares[0].clamp(min=1e-300)).sqrt(), off[0].norm() / exact[0].norm()]
    return [max(floor, 1.25 * float(x)) if x == x else floor for x in found]
