"""Declare which teacher a checkpoint from elsewhere was fine-tuned on (`lopd declare`)."""

from pathlib import Path

from lopd.config.declare import DeclareConfig
from lopd.provenance import declare
from lopd.stages.model_access import loads_models


@loads_models
def main(config: DeclareConfig) -> Path:
    """Write the statement into the model's folder, and return the folder."""
    declare(config.model, teacher=config.teacher)
    return Path(config.model)
