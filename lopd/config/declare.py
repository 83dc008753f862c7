"""Settings of `lopd declare`."""

from dataclasses import dataclass
from typing import Any

from lopd.config.fields import setting
from lopd.config.model_code import CodeOptions


@dataclass(kw_only=True)
class DeclareConfig(CodeOptions):
    """State which teacher's answers a checkpoint was fine-tuned on (`lopd declare`).

    The statement cannot be verified, so every manifest that depends on it is marked `declared`.
    """

    model: str = setting(help="Folder or hub id of the fine-tuned checkpoint.")
    teacher: dict[str, Any] | str = setting(
        many=True,
        help="The teacher's folder or hub id, or the digest of its weights; NAME=TEACHER for each "
        "of several.",
    )
