"""Settings of `lopd calibrate`."""

from dataclasses import dataclass

from lopd.config.fields import Settings, setting


@dataclass(kw_only=True)
class CalibrateConfig(Settings):
    """Take the mean difference of teacher and student out of a cache (`lopd calibrate`).

    For a cache that another teacher scored than the one whose answers the student was fine-tuned
    on, and for objectives that read the log-probs of the sampled tokens only.
    """

    cache: str = setting(identity=False, help="Cache folder to calibrate; it stays as it is.")
    out: str = setting(identity=False, help="Cache folder to write; an interrupted run continues.")
    folds: int = setting(
        5,
        within="[2, 1000]",
        group="Cache",
        help="Parts of the prompts; each is calibrated with means over the others.",
    )
