"""Cross-fitted means of log q - log p_ref, by which a cache is calibrated (`lopd calibrate`).

With q the teacher, p_ref the policy that sampled the rollouts, and d = log q - log p_ref of a
sampled token y at position t of its answer,

    log q~(y) = log q(y) - (m_tok(y) + m_ctx(b(t), c(-log p_ref(y)))) / 2

m_tok is the mean of d over the tokens with loss that are y, m_ctx that over the tokens in the same
bin b of the position and bin c of the surprisal. The prompts are divided into folds, and the means
that a token is calibrated with are over the other folds. Where these have no such token, the mean
is 0.

What another teacher prefers everywhere, and would teach a student that was fine-tuned on
someone else's answers, is in these means; what it says about one answer is not.

Source: Lightning OPD 2.0, arXiv:2607.28449, which leaves the bins open; these are ours.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np

from lopd.store import TeacherSequence
from lopd.store.types import prompt_name
from lopd.training.metrics import POSITIONS

SURPRISALS = (0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0)  # nat; where the bins begin


def fold_of(prompt_id: str, folds: int) -> int:
    """The fold of a prompt, by a hash of its name: it depends on no other prompt."""
    name = prompt_name(prompt_id).encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") % folds


class _CrossMeans:
    """Means over cells, each without one fold."""

    def __init__(self, folds: int, cells: int) -> None:
        self.sums = np.zeros((folds, cells))
        self.counts = np.zeros((folds, cells), np.int64)

    def add(self, fold: int, cells: np.ndarray, values: np.ndarray) -> None:
        size = self.sums.shape[1]
        # Only the cells that occur are touched: a sequence has few of the vocabulary's ids.
        used, index = np.unique(cells, return_inverse=True)
        assert not len(used) or used[-1] < size
        self.sums[fold, used] += np.bincount(index, values, len(used))
        self.counts[fold, used] += np.bincount(index, minlength=len(used))

    def without(self, fold: int, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means over the other folds, 0 where they have none, and their counts."""
        others = np.arange(len(self.sums)) != fold
        sums, counts = self.sums[others][:, cells].sum(0), self.counts[others][:, cells].sum(0)
        return sums / np.maximum(counts, 1), counts


@dataclass
class Summary:
    """What a calibration does to the tokens with loss, as sums over them."""

    tokens: int = 0
    before: np.ndarray = field(default_factory=lambda: np.zeros(2))  # of d, and of its square
    after: np.ndarray = field(default_factory=lambda: np.zeros(2))
    unseen: int = 0  # tokens whose id the other folds lack

    def rows(self) -> dict[str, object]:
        """Means and standard deviations by name."""
        rows: dict[str, object] = {"tokens": self.tokens}
        for name, (total, squares) in (("before", self.before), ("after", self.after)):
            mean = total / self.tokens
            spread = np.sqrt(max(squares / self.tokens - mean**2, 0.0))
            rows[f"log q - log p_ref {name}"] = f"mean {mean:.4g}, deviation {spread:.4g} nat"
        rows["ids unseen in other folds"] = f"{self.unseen / self.tokens:.2%} of the tokens"
        return rows


class Calibration:
    """The means of a cache, collected by `add` and applied by `calibrated`.

    Memory: 16 bytes for each id of the vocabulary and fold, whatever the size of the cache.

    Args:
        vocab_size: of the cache.
        folds: parts of the prompts.
        source: the column of `Rollout` that is log p_ref.
    """

    def __init__(self, vocab_size: int, folds: int, source: str) -> None:
        self.folds, self.source = folds, source
        self.by_token = _CrossMeans(folds, vocab_size)
        self.by_context = _CrossMeans(folds, len(POSITIONS) * len(SURPRISALS))
        self.summary = Summary()

    @property
    def folds_used(self) -> int:
        """The number of folds that have a token with loss."""
        return int((self.by_context.counts.sum(1) > 0).sum())

    def add(self, sequence: TeacherSequence) -> None:
        """Count the tokens with loss of a sequence."""
        fold = fold_of(sequence.rollout.prompt_id, self.folds)
        _, ids, contexts, gaps = self._columns(sequence)
        self.by_token.add(fold, ids, gaps)
        self.by_context.add(fold, contexts, gaps)

    def calibrated(self, sequence: TeacherSequence) -> np.ndarray:  # [R] fp32
        """The calibrated log-probs of a sequence; those of tokens without loss are as they were."""
        fold = fold_of(sequence.rollout.prompt_id, self.folds)
        rows, ids, contexts, gaps = self._columns(sequence)
        by_token, counts = self.by_token.without(fold, ids)
        by_context, _ = self.by_context.without(fold, contexts)
        shift = (by_token + by_context) / 2
        result = sequence.teacher_logprobs.astype(np.float64)
        result[rows] -= shift
        self._summarise(gaps, gaps - shift, int((counts == 0).sum()))
        return result.astype(np.float32)

    def _columns(
        self, sequence: TeacherSequence
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of the tokens with loss: their rows, ids, cells of the context, and d."""
        rollout = sequence.rollout
        rows = np.flatnonzero(rollout.loss_mask[rollout.prompt_length :])
        reference = getattr(rollout, self.source)[rows].astype(np.float64)
        position = np.searchsorted(POSITIONS, rows, side="right") - 1
        surprisal = np.searchsorted(SURPRISALS, np.maximum(-reference, 0.0), side="right") - 1
        contexts = position * len(SURPRISALS) + surprisal
        gaps = sequence.teacher_logprobs[rows].astype(np.float64) - reference
        return rows, rollout.tokens[rollout.prompt_length :][rows], contexts, gaps

    def _summarise(self, before: np.ndarray, after: np.ndarray, unseen: int) -> None:
        summary = self.summary
        summary.tokens += len(before)
        summary.unseen += unseen
        summary.before += [before.sum(), np.square(before).sum()]
        summary.after += [after.sum(), np.square(after).sum()]
