"""Settings of `lopd import`."""

from dataclasses import dataclass
from typing import Literal

from lopd.config.fields import setting, setting_of
from lopd.config.inference import SamplingOptions
from lopd.config.model_code import CodeOptions
from lopd.config.prompts import PromptOptions
from lopd.config.score import Codec, ScoreConfig

Format = Literal["lightning-opd", "topk"]


@dataclass(kw_only=True)
class ImportConfig(CodeOptions):
    """Make a teacher cache from scores that another tool wrote (`lopd import`)."""

    source: str = setting(identity=False, help="Parquet or JSONL file, or a folder of them.")
    format: Format = setting(
        help="lightning-opd: parquet in the format of the paper's code; topk: lists of top-k "
        "log-probs. See lopd/data/external_scores.py."
    )
    teacher: str = setting(
        identity=False, help="Teacher that scored: a folder, a digest of weights, or a name."
    )
    student: str = setting(
        identity=False,
        help="Student that rolled out: a folder, which also provides the tokenizer, a digest of "
        "weights, or a name.",
    )
    out: str = setting_of(ScoreConfig, "out")
    codec: Codec = setting_of(ScoreConfig, "codec")
    temperature: float = setting_of(
        ScoreConfig, "temperature", help="Temperature at which the log-probs were computed."
    )
    shard_size: int = setting_of(SamplingOptions, "shard_size")
    skip_bad_records: bool = setting_of(PromptOptions, "skip_bad_records")
    allow_renormalized: bool = setting(
        False,
        group="Provenance overrides",
        identity=False,
        help="Accept renormalised lists, which only --tail renormalize can train on.",
    )
