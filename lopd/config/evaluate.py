"""Settings of `lopd eval`."""

import re
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Literal

from lopd.config.device import check_device
from lopd.config.eos import parse_eos_class
from lopd.config.fields import setting, setting_of
from lopd.config.inference import GenerationOptions, ScoringOptions
from lopd.config.training import refuse_unused
from lopd.errors import ConfigError

ANSWER_REGEX = r"#+\s*(\S[^#\n]*)"
# Settings that nothing reads without prompts, except those that a recipe shares between its stages.
OF_PROMPTS = (
    "teacher",
    "kl_k",
    "eos_class",
    "limit",
    "columns",
    "skip_bad_records",
    "max_new_tokens",
    "temperature",
    "top_p",
    "num_samples",
    "batch_size",
    "judge",
    "answer_regex",
)
_data = partial(setting, group="Model and data", identity=False)
_evaluation = partial(setting, group="Evaluation")


@dataclass(kw_only=True)
class EvalConfig(GenerationOptions, ScoringOptions):
    """Measure accuracy on prompts with answers, and the KL to a teacher (`lopd eval`)."""

    model: str = setting(identity=False, help="Folder or hub id of the model to evaluate.")
    out: str = setting(identity=False, help="Folder for results.json and the answers.")
    prompts: str | None = _data(
        None,
        help="JSONL, JSON or parquet file, or a folder of them, with 'prompt' or 'messages', and "
        "'answer', in each record; docs/pipeline.md lists other shapes. Without it, cache is "
        "needed, and only the KL on it is measured.",
    )
    teacher: str | None = _data(None, help="Folder or hub id of the teacher, for the KL.")
    cache: str | None = _data(None, help="Teacher cache of held-out rollouts, for the KL on them.")
    kl_k: int = _evaluation(64, within="[1, inf)", help="Teacher tokens per position of the KL.")
    eos_class: str | None = _evaluation(
        None,
        help="Ids that end an answer, such as 1,27, which the KL to the teacher takes as one "
        "token; by default those of the cache or of the model's distillation.",
    )
    num_samples: int = setting(
        4, within="[1, inf)", group="Sampling", help="Number of sampled answers to each prompt."
    )
    temperature: float = setting_of(
        GenerationOptions,
        "temperature",
        within="(0, inf)",
        remedy=" (greedy answers are evaluated as well)",
        help="Temperature of the sampled answers; greedy answers are evaluated as well.",
    )
    judge: Literal["exact", "math"] = _evaluation(
        "exact",
        help="exact compares what answer_regex finds; math uses math-verify (lopd[eval]).",
    )
    answer_regex: str = _evaluation(
        ANSWER_REGEX,
        help="Regular expression with one group, whose last match is the model's answer.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device(self.device)
        if self.prompts is None:
            if self.cache is None:
                raise ConfigError(
                    "missing --prompts (accuracy, and the KL to a --teacher) or --cache (the KL on "
                    "stored rollouts); give one of them, or both"
                )
            refuse_unused(self, OF_PROMPTS, "it is about answers to prompts; set prompts")
        elif self.teacher is None:
            refuse_unused(self, ("kl_k", "eos_class"), "no KL is measured; set teacher")
        parse_eos_class(self.eos_class)
        try:
            groups = re.compile(self.answer_regex).groups
        except re.error as error:
            raise ConfigError(f"answer_regex: {error}; expected a regular expression") from None
        if groups != 1:
            raise ConfigError(f"answer_regex: found {groups} groups; expected exactly one")
        if self.judge == "math":
            if self.answer_regex != ANSWER_REGEX:
                raise ConfigError(
                    "answer_regex: --judge math does not use it; leave one of them out"
                )
            if find_spec("math_verify") is None:
                raise ConfigError(
                    "judge: math needs math-verify (it is not installed); pip install 'lopd[eval]'"
                )
