"""Whose ids the lists of a cache hold: the teacher's most probable, the student's, or both."""

from dataclasses import dataclass, replace

import numpy as np

from lopd.config.score import ListOf
from lopd.provenance import CacheManifest
from lopd.store import TeacherScores


@dataclass(frozen=True)
class Support:
    """Which ids are listed at each token.

    Args:
        k: most probable ids of the model, or of each of both, that `list_of` names.
        list_of: whose they are.
        top_p: the student's are cut to the smallest prefix with this much of the student's
            probability. The teacher's are cut when they are stored (`lopd.store.lists`).
        extra_ids: the student's most probable ids that are listed besides, never cut.
        eos_class: ids that are in every list.
    """

    k: int
    list_of: ListOf = "teacher"
    top_p: float = 1.0
    extra_ids: int = 0
    eos_class: tuple[int, ...] = ()

    @classmethod
    def of(cls, manifest: CacheManifest) -> "Support":
        """That of a cache."""
        scoring = manifest.scoring
        extra = 0 if scoring.support is None else scoring.support.extra_ids
        return cls(
            manifest.k,
            scoring.list_of,  # type: ignore[arg-type]  # checked when the manifest was read
            manifest.top_p,
            extra if scoring.list_of == "teacher" else 0,
            scoring.eos_class,
        )

    @property
    def student_k(self) -> int:
        """How many of the student's most probable ids are needed; 0 for none."""
        return self.extra_ids if self.list_of == "teacher" else self.k

    @property
    def teacher_k(self) -> int:
        """How many of the teacher's most probable ids an engine is asked for, at least 1."""
        return 1 if self.list_of == "student" else self.k

    @property
    def has_chosen_ids(self) -> bool:
        """Whether the teacher scores other ids than its own most probable ones."""
        return bool(self.student_k or self.eos_class)

    def chosen_ids(
        self, student: TeacherScores | None, length: int, vocab_size: int
    ) -> np.ndarray:  # [length, E] int, -1 pads
        """The ids that the teacher scores besides its own.

        Args:
            student: the student's own scores of the sequence, its `student_k` most probable ids
                among them, if any are needed.
            length: response tokens of the sequence.
            vocab_size: of the teacher; ids beyond it (padding rows of the student's head) are
                left out.
        """
        ids = np.empty((length, 0), np.int64)
        if student is not None and self.student_k:
            ids, mass = student.topk_ids, np.exp(student.topk_logprobs.astype(np.float64))
            keep = ids < vocab_size
            if self.list_of != "teacher" and self.top_p < 1:
                keep = keep & (np.cumsum(mass, axis=1) - mass < self.top_p)
            ids = np.where(keep, ids, -1)
        if self.eos_class:
            members = np.broadcast_to(np.asarray(self.eos_class), (length, len(self.eos_class)))
            ids = np.concatenate([np.where(np.isin(ids, members), -1, ids), members], axis=1)
        return ids

    def listed(self, scores: TeacherScores) -> TeacherScores:
        """The scores with the list of `list_of`: without the teacher's own ids in a student's list.

        The tail is the mass outside the remaining list, a sum and never a difference.
        """
        if self.list_of != "student":
            return scores
        assert scores.extra_ids is not None and scores.extra_tail_logprobs is not None
        tail = scores.extra_tail_logprobs.astype(np.float64)
        for ids, logprobs in zip(scores.topk_ids.T, scores.topk_logprobs.T, strict=True):
            outside = ~(scores.extra_ids == ids[:, None]).any(axis=1)
            tail = np.where(outside, np.logaddexp(tail, logprobs), tail)
        return replace(
            scores,
            topk_ids=scores.topk_ids[:, :0],
            topk_logprobs=scores.topk_logprobs[:, :0],
            tail_logprobs=np.zeros_like(scores.tail_logprobs),  # nothing is in the first list
            extra_tail_logprobs=tail.astype(np.float32),
        )


def words(list_of: str, extra_ids: int) -> str:
    """What the lists hold, for people."""
    if list_of != "teacher":
        return "student's top k" if list_of == "student" else "teacher's top k and student's top k"
    return "teacher's top k" + (" and student's top extra_ids" if extra_ids else "")
