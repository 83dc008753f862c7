"""Admit a checkpoint that was fine-tuned elsewhere (`lopd declare`)."""

from dataclasses import dataclass
from pathlib import Path

from lopd.config.fields import Settings, setting
from lopd.provenance import declare


@dataclass(kw_only=True)
class DeclareConfig(Settings):
    """State which teacher's answers a checkpoint was fine-tuned on (`lopd declare`).

    The statement cannot be verified, so every manifest that depends on it is marked `declared`.
    """

    model: str = setting(help="Folder of the fine-tuned checkpoint.")
    teacher: str = setting(help="The teacher's folder, or the digest of its weights.")


def main(config: DeclareConfig) -> Path:
    declare(config.model, teacher=config.teacher)
    return Path(config.model)
