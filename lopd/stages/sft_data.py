"""Sample the teacher's answers, the data that the student is fine-tuned on (`lopd sft-data`).

Its manifest identifies the teacher by the digest of its weights. `lopd sft` copies that digest,
and `lopd distill` compares it with the teacher that scored the rollouts.
"""

from dataclasses import dataclass
from pathlib import Path

from lopd.config.fields import setting
from lopd.stages.rollout import SamplingOptions, sample_to_store


@dataclass(kw_only=True)
class SftDataConfig(SamplingOptions):
    """Sample the teacher's answers to prompts (`lopd sft-data`)."""

    teacher: str = setting(identity=False, help="Folder of the teacher model.")


def main(config: SftDataConfig) -> Path:
    return sample_to_store(config, model=config.teacher, kind="sft_data", stage="sft-data")
