"""The teacher's own prompts, from `--teacher-template`: made for scoring, and again to verify."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from lopd.config.score import ScoreConfig
from lopd.data.prompt_records import RecordSource
from lopd.data.rendering import parse_date
from lopd.data.teacher_prompts import TeacherPrompts, prompts_of
from lopd.data.teacher_template import read_template, template_digest
from lopd.errors import DataError, MissingFileError
from lopd.models.limits import ModelLimits
from lopd.provenance import MANIFEST_NAME
from lopd.stages.rollout_student import find_student
from lopd.stages.routing import Routing
from lopd.store import Rollout, RolloutStore, TeacherCache
from lopd.store.types import name_of


@dataclass(frozen=True)
class TeacherView:
    """What the teacher reads: the rollouts as they are, or their answers after its own prompts."""

    prompts: TeacherPrompts | None = None
    described: dict[str, Any] | None = None  # for the manifest

    def of(self, rollout: Rollout) -> Rollout:
        """The sequence that the teacher scores in place of a rollout."""
        return rollout if self.prompts is None else self.prompts.seen_by_teacher(rollout)

    def check(self, limits: ModelLimits, rollout: Rollout) -> None:
        """Refuse a sequence that the teacher cannot read.

        Raises:
            DataError: it is too long, or has an id beyond the vocabulary.
        """
        name = name_of(rollout)
        if self.prompts is not None:
            name += f" after the teacher's prompt for {self.prompts.places[rollout.prompt_id]}"
        limits.check(name, self.of(rollout).tokens)

    @property
    def length_remedy(self) -> str:
        """What to do about a sequence that is too long."""
        remedy = "roll out with fewer --max-new-tokens"
        return remedy if self.prompts is None else f"shorten --teacher-template, or {remedy}"


def teacher_view(config: ScoreConfig, rollouts: RolloutStore, routing: Routing) -> TeacherView:
    """Render the template, if there is one, for every prompt of the rollouts.

    Args:
        routing: which teacher reads which prompt.

    Raises:
        MissingFileError: the template, the records or the student are not there.
        ConfigError, DataError: the template or a record cannot be used; names file and line.
    """
    if config.teacher_template is None:
        return TeacherView()
    manifest = rollouts.manifest
    text, path = read_template(config.teacher_template), config.teacher_template
    records = RecordSource.of(manifest, config.prompts)
    today = records.date or date.fromisoformat(str(manifest.raw["created"])[:10])
    own = prompts_of(rollouts.rollouts())
    prompts = TeacherPrompts.render(
        text,
        path,
        config.teachers,
        routing.teacher_of or dict.fromkeys(own),
        records,
        own,
        find_student(config.student, manifest.model),
        today,
    )
    described = {
        "digest": prompts.digest(),
        "date": today.isoformat(),
        "template": {"sha256": template_digest(text), "text": text, "path": path},
        "records": asdict(records),
    }
    return TeacherView(prompts, described)


def view_of_cache(
    cache: TeacherCache, teachers: Mapping[str | None, str], student: str, flag: str
) -> TeacherView:
    """What the teachers read when they scored a cache, rendered again.

    Args:
        teachers: their folders, by the names in the manifest.
        student: a folder with the tokenizer of the model that made the rollouts.
        flag: what needs it.

    Raises:
        MissingFileError: the records are not there any more.
        DataError: they, or the tokenizers, give other prompts now.
    """
    manifest = cache.manifest
    if (own := manifest.teacher_prompts) is None:
        return TeacherView()
    records = RecordSource(**asdict(own.records))
    if not Path(records.path).exists():
        raise MissingFileError(
            f"{cache.path}: the teacher read prompts from the records of {records.path}, which is "
            f"not there; restore it, or leave {flag} out"
        )
    prompts = TeacherPrompts.render(
        own.text,
        own.file,
        teachers,
        _teacher_of(cache),
        records,
        prompts_of(cache.rollouts()),
        student,
        parse_date(own.date, f"{cache.path}: {MANIFEST_NAME}"),
    )
    if prompts.digest() != own.digest:
        raise DataError(
            f"{cache.path}: {records.path} gives the teacher other prompts than when it scored; "
            f"restore the file, or leave {flag} out"
        )
    return TeacherView(prompts, dict(own.raw))


def _teacher_of(cache: TeacherCache) -> dict[str, str | None]:
    """The name of the teacher by prompt id."""
    prompts = [rollout.prompt_id for rollout in cache.rollouts()]
    return {
        prompts[index]: name for name in cache.manifest.models for index in cache.of_teacher(name)
    }
