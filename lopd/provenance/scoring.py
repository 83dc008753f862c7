"""Where the columns of a cache come from: the `scoring` of its manifest."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lopd.errors import LopdError
from lopd.provenance.typed_json import Unfit, parse

SCORING = {
    "tail": ("computed", "derived", "renormalized"),
    "entropy": ("computed", "derived", "absent"),
    "rollout_logprobs": ("computed", "absent"),
    "teacher_logprobs": ("computed", "calibrated"),
}
# Whose most probable ids a list holds.
LISTS = ("teacher", "student", "union")
# Older caches use other words, some of them as keys of the manifest itself.
OLD_WORDS = {
    "tail": {
        "reduced over the vocabulary without the list": "computed",
        "subtracted: log1mexp(logsumexp(unrounded list)), floored at log 2^-23 and at the "
        "log-prob of a token outside the list": "derived",
    },
    "entropy": {"buckets": "derived"},
    "rollout_logprobs": {"unknown": "absent"},
}


@dataclass(frozen=True, kw_only=True)
class ListSupport:
    """Which ids a cache's lists hold."""

    ids: str  # in words
    list_of: str = "teacher"  # one of LISTS; older caches, which do not say, are the teacher's
    extra_ids: int = 0  # number of the student's top ids added to the teacher's
    eos_class: tuple[int, ...] = ()  # ids in every list, which count as one token
    raw: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Where a cache's columns come from.

    `computed`: by a model from all of its logits. `derived`: from the list only, the tail as 1 less
    the listed mass, the entropy as that of list and tail, a lower bound. `absent`: NaN in the
    shards. `renormalized`: the tail was lost before the scores were imported. `calibrated`: changed
    by `lopd calibrate`, so that they are the log-probs of no distribution and may exceed 0; such a
    cache has no lists.
    """

    tail: str = "computed"
    entropy: str = "computed"
    rollout_logprobs: str = "computed"
    teacher_logprobs: str = "computed"
    support: ListSupport | None = None
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def is_calibrated(self) -> bool:
        """Whether the log-probs of the sampled tokens are calibrated."""
        return self.teacher_logprobs == "calibrated"

    @property
    def list_of(self) -> str:
        """Whose most probable ids the lists hold, one of `LISTS`."""
        return "teacher" if self.support is None else self.support.list_of

    @property
    def eos_class(self) -> tuple[int, ...]:
        """The ids that end an answer and count as one token; empty if all count on their own."""
        return () if self.support is None else self.support.eos_class

    def words(self) -> dict[str, str]:
        """The columns and where they come from."""
        return {name: getattr(self, name) for name in SCORING}


def parse_scoring(
    manifest: Mapping[str, Any], source: str, error: type[LopdError], unfit: Unfit
) -> Scoring:
    """The `scoring` of a manifest's JSON object; columns without an entry are `computed`.

    Args:
        source: what messages call the manifest.
        error: the exception for an unknown word.
        unfit: makes the exception for a field of another type.
    """
    recorded = manifest.get("scoring")
    recorded = {} if recorded is None else recorded
    if not isinstance(recorded, dict):
        raise unfit("scoring")
    values = {**{name: manifest[name] for name in SCORING if name in manifest}, **recorded}
    for name, words in OLD_WORDS.items():
        if isinstance(word := values.get(name), str):
            values[name] = words.get(word, word)
    scoring = parse(Scoring, values, "scoring.", unfit, raw=recorded)
    for name, word in scoring.words().items():
        if word not in SCORING[name]:
            raise error(
                f"{source} has scoring.{name} {word!r}, expected one of {', '.join(SCORING[name])}"
            )
    if scoring.list_of not in LISTS:
        raise error(
            f"{source} has scoring.support.list_of {scoring.list_of!r}, expected one of "
            f"{', '.join(LISTS)}"
        )
    return scoring
