"""Sample the teacher's answers, the data that the student is fine-tuned on (`lopd sft-data`).

Its manifest identifies the teacher by the digest of its weights. `lopd sft` copies that digest,
and `lopd distill` compares it with the teacher that scored the rollouts.
"""

from pathlib import Path

from lopd.config.sft_data import SftDataConfig
from lopd.stages.model_access import loads_models
from lopd.stages.rollout import sample_to_store


@loads_models
def main(config: SftDataConfig) -> Path:
    """Sample the missing shards of the teachers' answers; returns their folder.

    Raises:
        LopdError: the model, the prompts or the folder cannot be used.
    """
    return sample_to_store(
        config, config.teachers, kind="sft_data", stage="sft-data", field=config.teacher_field
    )
