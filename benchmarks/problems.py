"""Benchmark problems: random heads and teachers from a seed, and the fp64 oracle of each loss.

The student's rows range from flat to sharp: a hidden state is noise plus a component of random
strength towards a few ids, so the mass outside the top 64 ranges from almost 0 to almost 1. The
teacher uses its own hidden states and the same weight, so losses on dense teacher logits and losses
on a top-k list are measured on the same distributions. `near` is the student plus 0.25 nat of noise
on its logits; `far` is independent of the student.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lopd_kernels import sparse_divergence

SPREAD = 2.0  # standard deviation of a logit
NOISE = 0.25  # nat, teacher against student in the near regime
FAVOURITES = 8
CHUNK_BYTES = 512 << 20
REVERSE_KL, RENORMALIZED = "reverse KL, tail bucket", "reverse KL, renormalised top-k"
DENSE_KL = "reverse KL, dense teacher"
FORWARD_KL, FORWARD_TRUNCATED = "forward KL, tail bucket", "forward KL, truncated top-k"
CROSS_ENTROPY, POLICY_GRADIENT = "cross-entropy", "policy gradient"


@dataclass(frozen=True)
class Shape:
    rows: int
    hidden: int
    vocab: int
    topk: int

    def __str__(self) -> str:
        return f"N={self.rows} D={self.hidden} V={self.vocab} K={self.topk}"


@dataclass(frozen=True)
class Problem:
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    teacher_hidden: Tensor  # [N, D], multiplied with the same weight
    ids: Tensor  # [N, K] the teacher's most probable
    logprobs: Tensor  # [N, K]
    tail: Tensor  # [N]
    labels: Tensor  # [N] sampled from the student
    label_logprobs: Tensor  # [N] the teacher's log-prob of the label
    regime: str

    @property
    def shape(self) -> Shape:
        return Shape(*self.hidden.shape, self.weight.shape[0], self.ids.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def rows(self, part: slice) -> Problem:
        """The problem restricted to these rows; it shares the weight."""
        fields = {k: v[part] for k, v in vars(self).items() if k in PER_ROW}
        return replace(self, **fields)

    def parts(self, itemsize: int) -> Iterator[tuple[slice, Problem]]:
        """Chunks of rows whose logits at `itemsize` bytes fit CHUNK_BYTES."""
        size = max(1, CHUNK_BYTES // (itemsize * self.weight.shape[0]))
        for start in range(0, self.shape.rows, size):
            part = slice(start, start + size)
            yield part, self.rows(part)

    @cached_property
    def dlogits(self) -> Tensor:
        """[N, V] gradient of the reverse KL in the inputs' dtype: an operand of GEMMs 2 and 3."""
        out = self.hidden.new_empty((self.shape.rows, self.shape.vocab))
        for part, chunk in self.parts(4):
            logits = wide_mm(chunk.hidden, chunk.weight.t()).requires_grad_()
            loss = sparse_divergence(
                logits, chunk.ids, chunk.logprobs, tail_logprobs=chunk.tail, reduction="sum",
                validate=False,
            )  # fmt: skip
            (out[part],) = torch.autograd.grad(loss, logits)
        return out

    @cached_property
    def buffer(self) -> Tensor:
        """[V, D] fp32 zeros, the gradient buffer of a caller."""
        return torch.zeros_like(self.weight, dtype=torch.float32)


PER_ROW = {"hidden", "teacher_hidden", "ids", "logprobs", "tail", "labels", "label_logprobs"}


def wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a b with 16-bit operands and an fp32 result."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def make_problem(
    shape: Shape,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    regime: str = "near",
    seed: int = 0,
    sharpest: float = 20.0,  # nat; the largest advantage of the first favourite
) -> Problem:
    n, d, v, k = shape.rows, shape.hidden, shape.vocab, shape.topk
    generator = torch.Generator(device).manual_seed(seed)
    noise = {"generator": generator, "device": device}
    weight = torch.randn(v, d, **noise).mul_(SPREAD * d**-0.5)
    hidden = torch.randn(n, d, **noise)
    strength = sharpest / SPREAD * torch.rand(n, 1, **noise)
    for place in range(FAVOURITES):
        direction = weight[torch.randint(v, (n,), **noise)]
        hidden += strength * 0.8**place * direction / direction.norm(dim=1, keepdim=True)
    other = torch.randn(n, d, **noise)
    teacher_hidden = hidden + NOISE / SPREAD * other if regime == "near" else other
    real = {"dtype": torch.float32, "device": device}
    problem = Problem(
        hidden.to(dtype),
        weight.to(dtype),
        teacher_hidden.to(dtype),
        torch.empty((n, k), dtype=torch.int64, device=device),
        torch.empty((n, k), **real),
        torch.empty(n, **real),
        torch.empty(n, dtype=torch.int64, device=device),
        torch.empty(n, **real),
        regime,
    )
    for _, chunk in problem.parts(4):
        student = wide_mm(chunk.hidden, chunk.weight.t())
        chunk.labels.copy_(
            (student - torch.empty_like(student).exponential_(generator=generator).log_()).argmax(1)
        )
        teacher = wide_mm(chunk.teacher_hidden, chunk.weight.t()).log_softmax(1)
        chunk.label_logprobs.copy_(teacher.gather(1, chunk.labels.unsqueeze(1))[:, 0])
        logprobs, ids = teacher.topk(k, 1)
        chunk.ids.copy_(ids)
        chunk.logprobs.copy_(logprobs)
        chunk.tail.copy_(teacher.scatter_(1, ids, -torch.inf).logsumexp(1))
    return problem


