"""Settings of `lopd doctor`."""

from dataclasses import dataclass

from lopd.config.fields import Settings, setting


@dataclass(kw_only=True)
class DoctorConfig(Settings):
    """Show what this machine has, what is missing, and what that costs (`lopd doctor`)."""

    json: bool = setting(
        False, group="Logging and checkpoints", help="Print one JSON object in place of a table."
    )
