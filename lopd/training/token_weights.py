"""Which tokens of an answer weigh more: the rules of `--token-weights`.

A rule maps columns of the tokens with loss to numbers from 0. Each answer's numbers are then scaled
so that the answer keeps its weight,

    row_weights[n] <- row_weights[n] * f_n * sum_m row_weights[m] / sum_m row_weights[m] f_m

with m over the answer of n. `num_items` therefore stays what it was, known before the first
micro-batch, and neither micro-batches nor processes change a loss. Tokens whose number is 0 are
left out before the loss is computed. A rule that reads the student's log-probs costs one more
product with the LM head, without gradient.

To add a rule, write its function, enter it in `RULES`, and name it and its settings in
`lopd/config/objective.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lopd.config.objective import Objective
from lopd.training.batch import Batch
from lopd_kernels import linear_logprobs

# Tensors of a batch that do not have one entry per row: the model's inputs, and numbers of rows.
INPUTS = ("input_ids", "attention_mask", "position_ids")
NUMBERS_OF_ROWS = ("overlap_rows", "unlisted")


@dataclass(frozen=True)
class Answers:
    """The tokens with loss of B answers as a grid, one answer per row: G = [B, longest].

    >>> answers = Answers.of(torch.tensor([0, 0, 0, 1]))
    >>> answers.grid(torch.tensor([1.0, 2.0, 3.0, 4.0]), fill=0.0).tolist()
    [[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]]
    >>> answers.lengths.tolist()
    [3, 1]
    """

    sequence: Tensor  # [N] int64, ascending: the answer of each token
    position: Tensor  # [N] int64: its number among the tokens with loss of its answer
    lengths: Tensor  # [B] int64

    @classmethod
    def of(cls, sequence_index: Tensor) -> "Answers":
        """The answers whose numbers are `sequence_index` [N], ascending."""
        lengths = torch.bincount(sequence_index)
        starts = lengths.cumsum(0) - lengths
        index = torch.arange(len(sequence_index), device=sequence_index.device)
        return cls(sequence_index, index - starts[sequence_index], lengths)

    def grid(self, values: Tensor, fill: float) -> Tensor:  # G
        """Values [N] of the tokens, and `fill` behind the end of an answer."""
        longest = int(self.lengths.max()) if len(self.lengths) else 0
        grid = values.new_full((len(self.lengths), longest), fill)
        grid[self.sequence, self.position] = values
        return grid

    def sums(self, values: Tensor) -> Tensor:  # [N]
        """The sum of values [N] over the answer of each token, always in the same order."""
        return self.grid(values, 0.0).sum(1)[self.sequence]

    def medians(self, values: Tensor) -> Tensor:  # [N]
        """The median of values [N] over the answer of each token, of two middle ones the mean."""
        ordered = self.grid(values, torch.inf).sort(1).values
        middle = torch.stack([(self.lengths - 1).clamp(min=0) // 2, self.lengths // 2], 1)
        return ordered.gather(1, middle).mean(1)[self.sequence]

    def ranks(self, values: Tensor) -> Tensor:  # [N] int64
        """The rank of values [N] in the answer of each token, 0 for the largest; earlier first."""
        order = self.grid(values, -torch.inf).argsort(dim=1, descending=True, stable=True)
        return order.argsort(1)[self.sequence, self.position]

    def kept(self, share: float) -> Tensor:  # [N] int64
        """How many tokens a share of the answer of each token is, rounded up."""
        # Rounded first: 0.3 of 10 tokens are 3, not the 4 that the rounding of 0.3 would give.
        wanted = (self.lengths.double() * share * (1 - 1e-9)).ceil().long()
        return wanted[self.sequence]


@dataclass(frozen=True)
class Columns:
    """What a rule reads, [N] each, one value per token with loss."""

    answers: Answers
    teacher_logprobs: Tensor  # log q of the sampled token
    logprobs: Tensor | None  # log p of it, by the student as it is now; where the rule asks for it
    rewards: Tensor | None  # of the answer, where every answer has one


Rule = Callable[[Columns, Objective], Tensor]  # -> [N], at least 0


def advantage(columns: Columns, objective: Objective) -> Tensor:  # [N]
    """R2-OPD: sigmoid(beta z A / median|A|) with A = log q - log p of the sampled token.

    z is 1 for an answer whose reward is above 0 and -1 for others; the median is over the answer.
    In a right answer, tokens that the teacher prefers weigh more; in a wrong one, those that it
    rejects. Where the median is 0 all weigh the same. Normaliser: the answer keeps its weight.

    Source: arXiv:2609.35517.
    """
    assert columns.logprobs is not None and columns.rewards is not None
    assert objective.weight_beta is not None
    gap = columns.teacher_logprobs - columns.logprobs
    scale = columns.answers.medians(gap.abs())
    sign = torch.where(columns.rewards > 0, 1.0, -1.0)
    ratio = torch.where(scale > 0, gap / scale, 0.0)
    return torch.sigmoid(objective.weight_beta * sign * ratio)


def divergence_rank(columns: Columns, objective: Objective) -> Tensor:  # [N]
    """DIAL: 1 for the share of an answer with the largest |r| L(p, q)^beta, 0 for the rest.

    r = log p - log q of the sampled token, and L(p, q) = (q - p) / (log q - log p), the
    logarithmic mean. beta 0 ranks by |log p - log q|, beta 1 by |p - q|. The share is rounded up.
    Normaliser: the answer keeps its weight, so a kept token weighs about 1 / share.

    Source: arXiv:2610.11659; the default of beta is ours.
    """
    assert columns.logprobs is not None and objective.weight_beta is not None
    assert objective.weight_share is not None
    first, second = columns.logprobs, columns.teacher_logprobs
    size = (first - second).abs()
    # log of |p - q| = L(p, q) size, which does not underflow
    log_difference = torch.maximum(first, second) + torch.log(-torch.expm1(-size))
    beta = objective.weight_beta
    score = (1.0 - beta) * size.log() + beta * log_difference
    score = score.masked_fill(size == 0, -torch.inf)
    answers = columns.answers
    return (answers.ranks(score) < answers.kept(objective.weight_share)).to(first.dtype)


def prefix(columns: Columns, objective: Objective) -> Tensor:  # [N]
    """1 for the first share of an answer's tokens with loss, rounded up, and 0 for the rest.

    Normaliser: the answer keeps its weight.

    Source: arXiv:2606.22600, where the first 30 % of the tokens often suffice.
    """
    assert objective.weight_share is not None
    answers = columns.answers
    kept = answers.position < answers.kept(objective.weight_share)
    return kept.to(columns.teacher_logprobs.dtype)


RULES: dict[str, Rule] = {
    "advantage": advantage,
    "divergence_rank": divergence_rank,
    "prefix": prefix,
}
NEED_STUDENT = ("advantage", "divergence_rank")


@torch.no_grad()
def weigh_tokens(
    rows: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    batch: Batch,
    objective: Objective,
    options: dict[str, Any],
) -> tuple[Tensor, Batch, dict[str, Tensor]]:
    """Weigh the tokens of a batch by the objective's rule.

    Args:
        rows: hidden states that predict the batch's labels.
        weight: of the LM head.
        batch: from `lopd.training.batch.Collator`.
        objective: its `token_weights` is one of `RULES`.
        options: as in `lopd.training.row_losses.loss_of_rows`.

    Returns:
        Which rows keep weight [N] bool; the batch of these rows; and the statistics `kept_share`,
        the share of the weight on these rows before, and `weight_moments`, from which the
        effective share of the weighted tokens is computed.
    """
    logprobs = None
    if objective.token_weights in NEED_STUDENT:
        logprobs = linear_logprobs(rows, weight, batch["labels"][:, None], **options)[:, 0]
    answers, before = Answers.of(batch["sequence_index"]), batch["row_weights"]
    columns = Columns(answers, batch["teacher_logprobs"], logprobs, batch.get("rewards"))
    factors = RULES[objective.token_weights](columns, objective)
    had = answers.sums(before)
    factors = factors * torch.where(had > 0, had / answers.sums(before * factors), 0.0)
    factors = factors.to(before.dtype)
    kept = factors != 0  # NaN stays, and is found in the loss
    log_before, log_factors = before.log(), factors.log()
    moments = torch.stack(
        [
            torch.logsumexp(log_before, 0),
            torch.logsumexp(log_before + log_factors, 0),
            torch.logsumexp(log_before + 2 * log_factors, 0),
        ]
    )
    statistics = {"kept_share": (before * kept).sum(), "weight_moments": moments}
    return kept, select_rows({**batch, "row_weights": before * factors}, kept), statistics


def select_rows(batch: Batch, kept: Tensor) -> Batch:
    """The batch without the rows [N] where `kept` is False."""
    others = (*INPUTS, *NUMBERS_OF_ROWS)
    selected = {
        name: value[kept] if isinstance(value, Tensor) and name not in others else value
        for name, value in batch.items()
    }
    number = kept.cumsum(0) - 1
    for name in NUMBERS_OF_ROWS:
        if name in batch:
            chosen = batch[name]
            selected[name] = number[chosen[kept[chosen]]]
    return selected
