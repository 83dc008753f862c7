"""Settings of `lopd rollout`."""

from dataclasses import dataclass

from lopd.config.fields import setting
from lopd.config.inference import SamplingOptions


@dataclass(kw_only=True)
class RolloutConfig(SamplingOptions):
    """Sample the student's answers to prompts (`lopd rollout`)."""

    student: str = setting(identity=False, help="Folder or hub id of the fine-tuned student.")
