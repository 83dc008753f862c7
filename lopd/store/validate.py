"""Checks of sequences and scores when they are written and verified."""

import numpy as np

from lopd.errors import DataError
from lopd.models.limits import ModelLimits
from lopd.store.types import FINISH_REASONS, Rollout, TeacherScores, TeacherSequence, name_of

# Tolerance for an engine's rounding: probabilities sum to 1 within this.
MASS_TOLERANCE = 1e-3
# The same of list and tail, for codecs that round log-probs.
LOSSY_MASS_TOLERANCE = 5e-3
# The log-prob of a sampled token and its entry in the list may differ by this many nat.
AGREEMENT_NATS = 0.05
# Relative errors of listed log-probs by the codec that stores them: half a step of the mantissa.
LIST_ROUNDING = {"exact": 0.0, "packed": 2.0**-11, "compact": 2.0**-5}
# Of weights, which are stored as fp32.
_SMALLEST = float(np.finfo(np.float32).tiny)
_LARGEST = float(np.finfo(np.float32).max)


def check_rollout(rollout: Rollout, vocab_size: int, *, has_logprobs: bool = True) -> None:
    """Refuse a sequence that cannot be stored or trained on.

    Without `has_logprobs`, for imported rollouts that lack them, its log-probs must be NaN.

    Raises:
        DataError: names the sequence, the position and the value.
    """
    name, tokens = name_of(rollout), rollout.tokens
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise DataError(f"{name}: tokens are {_form(tokens)}, expected a 1-d array of integers")
    if rollout.prompt_length < 1:
        raise DataError(f"{name}: prompt_length is {rollout.prompt_length}, expected at least 1")
    length = len(tokens) - rollout.prompt_length
    if length < 1:
        raise DataError(
            f"{name}: {len(tokens)} tokens with a prompt of {rollout.prompt_length} leave no "
            "response; drop the sequence"
        )
    if rollout.finish_reason not in FINISH_REASONS:
        raise DataError(
            f"{name}: finish_reason is {rollout.finish_reason!r}, expected 'stop' or 'length'"
        )
    ModelLimits("its model", vocab_size, id_remedy="drop the sequence").check(name, tokens)
    if rollout.loss_mask.shape != tokens.shape or rollout.loss_mask.dtype != np.bool_:
        raise DataError(
            f"{name}: loss_mask is {_form(rollout.loss_mask)}, expected bool [{len(tokens)}]"
        )
    check_weights(rollout)
    marked = np.flatnonzero(rollout.loss_mask[: rollout.prompt_length])
    if len(marked):
        raise DataError(
            f"{name}: loss_mask is True on prompt token {marked[0]}; only response tokens "
            "can carry loss"
        )
    for field in ("rollout_logprobs", "rollout_logprobs_raw"):
        values = getattr(rollout, field)
        if has_logprobs:
            _check_logprobs(rollout, field, values, (length,))
        else:
            _check_shape(rollout, field, values, (length,))
            _refuse(rollout, ~np.isnan(values), field, values, "NaN, as declared")


def check_weights(rollout: Rollout) -> None:
    """Refuse weights that no mean can be taken with, and an infinite reward.

    Raises:
        DataError: names the sequence and the value.
    """
    name, weights = name_of(rollout), rollout.token_weights
    if not _SMALLEST <= rollout.weight <= _LARGEST:
        raise DataError(
            f"{name}: its weight is {rollout.weight:g}; expected a positive number, since losses "
            "are means; drop sequences that shall not count"
        )
    if rollout.reward is not None and not -_LARGEST <= rollout.reward <= _LARGEST:
        raise DataError(f"{name}: its reward is {rollout.reward:g}; expected a finite number")
    if weights is None:
        return
    length = len(rollout.tokens) - rollout.prompt_length
    _check_shape(rollout, "token_weights", weights, (length,))
    bad = ~((weights >= 0) & (weights <= _LARGEST))
    _refuse(rollout, bad, "token_weights", weights, "a finite number, at least 0")
    if not (weights * rollout.loss_mask[rollout.prompt_length :]).any():
        raise DataError(
            f"{name}: the token_weights of all tokens with loss are 0; drop the sequence"
        )


