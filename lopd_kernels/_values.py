"""Checks of values, decided together: on a GPU a call waits for the device once.

A check adds a tensor that is true where a value is invalid. `ValueChecks.finish` reads whether any
is, and only then looks for the first one and explains it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

MASS_SLACK = 1e-3
ROUNDING = 1e-6  # of a list's mass in fp32, beyond one epsilon times 1 + sum_k q_k |log q_k|
LEAST_LISTED = 1e-4  # no list ends at this probability and has nothing beyond it but rounding


def checks_values(validate: bool | None, like: Tensor) -> bool:
    """`validate`; None checks values, except on the meta device, compiling or capturing."""
    if validate is not None:
        return validate
    if torch.compiler.is_compiling() or like.is_meta:
        return False
    return not (like.is_cuda and torch.cuda.is_current_stream_capturing())


def _in_float32(*logprobs: Tensor | None) -> str:
    """The remedy where rounding to 16 bits may be the cause: it moves a mass by about 0.2 %."""
    narrow = [x.dtype for x in logprobs if x is not None and x.dtype.itemsize == 2]
    return f", computed in float32 and not in {narrow[0]}" if narrow else ""


class ValueChecks:
    """The checks of one call. Rows of weight 0 may hold anything."""

    def __init__(self, row_weights: Tensor | None = None) -> None:
        self._checks: list[tuple[Tensor, Callable[[Tensor], str]]] = []
        self._weights = row_weights
        self._unweighted = None if row_weights is None else row_weights == 0

    def mask(self, tensor: Tensor, fill: float) -> Tensor:
        """`tensor` with `fill` in rows of weight 0."""
        if self._unweighted is None:
            return tensor
        rows = self._unweighted.unsqueeze(1) if tensor.dim() == 2 else self._unweighted
        return tensor.masked_fill(rows, fill)

    def refuse(self, bad: Tensor, explain: Callable[[Tensor], str]) -> None:
        """`explain(index)` says what is wrong at the first true index of `bad`."""
        self._checks.append((bad, explain))

    def finish(self) -> None:
        """Raises ValueError if a check has failed."""
        if not self._checks or not torch.cat([bad.flatten() for bad, _ in self._checks]).any():
            return
        for bad, explain in self._checks:
            if bad.any():
                raise ValueError(explain(bad.nonzero()[0]))

    def ids(
        self, name: str, ids: Tensor, vocab: int, *, pads: bool = True, distinct: bool = True
    ) -> None:
        """ids [N] or [N, K] in the vocabulary, or -1 if there are pads."""
        ids = self.mask(ids, -1 if pads else 0)

        def out_of_range(index: Tensor) -> str:
            found, row = int(ids[tuple(index)]), int(index[0])
            padding = " or -1 for padding" if pads else ""
            remedy = "check that teacher and student share the tokenizer"
            if found < 0:
                remedy = "pass the rows that bear loss, or give the others weight 0"
                remedy = "mark padding by -1" if pads else remedy
            return (
                f"{name} has {found} in row {row}, expected ids from 0 to {vocab - 1}{padding}; "
                f"{remedy}"
            )

        self.refuse((ids < (-1 if pads else 0)) | (ids >= vocab), out_of_range)
        if not distinct or ids.dim() == 1:
            return
        ordered = ids.sort(1).values
        repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        self.refuse(
            repeated,
            lambda index: (
                f"{name} has id {int(ordered[tuple(index)])} twice in row {int(index[0])}, "
                "expected distinct ids; add up the probabilities of equal ids"
            ),
        )

    def finite(self, name: str, tensor: Tensor) -> None:
        """Finite values [N]."""
        tensor = self.mask(tensor, 0.0)
        self.refuse(
            ~tensor.isfinite(),
            lambda index: (
                f"{name} is {float(tensor[index[0]])} in row {int(index[0])}, expected a finite "
                "number"
            ),
        )

    def logprobs(self, name: str, tensor: Tensor) -> None:
        """Log-probs [N] of single tokens: finite, and at most 0 within rounding."""
        self.finite(name, tensor)
        tensor = self.mask(tensor, 0.0)
        self.refuse(
            tensor > MASS_SLACK,
            lambda index: (
                f"{name} is {float(tensor[index[0]]):.6g} in row {int(index[0])}, expected a "
                "log-prob, at most 0; pass log-probs of the full softmax, not probabilities or "
                "logits"
            ),
        )

    def weights(self, reduction: str) -> None:
        """The row weights themselves."""
        weights = self._weights
        if weights is None:
            return
        self.refuse(
            ~weights.isfinite(),
            lambda index: (
                f"row_weights is {float(weights[index[0]])} in row {int(index[0])}, expected a "
                "finite number"
            ),
        )
        if reduction == "mean":
            self.refuse(
                weights < 0,
                lambda index: (
                    f"row_weights has negative entries, the first in row {int(index[0])}, but "
                    "reduction='mean' divides by their sum; use reduction='sum' or 'none'"
                ),
            )

    def teacher(
        self,
        ids: Tensor,  # [N, K]
        logprobs: Tensor,  # [N, K]
        tail_logprobs: Tensor | None,  # [N]; None if it is derived, or not used
        vocab: int,
        *,
        derives_tail: bool,
    ) -> None:
        """Log-probs whose mass is at most 1 per row, taken from the full softmax.

        A row without ids or with all of them does not use its tail.
        """
        ids = self.mask(ids, -1)
        listed = ids >= 0
        self.refuse(
            listed & ~logprobs.isfinite(),
            lambda index: (
                f"topk_logprobs is {float(logprobs[tuple(index)])} in row {int(index[0])}, "
                "expected finite log-probs; drop ids without mass from the list (id -1)"
            ),
        )
        on_list = logprobs.double().masked_fill(~listed, -math.inf)
        mass, counts = on_list.logsumexp(1), listed.sum(1)
        short = (counts > 0) & (counts < vocab)
        if tail_logprobs is not None:
            tail = tail_logprobs.double()
            self.refuse(
                (tail.isnan() | (tail == math.inf)) & short,
                lambda index: (
                    f"tail_logprobs is {float(tail[index[0]])} in row {int(index[0])}, expected a "
                    "log-prob, or -inf if no mass is left"
                ),
            )
            total = torch.where(short, torch.logaddexp(mass, tail), mass)
        else:
            total = mass
        self.refuse(
            total > math.log1p(MASS_SLACK),
            lambda index: (
                f"the teacher's probabilities sum to {float(total[index[0]].exp()):.6g} in row "
                f"{int(index[0])}, expected at most 1 + {MASS_SLACK}; pass log-probs of the full "
                f"softmax{_in_float32(logprobs, tail_logprobs)}, not logits or probabilities"
            ),
        )
        if derives_tail:
            self._not_renormalized(logprobs.dtype, listed, on_list, mass, short)

    def sample(
        self,
        topk_ids: Tensor,  # [N, K]
        tail_logprobs: Tensor,  # [N] of the teacher, given or derived
        scores: Tensor,  # what it is given as, or derived from
        vocab: int,
        sampled_ids: Tensor,  # [N]
        sampled_logprobs: Tensor,  # [N]
        rollout_logprobs: Tensor,  # [N]
    ) -> None:
        """The sampled token of each row that has a list."""
        empty = (topk_ids == -1).all(1)
        listed = (topk_ids == sampled_ids.unsqueeze(1)).any(1)
        self.ids("sampled_ids", sampled_ids.masked_fill(empty, 0), vocab, pads=False)
        self.logprobs("sampled_logprobs", sampled_logprobs.masked_fill(empty, -1.0))
        self.logprobs("rollout_logprobs", rollout_logprobs.masked_fill(empty, -1.0))
        p, tail = sampled_logprobs.double().exp(), tail_logprobs.double().exp()
        self.refuse(
            self.mask(p - tail, 0.0).masked_fill(empty | listed, 0.0) > MASS_SLACK,
            lambda index: (
                f"sampled_logprobs is the log of {float(p[index[0]]):.6g} in row {int(index[0])}, "
                f"but the teacher has {float(tail[index[0]]):.6g} outside its list, where the "
                "sampled id is; pass scores of the same teacher and temperature"
                f"{_in_float32(scores, sampled_logprobs)}"
            ),
        )

    def _not_renormalized(
        self, dtype: torch.dtype, listed: Tensor, on_list: Tensor, mass: Tensor, short: Tensor
    ) -> None:
        """Refuse lists that each have mass 1 within rounding although they are short.

        A peaked teacher has such rows too, but its lists end at tiny probabilities.
        """
        spread = -(on_list.exp() * on_list.masked_fill(~listed, 0.0)).sum(1)
        rounding = ROUNDING + torch.finfo(dtype).eps * (1.0 + spread)
        whole = torch.expm1(mass).abs() <= rounding
        last = on_list.masked_fill(~listed, math.inf).amin(1)
        empty = ~listed.any(1)
        suspicious = (whole & short | empty).all() & (short & (last > math.log(LEAST_LISTED))).any()
        self.refuse(
            suspicious.reshape(1),
            lambda index: (
                "topk_logprobs sum to 1 in every row although no row lists all ids: they were "
                "renormalised over the list, and the mass outside it is lost; pass log-probs of "
                "the full softmax (logits.log_softmax(-1).topk(k)), or use tail='renormalize'; if "
                "there is no mass outside, pass tail_logprobs (-inf, or its log)"
            ),
        )
