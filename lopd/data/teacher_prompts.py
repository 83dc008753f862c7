"""Prompts of the teacher's own: what it reads before the student's answers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import numpy as np

from lopd.data.prompt_records import RecordSource
from lopd.data.teacher_template import TeacherTemplate
from lopd.errors import DataError
from lopd.models.load import load_tokenizer
from lopd.provenance.io import json_digest
from lopd.store import Rollout


@dataclass(frozen=True)
class TeacherPrompts:
    """The teacher's prompt for each prompt of the rollouts."""

    tokens: Mapping[str, np.ndarray]  # int32, by prompt id
    places: Mapping[str, str]  # of the records

    @classmethod
    def render(
        cls,
        template: str,
        source: str,  # file of the template, for messages
        teachers: Mapping[str | None, str],
        teacher_of: Mapping[str, str | None],
        records: RecordSource,
        prompts: Mapping[str, np.ndarray],
        student: str,
        today: date | None,
    ) -> "TeacherPrompts":
        """Fill in the template for every prompt, as the tokenizer of its teacher does.

        Args:
            teachers: model folders by name; one without a name under None.
            teacher_of: the name of the teacher by prompt id.
            student: model folder.
            prompts: the student's prompts, as in `RecordSource.find`.
            today: the date that the teacher's chat template writes.

        Raises:
            ConfigError, DataError: as `TeacherTemplate` and `RecordSource.find`; or the records of
                one prompt give different prompts.
        """
        rendered = {
            name: TeacherTemplate(template, source, load_tokenizer(folder), today)
            for name, folder in teachers.items()
        }
        tokens: dict[str, np.ndarray] = {}
        places: dict[str, str] = {}
        for record in records.find(prompts, student):
            name, where = record.name, record.place
            own = rendered[teacher_of[name]]
            ids = np.array(own.tokens(record.fields, where), np.int32)
            if name in tokens and not np.array_equal(ids, tokens[name]):
                raise DataError(
                    f"{where}: {source} renders another prompt for '{name}' than at "
                    f"{places[name]}; give the records different ids, or the same fields"
                )
            tokens[name], places[name] = ids, places.get(name, where)
        return cls(tokens, places)

    def digest(self) -> str:
        """sha256 of all prompts."""
        return json_digest({name: ids.tolist() for name, ids in self.tokens.items()})

    def seen_by_teacher(self, rollout: Rollout) -> Rollout:
        """A sequence as the teacher reads it: the same answer after the teacher's prompt.

        Entry t of its scores is of response token t, as in the student's sequence.
        """
        prompt, at = self.tokens[rollout.prompt_id], rollout.prompt_length
        return replace(
            rollout,
            tokens=np.concatenate([prompt, rollout.tokens[at:]]),
            prompt_length=len(prompt),
            loss_mask=np.concatenate([np.zeros(len(prompt), bool), rollout.loss_mask[at:]]),
        )


def prompts_of(rollouts: Any) -> dict[str, np.ndarray]:
    """The student's prompt by id, from the sequences of a store or cache."""
    found: dict[str, np.ndarray] = {}
    for rollout in rollouts:
        found.setdefault(rollout.prompt_id, rollout.tokens[: rollout.prompt_length].copy())
    return found