def check_scores(
    rollout: Rollout,
    scores: TeacherScores,
    vocab_size: int,
    k: int,
    *,
    has_entropy: bool = True,
    calibrated: bool = False,
) -> None:
    """Refuse scores that are not a distribution over `vocab_size` ids for every token.

    Without `has_entropy`, for engines that do not compute it, the entropy must be NaN. Log-probs of
    sampled tokens that are `calibrated` have to be finite only.

    Raises:
        DataError: names the sequence, the response token and the fault.
    """
    length = len(rollout.tokens) - rollout.prompt_length
    if calibrated:
        _check_finite(rollout, scores.teacher_logprobs, length)
    else:
        _check_logprobs(rollout, "teacher_logprobs", scores.teacher_logprobs, (length,))
    _check_logprobs(rollout, "topk_logprobs", scores.topk_logprobs, (length, k))
    _check_logprobs(rollout, "tail_logprobs", scores.tail_logprobs, (length,), tail=True)
    field, entropy = "teacher_entropy", scores.teacher_entropy
    _check_shape(rollout, field, entropy, (length,))
    if has_entropy:
        bad = ~(np.isfinite(entropy) & (entropy >= -MASS_TOLERANCE))
        _refuse(rollout, bad, field, entropy, "a finite number of nat, at least 0")
    else:
        _refuse(rollout, ~np.isnan(entropy), field, entropy, "NaN")
    _check_ids(rollout, "topk_ids", scores.topk_ids, (length, k), vocab_size)
    if (scores.extra_ids is None) != (scores.extra_logprobs is None):
        raise DataError(
            f"{name_of(rollout)}: has only one of extra_ids and extra_logprobs; expected both or "
            "neither"
        )
    if scores.extra_ids is not None and scores.extra_logprobs is not None:
        shape = (length, *scores.extra_ids.shape[-1:])
        used = scores.extra_ids != -1
        _check_ids(rollout, "extra_ids", scores.extra_ids, shape, vocab_size, used)
        _check_shape(rollout, "extra_logprobs", scores.extra_logprobs, shape)
        filled = np.where(used, scores.extra_logprobs, 0.0)
        _check_logprobs(rollout, "extra_logprobs", filled, shape)
        if (rest := scores.extra_tail_logprobs) is not None:
            _check_logprobs(rollout, "extra_tail_logprobs", rest, (length,), tail=True)
    if not calibrated:
        _check_distribution(rollout, scores)


def _check_finite(rollout: Rollout, logprobs: np.ndarray, length: int) -> None:
    _check_shape(rollout, "teacher_logprobs", logprobs, (length,))
    bad = ~np.isfinite(logprobs)
    _refuse(rollout, bad, "teacher_logprobs", logprobs, "a finite number of nat")


def _check_distribution(rollout: Rollout, scores: TeacherScores) -> None:
    """Check that list and tail sum to 1, that the list descends and agrees with the token.

    Extra ids and the tail outside them are checked like the list, except for their order.
    """
    listed = scores.topk_logprobs.astype(np.float64)
    rising = np.asarray((np.diff(listed, axis=1) > 0).any(axis=1))
    _refuse(rollout, rising, "topk_logprobs", None, "descending log-probs")
    mass = np.exp(listed).sum(axis=1) + np.exp(scores.tail_logprobs.astype(np.float64))
    wrong, expected = np.abs(mass - 1) > MASS_TOLERANCE, f"1 within {MASS_TOLERANCE}"
    _refuse(rollout, np.asarray(wrong), "mass of list and tail", mass, expected)
    ids, tail = scores.topk_ids, scores.tail_logprobs
    if scores.extra_ids is not None and scores.extra_logprobs is not None:
        twice = (scores.extra_ids[:, :, None] == ids[:, None, :]).any(axis=2)
        more = (scores.extra_ids != -1) & ~twice
        ids = np.concatenate([ids, np.where(more, scores.extra_ids, -1)], axis=1)
        extra = np.where(more, scores.extra_logprobs, -np.inf).astype(np.float64)
        listed = np.concatenate([listed, extra], axis=1)
        if (rest := scores.extra_tail_logprobs) is not None:
            tail = rest
            mass = np.exp(listed).sum(axis=1) + np.exp(rest.astype(np.float64))
            wrong, what = np.abs(mass - 1) > MASS_TOLERANCE, "mass of list, extra ids and tail"
            _refuse(rollout, np.asarray(wrong), what, mass, expected)
    matches = ids == rollout.tokens[rollout.prompt_length :, None]
    in_list = matches.any(axis=1)
    field, logprobs = "teacher_logprobs", scores.teacher_logprobs.astype(np.float64)
    entry = np.where(matches, listed, 0.0).sum(axis=1)
    differs = in_list & (np.abs(entry - logprobs) > AGREEMENT_NATS)
    _refuse(rollout, differs, field, logprobs, "the token's entry in its list")
    above = ~in_list & (logprobs > tail + AGREEMENT_NATS)
    _refuse(rollout, above, field, logprobs, "at most the tail, which holds the token")


