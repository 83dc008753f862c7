"""Settings about the ids that end an answer, shared by the stages that compare them."""

from dataclasses import dataclass

from lopd.config.fields import Settings, setting
from lopd.errors import ConfigError


@dataclass(kw_only=True)
class EosOptions(Settings):
    """Whether models may differ in the ids that end an answer."""

    allow_eos_mismatch: bool = setting(
        False,
        group="Provenance overrides",
        identity=False,
        help="Go on although teacher and student end answers with different ids.",
    )


def parse_eos_class(text: str | None) -> tuple[int, ...]:
    """The ids of `--eos-class`, sorted; none by default.

    >>> parse_eos_class("27, 1")
    (1, 27)
    """
    if text is None:
        return ()
    words = [word.strip() for word in text.split(",")]
    if len(words) < 2 or len({*words}) < len(words) or not all(word.isdecimal() for word in words):
        raise ConfigError(
            f"eos_class: found '{text}'; expected two or more different ids, such as 1,27"
        )
    return tuple(sorted(map(int, words)))
