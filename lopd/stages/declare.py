"""Declare which teacher a checkpoint from elsewhere was fine-tuned on (`lopd declare`)."""

from dataclasses import dataclass, field
from pathlib import Path

from lopd.provenance import declare


@dataclass(kw_only=True)
class DeclareConfig:
    """State which teacher's answers a checkpoint was fine-tuned on (`lopd declare`).

    The statement is taken on trust and marked `declared` in every manifest downstream.
    """

    model: str = field(metadata={"help": "Folder of the fine-tuned checkpoint."})
    teacher: str = field(metadata={"help": "The teacher's folder, or the digest of its weights."})


def main(config: DeclareConfig) -> Path:
    """Write the statement into the model's folder, and return the folder."""
    declare(config.model, teacher=config.teacher)
    return Path(config.model)
