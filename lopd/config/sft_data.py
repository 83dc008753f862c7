"""Settings of `lopd sft-data`."""

from dataclasses import dataclass

from lopd.config.inference import SamplingOptions
from lopd.config.teachers import TeacherOptions


@dataclass(kw_only=True)
class SftDataConfig(TeacherOptions, SamplingOptions):
    """Sample the teacher's answers to prompts (`lopd sft-data`)."""
