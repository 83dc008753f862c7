"""The losses that users of on-policy distillation run today, as their projects compute them.

Formulas and order of operations are those of the projects, read in their sources in August
2026; the code is not theirs. A floor under a log-prob or under a loss, which some of them
have, is left out, so that each has the gradient of a loss that can be stated. Logits are a
product in 16 bits, widened for the softmax, unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.problems import Problem

RowLoss = Callable[..., Tensor]  # (fp32 logits [R, V], what the loss wants of the rows) -> [R]
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
    """[N] reverse KL over the list, through a full log-softmax and gather."""
    student = logits.log_softmax(1).gather(1, ids).log_softmax(1)
    return (student.exp() * (student - logprobs.log_softmax(1))).sum(1)


def truncated_forward(logits: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor) -> Tensor:
    """[N] forward KL over the list as it is."""
    student = logits.log_softmax(1).gather(1, ids)
    return (logprobs.exp() * (logprobs - student)).sum(1)


def bucket_forward(logits: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor) -> Tensor:
    """[N] forward KL with one bucket for the tail, the student's from its listed mass."""
    student = logits.log_softmax(1).gather(1, ids)
    rest = torch.log1p(-student.logsumexp(1).clamp(max=-1e-7).exp())
    return (logprobs.exp() * (logprobs - student)).sum(1) + tail.exp() * (tail - rest)


def advantage_times_logprob(logits: Tensor, labels: Tensor, logprobs: Tensor) -> Tensor:
    """[N] -A log p of the sampled token, A = log q - log p without gradient."""
    student = logits.log_softmax(1).gather(1, labels.unsqueeze(1))[:, 0]
    return -(logprobs - student.detach()) * student


def full(row_loss: RowLoss, problem: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    """Mean over the rows from all logits at once."""
    given = sampled if row_loss is advantage_times_logprob else teacher
    return row_loss((hidden @ weight.t()).float(), *given(problem)).mean()


def in_chunks(
    row_loss: RowLoss,
    problem: Problem,
    hidden: Tensor,
    weight: Tensor,
    *,
    rows: int,
    wide: bool = False,
) -> Tensor:
    """The same by checkpointed chunks of rows, with operands widened to fp32 where `wide`."""

    def total(part: Tensor, weight: Tensor, *given: Tensor) -> Tensor:
        logits = part.float() @ weight.float().t() if wide else (part @ weight.t()).float()
        return row_loss(logits, *given).sum()

    value = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(hidden), rows):
        some = slice(start, start + rows)
        given = (x[some] for x in teacher(problem))
        value = value + checkpoint(total, hidden[some], weight, *given, use_reentrant=False)
    return value / len(hidden)


eager = partial(full, tail_bucket)
eager_renormalised = partial(full, renormalised)
