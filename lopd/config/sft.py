"""Settings of `lopd sft`."""

from dataclasses import dataclass

from lopd.config.fields import setting
from lopd.config.prompts import PromptOptions
from lopd.config.training import TrainOptions


@dataclass(kw_only=True)
class SftConfig(TrainOptions, PromptOptions):
    """Fine-tune a model on answers (`lopd sft`)."""

    model: str = setting(identity=False, help="Folder of the model to start from.")
    data: str = setting(
        identity=False,
        help="Folder that `lopd sft-data` wrote, or JSONL, JSON or parquet, or a folder of them, "
        "with prompt and completion, or messages; docs/pipeline.md lists other shapes.",
    )
    out: str = setting(identity=False, help="Folder to write; an interrupted run is continued.")