def _check_logprobs(
    rollout: Rollout, field: str, values: np.ndarray, shape: tuple[int, ...], *, tail: bool = False
) -> None:
    _check_shape(rollout, field, values, shape)
    bad = np.isnan(values) | (values > MASS_TOLERANCE)
    if not tail:
        bad |= np.isneginf(values)
    expected = "a log-prob, at most 0" if tail else "a finite log-prob, at most 0"
    _refuse(rollout, bad, field, values, expected)


def _check_shape(
    rollout: Rollout, field: str, values: np.ndarray, shape: tuple[int, ...], kinds: str = "f"
) -> None:
    if values.shape != shape or values.dtype.kind not in kinds:
        what = "floats of shape" if kinds == "f" else "integers"
        raise DataError(
            f"{name_of(rollout)}: {field} is {_form(values)}, expected {what} {list(shape)}"
        )


def _check_ids(
    rollout: Rollout,
    field: str,
    ids: np.ndarray,
    shape: tuple[int, ...],
    vocab_size: int,
    used: np.ndarray | bool = True,
) -> None:
    _check_shape(rollout, field, ids, shape, "iu")
    bad = used & ((ids < 0) | (ids >= vocab_size))
    _refuse(rollout, bad, field, ids, f"ids in [0, {vocab_size})")
    ordered = np.sort(ids, axis=1)
    twice = (np.diff(ordered, axis=1) == 0) & (ordered[:, 1:] != -1)
    _refuse(rollout, twice, field, ordered[:, 1:], "distinct ids in a row")


def _refuse(
    rollout: Rollout,
    bad: np.ndarray,  # [R] or [R, K] bool
    field: str,
    values: np.ndarray | None,  # as bad
    expected: str,
) -> None:
    """Raise DataError for the first True in `bad`; names the response token and the value."""
    if not bad.any():
        return
    where = tuple(int(index[0]) for index in np.nonzero(bad))
    token = int(rollout.tokens[rollout.prompt_length + where[0]])
    found = "" if values is None else f" is {values[where]}"
    raise DataError(
        f"{name_of(rollout)}: {field} of response token {where[0]} (id {token}){found}, expected "
        f"{expected}"
    )


def _form(values: np.ndarray) -> str:
    return f"{values.dtype} {list(values.shape)}"


def check_scored_sequence(item: TeacherSequence, codec: str, *, calibrated: bool = False) -> None:
    """Check that every token has a distribution that agrees with its teacher_logprobs.

    Those that are `calibrated` have to be finite only.

    Args:
        codec: that the sequence was stored with. Readers shift a rounded list, with the exact
            log-prob of the sampled token in it, by no more than its largest rounding error.

    Raises:
        DataError: names the sequence, the response token and what it lacks.
    """
    if calibrated:
        _check_finite(item.rollout, item.teacher_logprobs, len(item.rollout.rollout_logprobs))
        return
    name, rollout, lists = name_of(item.rollout), item.rollout, item.lists
    tail = item.tail_logprobs.astype(np.float64)
    logprobs = item.teacher_logprobs.astype(np.float64)
    mass = lists.row_sums(np.exp(lists.logprobs.astype(np.float64))) + np.exp(tail)
    sampled = rollout.tokens[rollout.prompt_length :]
    is_sampled = lists.ids == sampled[lists.rows]
    entry = lists.row_sums(np.where(is_sampled, lists.logprobs, 0.0))
    lowest = np.zeros(len(logprobs))
    np.minimum.at(lowest, lists.rows, lists.logprobs)
    rounding = LIST_ROUNDING[codec] * -lowest
    listed, agrees = lists.contains(sampled), np.abs(entry - logprobs) < AGREEMENT_NATS + rounding
    tolerance = MASS_TOLERANCE if codec == "exact" else LOSSY_MASS_TOLERANCE
    checks = {
        "valid teacher_logprobs": np.isfinite(logprobs) & (logprobs <= MASS_TOLERANCE),
        "a mass of list and tail of 1": np.abs(mass - 1) <= tolerance,
        "teacher_logprobs that agree with its list": ~listed | agrees,
        "teacher_logprobs within its tail": listed | (logprobs <= tail + AGREEMENT_NATS),
    }
    for what, good in checks.items():
        if not good.all():
            row = int(np.flatnonzero(~good)[0])
            raise DataError(
                f"{name}: response token {row} lacks {what} (teacher_logprobs {logprobs[row]:.4g}, "
                f"tail {tail[row]:.4g}, mass {mass[row]:.6g}); score it again"
            )
