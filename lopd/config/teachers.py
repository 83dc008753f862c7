"""Settings that name the teacher, or several: one for each value of a field of the prompts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lopd.config.fields import Settings, setting
from lopd.errors import ConfigError


@dataclass(kw_only=True)
class TeacherOptions(Settings):
    """The teacher of a stage, or the teachers and the field that chooses among them."""

    teacher: dict[str, Any] | str = setting(
        identity=False,
        many=True,
        help="Folder or hub id of the teacher model; with teacher_field once for each teacher, as "
        "NAME=PATH.",
    )
    teacher_field: str | None = setting(
        None,
        group="Model and data",
        identity=False,
        help="Field of the prompts' records whose value is the name of the teacher.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.teacher = named_teachers(self.teacher, self.teacher_field)

    @property
    def teachers(self) -> dict[str | None, str]:
        """The teachers by name, sorted; one without a name under None."""
        if isinstance(self.teacher, str):
            return {None: self.teacher}
        return {name: self.teacher[name] for name in sorted(self.teacher)}


def named_teachers(teacher: Mapping[str, Any] | str, field: str | None) -> dict[str, Any] | str:
    """One teacher as it is; with a field, the teachers by name.

    Raises:
        ConfigError: names without a field, a field without names, or a value that is no path.

    >>> named_teachers("math=models/math", "domain")
    {'math': 'models/math'}
    """
    if field is None:
        if isinstance(teacher, str):
            return teacher
        raise ConfigError(
            f"teacher: found {len(teacher)} with names; set --teacher-field to the field of the "
            "prompts' records that has the name of the teacher, or name one teacher only"
        )
    if isinstance(teacher, str):
        name, equals, path = teacher.partition("=")
        if not equals:
            raise ConfigError(
                f"teacher: found '{teacher}' with teacher_field {field}; expected NAME=PATH, where "
                f"NAME is the value of '{field}' in the records that this teacher scores"
            )
        teacher = {name: path}
    for name, path in teacher.items():
        if not name.strip() or not isinstance(path, str) or not path.strip():
            raise ConfigError(
                f"teacher: found name '{name}' with path {path!r}; expected a name and a folder or "
                "hub id of each"
            )
    return dict(teacher)
