"""Limits of a model: one check of length and ids, with names and remedies."""

import numpy as np
import pytest

from lopd.errors import ConfigError, DataError
from lopd.models.limits import ModelLimits

LIMITS = ModelLimits("the teacher", vocab_size=10, context=4, length_remedy="cut", id_remedy="map")


@pytest.mark.parametrize(
    "tokens, new, message",
    [
        ([1] * 5, 0, "s: found 5 tokens; expected at most 4, the context of the teacher; cut"),
        ([1, 2], 3, "s: found 2 tokens and max_new_tokens=3; expected at most 4, the context"),
        ([1, 10], 0, r"s: token 1 has id 10; expected ids in \[0, 10\), the vocabulary of the"),
        ([-1, 10], 0, "s: token 0 has id -1; .*; map"),
    ],
)
def test_what_a_model_cannot_read_is_refused(tokens, new, message):
    for form in (tokens, np.array(tokens, np.int32)):
        with pytest.raises(DataError, match=message):
            LIMITS.check("s", form, max_new_tokens=new)


def test_the_limits_themselves_are_allowed():
    LIMITS.check("s", [0, 9, 1, 2])
    LIMITS.check("s", [0, 9], max_new_tokens=2)
    ModelLimits("the teacher", None).check("s", [10**6] * 100)


@pytest.mark.parametrize("k", [0, -1, 11])
def test_lists_longer_than_the_vocabulary_are_refused(k):
    LIMITS.check_k(10)
    with pytest.raises(ConfigError, match=f"extra_ids: found {k}; expected 1 to 10, the voc"):
        LIMITS.check_k(k, "extra_ids")
