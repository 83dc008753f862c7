"""Settings about the ids that end an answer, shared by the stages that compare them."""

from dataclasses import dataclass

from lopd.config.fields import Settings, setting


@dataclass(kw_only=True)
class EosOptions(Settings):
    """Whether models may differ in the ids that end an answer."""

    allow_eos_mismatch: bool = setting(
        False,
        group="Provenance overrides",
        identity=False,
        help="Go on although teacher and student end answers with different ids.",
    )
