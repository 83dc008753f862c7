"""Settings of `lopd verify`."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from lopd.config.fields import setting
from lopd.config.inference import EngineOptions, ScoringOptions
from lopd.config.training import refuse_unused
from lopd.errors import ConfigError

_evaluation = partial(setting, group="Evaluation")


@dataclass(kw_only=True)
class VerifyConfig(EngineOptions, ScoringOptions):
    """Check an artefact folder, and with --rescore a cache's noise floor (`lopd verify`)."""

    path: str = setting(help="Folder of answers, rollouts, a cache, a checkpoint or an evaluation.")
    rescore: int = _evaluation(
        0, within="[0, inf)", help="Score N sequences of a cache again; 0 checks files only."
    )
    teacher: dict[str, Any] | str | None = setting(
        None,
        group="Evaluation",
        many=True,
        help="Folder of the teacher that scored the cache; NAME=PATH for each of several.",
    )
    student: str | None = _evaluation(
        None, help="Folder of the student; its KL on the same tokens is the signal."
    )
    max_noise_share: float = _evaluation(
        0.1, within="(0, inf)", help="Fail if noise / signal is above this."
    )
    seed: int = _evaluation(0, within="[0, 4294967296)", help="Seed for choosing the sequences.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rescore and (self.teacher is None or self.student is None):
            raise ConfigError("rescore: requires --teacher and --student, both model folders")
        if not self.rescore and (self.teacher or self.student):
            raise ConfigError("teacher, student: --teacher and --student require --rescore N")
        if not self.rescore:
            names = ("tokens_per_batch", "engine", "engine_options", "max_noise_share", "seed")
            refuse_unused(self, names, "without rescore only files are checked; set rescore")
