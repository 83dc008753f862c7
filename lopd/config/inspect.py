"""Settings of `lopd inspect`."""

from dataclasses import dataclass

from lopd.config.fields import Settings, setting


@dataclass(kw_only=True)
class InspectConfig(Settings):
    """Print what an artefact folder holds (`lopd inspect`)."""

    path: str = setting(
        help="Folder of answers, rollouts, a cache, a checkpoint, an evaluation or a model."
    )
    verify: bool = setting(
        False,
        group="Model and data",
        help="Check the hashes of every shard, of the weights, or of an evaluation's files.",
    )
    json: bool = setting(
        False, group="Logging and checkpoints", help="Print one JSON object in place of a table."
    )
