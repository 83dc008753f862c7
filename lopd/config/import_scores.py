"""Settings of `lopd import`."""

from dataclasses import dataclass
from typing import Any, Literal

from lopd.config.fields import setting, setting_of
from lopd.config.inference import SamplingOptions
from lopd.config.model_code import CodeOptions
from lopd.config.prompts import PromptOptions
from lopd.config.score import Codec, ListOf, ScoreConfig
from lopd.errors import ConfigError

Format = Literal["lightning-opd", "topk", "rollouts"]


@dataclass(kw_only=True)
class ImportConfig(CodeOptions):
    """Import the scores or the rollouts that another tool wrote (`lopd import`)."""

    source: str = setting(identity=False, help="Parquet or JSONL file, or a folder of them.")
    format: Format = setting(
        help="lightning-opd: parquet in the format of the paper's code; topk: lists of top-k "
        "log-probs (lopd/data/external_scores.py). Both become a cache. rollouts: token ids with "
        "loss masks, or messages (lopd/data/external_rollouts.py), for `lopd score`."
    )
    teacher: str | None = setting(
        None,
        group="Model and data",
        identity=False,
        help="Teacher that scored: a folder or hub id, a digest of weights, or a name; not for "
        "rollouts.",
    )
    student: str = setting(
        identity=False,
        help="Student that rolled out: a folder, which also provides the tokenizer, a digest of "
        "weights, or a name; for rollouts a folder.",
    )
    out: str = setting_of(
        ScoreConfig,
        "out",
        help="Folder of the cache or of the rollouts; an interrupted run is continued.",
    )
    codec: Codec = setting_of(ScoreConfig, "codec")
    temperature: float = setting_of(
        ScoreConfig, "temperature", help="Temperature at which the log-probs were computed."
    )
    support: ListOf = setting_of(
        ScoreConfig,
        "support",
        help="topk: whose most probable tokens the lists hold: the teacher's, the student's (with "
        "the teacher's log-probs), or those of both.",
    )
    shard_size: int = setting_of(SamplingOptions, "shard_size")
    skip_bad_records: bool = setting_of(PromptOptions, "skip_bad_records")
    retokenize: bool = setting(
        False,
        group="Model and data",
        help="Rollouts: tokenise messages again, though other tokens may have been sampled.",
    )
    allow_renormalized: bool = setting(
        False,
        group="Provenance overrides",
        identity=False,
        help="Accept renormalised lists, which only --tail renormalize can train on, and sampled "
        "tokens outside them.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.format == "rollouts") == (self.teacher is not None):
            what = "no teacher: `lopd score` names it" if self.teacher else "the one that scored"
            raise ConfigError(
                f"teacher: found {self.teacher} with format {self.format}; expected {what}"
            )
        of_scores = {"codec": "exact", "temperature": 1.0, "allow_renormalized": False}
        unused: dict[str, Any] = {"retokenize": False}
        if self.format == "rollouts":
            unused = dict(of_scores)
        if self.format != "topk":
            unused["support"] = "teacher"
        for name, default in unused.items():
            if getattr(self, name) != default:
                raise ConfigError(f"{name}: has no meaning for format {self.format}; leave it out")