def _buckets(z: Tensor, ids: Tensor) -> Tensor:
    """Log-probs of the ids and of the rest of the vocabulary, [R, K+1]."""
    rest = z.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([z.gather(1, ids), rest], 1) - z.logsumexp(1, keepdim=True)


def row_losses(loss: str, z: Tensor, problem: Problem, weight: Tensor) -> Tensor:
    """Losses [R] from logits z [R, V] of the problem's rows; `weight` has the dtype of z."""
    logprobs = problem.logprobs.to(z.dtype)
    if loss in (REVERSE_KL, FORWARD_KL):
        student = _buckets(z, problem.ids)
        teacher = torch.cat([logprobs, problem.tail.to(z.dtype).unsqueeze(1)], 1)
    elif loss == FORWARD_TRUNCATED:
        student, teacher = z.log_softmax(1).gather(1, problem.ids), logprobs
    elif loss == RENORMALIZED:
        student = z.gather(1, problem.ids).log_softmax(1)
        teacher = logprobs.log_softmax(1)
    elif loss == DENSE_KL:
        student = z.log_softmax(1)
        teacher = (problem.teacher_hidden.to(z.dtype) @ weight.t()).log_softmax(1)
    else:
        logprob = z.log_softmax(1).gather(1, problem.labels.unsqueeze(1))[:, 0]
        if loss == CROSS_ENTROPY:
            return -logprob
        assert loss == POLICY_GRADIENT, loss
        return -(problem.label_logprobs.to(z.dtype) - logprob.detach()) * logprob
    if loss in (FORWARD_KL, FORWARD_TRUNCATED):
        student, teacher = teacher, student
    return (student.exp() * (student - teacher)).sum(1)


@dataclass(frozen=True)
class Exact:
    """The mean loss of a problem in fp64."""

    losses: Tensor  # [N]
    dhidden: Tensor  # [N, D]
    dweight: Tensor  # [V, D]
    rounding: tuple[float, float]  # error of (dH, dW) if dz and they are rounded to the dtype
    gemm: float  # worst |L_n error| / (1 + |L_n|) if only the logits come from an fp32 GEMM


def oracle(problem: Problem, loss: str) -> Exact:
    """Value and gradients of the mean loss in fp64, on the problem's device, by chunks of rows."""
    weight = problem.weight.double()
    hidden = problem.hidden.double()
    losses, gemm = hidden.new_empty(len(hidden)), 0.0
    exact = torch.empty_like(hidden), torch.zeros_like(weight)
    narrow = problem.dtype.itemsize == 2
    rounded = (torch.empty_like(hidden), torch.zeros_like(weight)) if narrow else exact
    for part, chunk in problem.parts(8):
        z = (hidden[part] @ weight.t()).requires_grad_()
        value = row_losses(loss, z, chunk, weight)
        (dz,) = torch.autograd.grad(value.sum(), z)
        losses[part] = value.detach()
        with torch.no_grad():
            wide = wide_mm(chunk.hidden, chunk.weight.t()).double()
            value = row_losses(loss, wide, chunk, weight)
            gemm = max(gemm, loss_error(value, losses[part]))
        for dh, dw in (exact, rounded) if narrow else (exact,):
            torch.mm(dz, weight, out=dh[part])
            dw.addmm_(dz.t(), hidden[part])
            dz = dz.to(problem.dtype).double()
    rounding = tuple(
        relative_error(a.to(problem.dtype), b) for a, b in zip(rounded, exact, strict=True)
    )
    del rounded
    for grad in exact:
        grad /= max(1, len(hidden))
    return Exact(losses, *exact, rounding, gemm)  # type: ignore[arg-type]


def loss_error(value: Tensor, exact: Tensor) -> float:
    """Worst |value - exact| / (1 + |exact|); NaN stays NaN."""
    return float(((value.double() - exact).abs() / (1.0 + exact.abs())).amax())


def relative_error(value: Tensor, exact: Tensor) -> float:
    """|value - exact| / |exact| in Frobenius norm, panel by panel; NaN stays NaN."""
    difference = size = 0.0
    for start in range(0, len(exact), 1 << 14):
        part = slice(start, start + (1 << 14))
        difference += float((value[part].double() - exact[part]).square().sum())
        size += float(exact[part].square().sum())
    return (difference / size) ** 0.5 if size else difference**0.5


def student_tail(problem: Problem) -> list[float]:
    """Quantiles 0.1, 0.5, 0.9 of the student's mass outside the list."""
    masses = [
        _buckets(wide_mm(chunk.hidden, chunk.weight.t()), chunk.ids)[:, -1].exp()
        for _, chunk in problem.parts(4)
    ]
    quantiles = torch.tensor([0.1, 0.5, 0.9], device=problem.device)
    return [float(x) for x in torch.cat(masses).quantile(quantiles)]
