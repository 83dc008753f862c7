"""Which teacher scores which rollouts: the parts of a cache, one for each of its shards.

With one teacher, shard i of the cache holds the sequences of shard i of the rollouts. With several,
a field of the prompts' records names the teacher of each. The shards of the first teacher come
first, in the order of the rollouts, then those of the next, so that a shard belongs to one teacher
and one model is in memory at a time.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import accumulate
from pathlib import Path
from typing import Any

from lopd.config.prompts import PromptOptions
from lopd.config.score import ScoreConfig
from lopd.data.prompts import MAX_LINE, Routes, load_prompts
from lopd.data.records import describe_data, read_records
from lopd.data.rendering import PromptEncoder
from lopd.data.shapes import at
from lopd.errors import DataError, MissingFileError
from lopd.models.load import load_tokenizer
from lopd.provenance import Manifest
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
            at_part = (teachers[rollout.prompt_id], shard)
            names.setdefault(at_part, set()).add(name_of(rollout))
    parts = tuple(Part(*key, frozenset(names[key])) for key in sorted(names))
    described = {"field": config.teacher_field, "digest": json_digest(teachers), "path": path}
    return Routing(parts, described)


def _teachers_of_prompts(config: ScoreConfig, rollouts: RolloutStore) -> tuple[dict[str, str], str]:
    """The name of the teacher by prompt id, for the prompts of the rollouts, and their file."""
    manifest = rollouts.manifest
    path, reading = _prompts_of(config, manifest)
    options = PromptOptions(**{key: value for key, value in reading.items() if key != "date"})
    used = {rollout.prompt_id for rollout in rollouts.rollouts()}
    assert config.teacher_field is not None
    names = [str(name) for name in config.teachers]
    found = _by_given_id(path, Routes(config.teacher_field, names), options, used)
    if found is None:
        today = date.fromisoformat(reading["date"]) if "date" in reading else None
        encoder = PromptEncoder(
            load_tokenizer(find_student(config.student, manifest.model)), options, today
        )
        routes = Routes(config.teacher_field, names)
        limit = manifest.config.get("limit")
        prompts = load_prompts(path, encoder, limit=limit, routes=routes)
        found = {prompt.id: str(prompt.teacher) for prompt in prompts}
    if absent := sorted(used - found.keys()):
        raise DataError(
            f"{path}: has no record with the id '{absent[0]}', a prompt of the rollouts"
            f"{_and_more(len(absent))}; name the file that they were sampled from with --prompts"
        )
    chosen = {name: found[name] for name in sorted(used)}
    Routes(config.teacher_field, names).check_used({*chosen.values()}, config.rollouts)
    return chosen, str(Path(path).resolve())


def _and_more(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""


def _prompts_of(config: ScoreConfig, manifest: Manifest) -> tuple[str, dict[str, Any]]:
    """The file of the prompts, and how it was read."""
    recorded = manifest.inputs.get("prompts") or manifest.inputs.get("source") or {}
    reading = dict(recorded.get("reading") or {})
    if config.prompts is not None:
        return config.prompts, reading
    path = recorded.get("path")
    if path is None or not Path(path).exists():
        raise MissingFileError(
            f"prompts: {config.rollouts} was made from {path or 'an unknown file'}, which is not "
            f"there, and {config.teacher_field} is read from it; name it with --prompts"
        )
    if describe_data(path)["sha256"] != recorded.get("sha256"):
        raise DataError(
            f"{path}: altered since {config.rollouts} was made from it; restore it, or name the "
            "file to read with --prompts"
        )
    return path, reading


def _by_given_id(
    path: str, routes: Routes, options: PromptOptions, used: set[str]
) -> dict[str, str] | None:
    """The name of the teacher by prompt id, if every record has an `id`; else None."""
    column = options.column_map().get("id", "id")
    found: dict[str, str] = {}
    skip = (lambda error: None) if options.skip_bad_records else None
    for where, record in read_records(path, max_bytes=MAX_LINE, skip=skip):
        if (given := at(record, column)) is None:
            return None
        if (name := str(given)) not in used:
            continue
        teacher = routes.teacher_of(at(record, routes.field), where)
        if found.setdefault(name, teacher) != teacher:
            raise DataError(
                f"{where}: id '{name}' has {routes.field} '{teacher}', and before "
                f"'{found[name]}'; give all records of an id one teacher"
            )
    return found


def without(parts: Sequence[Part], left_out: Mapping[int, frozenset[str]]) -> tuple[Part, ...]:
    """The parts without some of their sequences.

    Args:
        left_out: names of sequences by part.
    """
    return tuple(
        Part(part.teacher, part.shard, part.names - left_out.get(number, frozenset()))
        for number, part in enumerate(parts)
    )
