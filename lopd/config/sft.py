"""Settings of `lopd sft`."""

from dataclasses import dataclass

from lopd.config.eos import EosOptions
from lopd.config.fields import setting, setting_of
from lopd.config.prompts import PromptOptions
from lopd.config.training import TrainOptions


@dataclass(kw_only=True)
class SftConfig(TrainOptions, PromptOptions):
    """Fine-tune a model on answers (`lopd sft`)."""

    model: str = setting(identity=False, help="Folder or hub id of the model to start from.")
    data: str = setting(
        identity=False,
        help="Folder that `lopd sft-data` wrote, or JSONL, JSON or parquet, or a folder of them, "
        "with prompt and completion, or messages; docs/pipeline.md lists other shapes.",
    )
    out: str = setting(identity=False, help="Folder to write; an interrupted run is continued.")
    allow_eos_mismatch: bool = setting_of(EosOptions, "allow_eos_mismatch")
