"""Settings of `lopd sft-data`."""

from dataclasses import dataclass

from lopd.config.fields import setting
from lopd.config.inference import SamplingOptions


@dataclass(kw_only=True)
class SftDataConfig(SamplingOptions):
    """Sample the teacher's answers to prompts (`lopd sft-data`)."""

    teacher: str = setting(identity=False, help="Folder or hub id of the teacher model.")
