"""Which teacher scores which rollouts: the parts of a cache, one for each of its shards.

With one teacher, shard i of the cache holds the sequences of shard i of the rollouts. With several,
a field of the prompts' records names the teacher of each. The shards of the first teacher come
first, in the order of the rollouts, then those of the next, so that a shard belongs to one teacher
and one model is in memory at a time.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from lopd.config.score import ScoreConfig
from lopd.data.prompt_records import RecordSource
from lopd.data.prompts import Routes
from lopd.data.shapes import at
from lopd.data.teacher_prompts import prompts_of
from lopd.errors import DataError
from lopd.provenance.io import json_digest
from lopd.stages.rollout_student import find_student
from lopd.store import Rollout, RolloutStore
from lopd.store.types import name_of


@dataclass(frozen=True)
class Part:
    """What a shard of the cache holds: sequences of one shard of the rollouts, for one teacher."""

    teacher: str | None  # its name; None for a teacher without one
    shard: int  # of the rollouts
    names: frozenset[str]  # of the sequences

    def read(self, rollouts: RolloutStore) -> list[Rollout]:
        """The sequences, in the order of the rollouts."""
        return [r for r in rollouts.shard(self.shard) if name_of(r) in self.names]


class Selection(Sequence[Rollout]):
    """The sequences of some parts, each read when it is asked for."""

    def __init__(self, rollouts: RolloutStore, parts: Sequence[Part]) -> None:
        self.rollouts, self.parts = rollouts, parts
        self.ends = list(accumulate(len(part.names) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: Any) -> Any:
        number = bisect_right(self.ends, range(len(self))[index])
        return self.parts[number].read(self.rollouts)[index - self.ends[number]]


@dataclass(frozen=True)
class Routing:
    """The parts of a cache, and what its manifest records of the way to them."""

    parts: tuple[Part, ...]
    described: Mapping[str, Any] | None = None  # None with one teacher
    teacher_of: Mapping[str, str | None] | None = None  # by prompt id; None with one teacher


def routing_of(config: ScoreConfig, rollouts: RolloutStore) -> Routing:
    """Divide the rollouts among the teachers.

    Raises:
        DataError: a prompt names no teacher or an unknown one, or is not in the file.
        ConfigError: no prompt names one of the teachers, or the file of the prompts is unknown.
        MissingFileError: that file is not there, or the student whose tokenizer it needs.
    """
    shards = range(rollouts.num_shards)
    if config.teacher_field is None:
        whole = [frozenset(map(name_of, rollouts.shard(i))) for i in shards]
        return Routing(tuple(Part(None, i, whole[i]) for i in shards))
    teachers, path = _teachers_of_prompts(config, rollouts)
    names: dict[tuple[str, int], set[str]] = {}
    for shard in shards:
        for rollout in rollouts.shard(shard):
            key = (teachers[rollout.prompt_id], shard)
            names.setdefault(key, set()).add(name_of(rollout))
    parts = tuple(Part(*key, frozenset(names[key])) for key in sorted(names))
    described = {"field": config.teacher_field, "digest": json_digest(teachers), "path": path}
    return Routing(parts, described, {**teachers})


def _teachers_of_prompts(config: ScoreConfig, rollouts: RolloutStore) -> tuple[dict[str, str], str]:
    """The name of the teacher by prompt id, and the file of the prompts."""
    assert config.teacher_field is not None
    routes = Routes(config.teacher_field, [str(name) for name in config.teachers])
    source = RecordSource.of(rollouts.manifest, config.prompts)
    student = find_student(config.student, rollouts.manifest.model)
    found: dict[str, str] = {}
    for record in source.find(prompts_of(rollouts.rollouts()), student):
        name, teacher = (
            record.name,
            routes.teacher_of(at(record.fields, routes.field), record.place),
        )
        if found.setdefault(name, teacher) != teacher:
            raise DataError(
                f"{record.place}: id '{name}' has {routes.field} '{teacher}', and before "
                f"'{found[name]}'; give all records of an id one teacher"
            )
    routes.check_used({*found.values()}, source.path)
    return found, str(Path(source.path).resolve())


def without(parts: Sequence[Part], left_out: Mapping[int, frozenset[str]]) -> tuple[Part, ...]:
    """The parts without some of their sequences.

    Args:
        left_out: names of sequences by part.
    """
    return tuple(
        Part(part.teacher, part.shard, part.names - left_out.get(number, frozenset()))
        for number, part in enumerate(parts)
    )
