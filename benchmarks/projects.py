"""Losses of other projects for on-policy distillation, in eager PyTorch.

Formulas and order of operations follow the sources of the projects as of August 2026; the code is
our own. Some projects have a floor under a log-prob or a loss. It is omitted here, so that each
function has the gradient of a loss with a formula. Logits are a 16-bit product, widened for the
softmax, unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.problems import Problem

RowLoss = Callable[..., Tensor]  # (fp32 logits [R, V], the row inputs of the loss) -> [R]
Teacher = tuple[Tensor, Tensor, Tensor]  # ids [N, K], logprobs [N, K], tail [N]


def teacher(problem: Problem) -> Teacher:
    return problem.ids, problem.logprobs, problem.tail


def sampled(problem: Problem) -> tuple[Tensor, Tensor]:
    return problem.labels, problem.label_logprobs


def tail_bucket(logits: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor) -> Tensor:
    """[N] reverse KL from fp32 logits, as log_softmax, gather and 1 - sum."""
    student = logits.log_softmax(1).gather(1, ids)
    rest = torch.log1p(-student.exp().sum(1).clamp(max=1.0 - 2.0**-23))
    listed = (student.exp() * (student - logprobs)).sum(1)
    return listed + rest.exp() * (rest - tail)


def renormalised(logits: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor) -> Tensor:
    """[N] reverse KL over the renormalised list, by a full log-softmax and gather."""
    student = logits.log_softmax(1).gather(1, ids).log_softmax(1)
    return (student.exp() * (student - logprobs.log_softmax(1))).sum(1)


def truncated_forward(logits: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor) -> Tensor:
    """[N] forward KL over the list without renormalising."""
    student = logits.log_softmax(1).gather(1, ids)
    return (logprobs.exp() * (logprobs - student)).sum(1)


def bucket_forward(logits: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor) -> Tensor:
    """[N] forward KL with a tail bucket; the student's tail is 1 minus its listed mass."""
    student = logits.log_softmax(1).gather(1, ids)
    rest = torch.log1p(-student.logsumexp(1).clamp(max=-1e-7).exp())
    return (logprobs.exp() * (logprobs - student)).sum(1) + tail.exp() * (tail - rest)


def advantage_times_logprob(logits: Tensor, labels: Tensor, logprobs: Tensor) -> Tensor:
    """[N] -A log p of the sampled token, A = log q - log p without gradient."""
    student = logits.log_softmax(1).gather(1, labels.unsqueeze(1))[:, 0]
    return -(logprobs - student.detach()) * student


def full(row_loss: RowLoss, problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    """Mean over the rows, with all logits at once."""
    inputs = sampled if row_loss is advantage_times_logprob else teacher
    return row_loss((hidden @ weight.t()).float(), *inputs(problem)).mean()


def in_chunks(
    row_loss: RowLoss,
    problem: Problem,
    hidden: Tensor,
    weight: Tensor,
    *,
    rows: int,
    wide: bool = False,
) -> Tensor:
    """The same in checkpointed chunks of rows; `wide` widens the operands to fp32."""

    def total(part: Tensor, weight: Tensor, *inputs: Tensor) -> Tensor:
        logits = part.float() @ weight.float().t() if wide else (part @ weight.t()).float()
        return row_loss(logits, *inputs).sum()

    value = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        inputs = (x[part] for x in teacher(problem))
        value = value + checkpoint(total, hidden[part], weight, *inputs, use_reentrant=False)
    return value / len(hidden)


eager = partial(full, tail_bucket)
eager_renormalised = partial(full, renormalised)
