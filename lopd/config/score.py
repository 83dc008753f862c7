"""Settings of `lopd score`."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from lopd.config.eos import EosOptions, parse_eos_class
from lopd.config.fields import setting, setting_of
from lopd.config.inference import EngineOptions, SamplingOptions, ScoringOptions
from lopd.config.prompts import PromptOptions
from lopd.config.teachers import TeacherOptions
from lopd.config.training import refuse_unused
from lopd.errors import ConfigError

Codec = Literal["exact", "packed", "compact"]
ListOf = Literal["teacher", "student", "union"]
_cache = partial(setting, group="Cache")


@dataclass(kw_only=True)
class ScoreConfig(TeacherOptions, EngineOptions, ScoringOptions):
    """Score rollouts with the teacher (`lopd score`)."""

    rollouts: str = setting(identity=False, help="Folder that `lopd rollout` wrote.")
    out: str = setting(identity=False, help="Cache folder; an interrupted run is continued.")
    k: int = _cache(64, within="[1, inf)", help="Maximum number of listed tokens per position.")
    support: ListOf = setting(
        "teacher",
        group="Cache",
        help="Whose k most probable tokens are listed: the teacher's, the student's, or k of each.",
    )
    top_p: float = _cache(
        0.999,
        within="(0, 1]",
        help="Cut each list where the mass that its model has there reaches this; 1 keeps all k "
        "tokens.",
    )
    codec: Codec = setting(
        "exact",
        group="Cache",
        help="Storage format of lists and log-probs; all but exact round them.",
    )
    temperature: float = _cache(
        1.0,
        within="(0, inf)",
        help="Divides the teacher's logits; distillation uses the same temperature.",
    )
    student: str | None = _cache(
        None,
        identity=False,
        help="Folder or hub id of the student that rolled out, for support and extra_ids; by "
        "default the one that the rollouts name.",
    )
    extra_ids: int = _cache(0, within="[0, inf)", help="Add the student's top N ids to every list.")
    teacher_template: str | None = setting(
        None,
        group="Model and data",
        identity=False,  # its text is an input
        help="Jinja file of the teacher's own prompt, from the fields of the prompts' records, "
        "such as reference answers (docs/how-to/privileged-context.md).",
    )
    prompts: str | None = setting(
        None,
        group="Model and data",
        identity=False,
        help="File of the prompts' records; by default the one that the rollouts were sampled "
        "from.",
    )
    eos_class: str | None = _cache(
        None,
        identity=False,
        help="Ids that end an answer, such as 1,27, for models that differ in them: they are in "
        "every list, and distillation takes them as one token.",
    )
    allow_eos_mismatch: bool = setting_of(EosOptions, "allow_eos_mismatch")
    skip_bad_records: bool = setting_of(PromptOptions, "skip_bad_records")
    worker: str | None = setting_of(SamplingOptions, "worker")
    plan: bool = setting(
        False,
        group="Model and data",
        identity=False,
        help="Print bytes, shards, time and free disk space, and write nothing.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.support != "teacher":
            refuse_unused(
                self, ("extra_ids",), f"support {self.support} lists the student's top k; set k"
            )
        elif not self.extra_ids and self.teacher_template is None and self.teacher_field is None:
            refuse_unused(
                self,
                ("student",),
                "only support, extra_ids, teacher_template and teacher_field read the student",
            )
        if self.teacher_template is None and self.teacher_field is None:
            refuse_unused(
                self, ("prompts",), "only teacher_template and teacher_field read their records"
            )
        parse_eos_class(self.eos_class)
        if self.engine == "vllm" and self.temperature != 1:
            raise ConfigError("engine: vllm scores at temperature 1; use transformers")
        if self.engine == "vllm" and self.support == "teacher" and not self.extra_ids:
            why = "vllm forms its own batches; set max_num_batched_tokens in engine_options"
            refuse_unused(self, ("tokens_per_batch",), why)
