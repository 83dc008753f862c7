"""What is stored per sequence, and what is refused at the door."""

from dataclasses import dataclass

import numpy as np

from lopd.errors import DataError

FINISH_REASONS = ("stop", "length")
# Slack for rounding in whatever engine scored: probabilities may sum to 1 within this.
MASS_TOLERANCE = 1e-3
# The token's own log-prob and its entry in the list may differ by this many nat.
AGREEMENT_NATS = 0.05


@dataclass(frozen=True)
class Rollout:
    """One sequence: a teacher's answer for fine-tuning, or a student's rollout.

    `rollout_logprobs` are under the distribution that was sampled from (temperature and
    top_p applied), `rollout_logprobs_raw` at temperature 1 and top_p 1; pass the same array
    twice where they agree. Both are NaN throughout where the manifest of the cache says that
    they are absent (`shards.scoring_of`).
    """

    prompt_id: str  # stable under reordering of the prompts
    sample: int  # sample number of that prompt
    tokens: np.ndarray  # [T] int32, prompt then response, EOS kept when finish_reason is "stop"
    prompt_length: int  # >= 1; R = T - prompt_length >= 1
    finish_reason: str  # "stop" or "length"
    loss_mask: np.ndarray  # [T] bool, False on the prompt
    rollout_logprobs: np.ndarray  # [R] fp32, nat
    rollout_logprobs_raw: np.ndarray  # [R] fp32, nat


@dataclass(frozen=True)
class TeacherScores:
    """What an engine returns for one rollout. Entry t describes the distribution that
    produced response token t; log-probs in nat, not renormalised over any list.

    `extra_ids` are further ids to store whatever `top_p` says, e.g. the student's own top
    ids; those already in the list are stored once. `extra_tail_logprobs` goes with them where
    the engine can reduce it; otherwise their mass is taken out of the tail.
    """

    logprobs: np.ndarray  # [R] fp32, of the response token itself
    entropy: np.ndarray  # [R] fp32, nat; all NaN where the engine cannot tell it
    topk_ids: np.ndarray  # [R, K] int32, distinct
    topk_logprobs: np.ndarray  # [R, K] fp32, descending
    tail_logprobs: np.ndarray  # [R] fp32, log of the mass outside the K ids; -inf when K = V
    extra_ids: np.ndarray | None = None  # [R, E] int32, -1 pads
    extra_logprobs: np.ndarray | None = None  # [R, E] fp32
    extra_tail_logprobs: np.ndarray | None = None  # [R] fp32, outside the K ids and extra ids


@dataclass(frozen=True)
class TeacherSequence:
    """One scored rollout as the reader returns it; every array is the caller's own.

    Lists of codec `compact` begin with the sampled token and go on by id; those of the others
    go by log-prob, what was appended last.
    """

    rollout: Rollout
    teacher_logprobs: np.ndarray  # [R] fp32, of the response token itself
    teacher_entropy: np.ndarray  # [R] fp32, nat; all NaN where the engine could not tell it
    topk_ids: np.ndarray  # [R, K_i] int32, -1 pads; K_i = the longest list of the sequence
    topk_logprobs: np.ndarray  # [R, K_i] fp32, -inf pads
    tail_logprobs: np.ndarray  # [R] fp32, log of the mass outside the list as it stands here


def name_of(rollout: Rollout) -> str:
    """How messages call a sequence."""
    return f"sequence {rollout.prompt_id}/{rollout.sample}"


def check_rollout(rollout: Rollout, vocab_size: int, *, has_logprobs: bool = True) -> None:
    """Refuse a sequence that cannot be stored or trained on.

    Without `has_logprobs`, for imported ones that lack them, its log-probs are to be NaN.

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
    _check_ids(name, "token", tokens, vocab_size)
    if rollout.loss_mask.shape != tokens.shape or rollout.loss_mask.dtype != np.bool_:
        raise DataError(
            f"{name}: loss_mask is {_form(rollout.loss_mask)}, expected bool [{len(tokens)}]"
        )
    marked = np.flatnonzero(rollout.loss_mask[: rollout.prompt_length])
    if len(marked):
        raise DataError(
            f"{name}: loss_mask is True on prompt token {marked[0]}; only response tokens "
            "can carry loss"
        )
    for field in ("rollout_logprobs", "rollout_logprobs_raw"):
        if not has_logprobs:
            _check_shape(name, field, getattr(rollout, field), (length,))
            known = ~np.isnan(getattr(rollout, field))
            _refuse(name, rollout, known, field, getattr(rollout, field), "NaN, as declared")
            continue
        _check_logprobs(name, field, getattr(rollout, field), (length,), rollout)


def check_scores(
    rollout: Rollout, scores: TeacherScores, vocab_size: int, k: int, *, has_entropy: bool = True
) -> None:
    """Refuse scores that are not a distribution over `vocab_size` ids for every token.

    Without `has_entropy`, for engines that cannot tell it, the entropy is to be NaN.

    Raises:
        DataError: names the sequence, the response token and what is wrong with it.
    """
    name = name_of(rollout)
    length = len(rollout.tokens) - rollout.prompt_length
    _check_logprobs(name, "logprobs", scores.logprobs, (length,), rollout)
    _check_logprobs(name, "topk_logprobs", scores.topk_logprobs, (length, k), rollout)
    _check_logprobs(name, "tail_logprobs", scores.tail_logprobs, (length,), rollout, tail=True)
    _check_shape(name, "entropy", scores.entropy, (length,))
    if has_entropy:
        bad = np.asarray(~np.isfinite(scores.entropy) | (scores.entropy < -MASS_TOLERANCE))
        _refuse(name, rollout, bad, "entropy", scores.entropy, "a finite number of nat, at least 0")
    else:
        _refuse(name, rollout, ~np.isnan(scores.entropy), "entropy", scores.entropy, "NaN")
    _check_list(name, "topk_ids", scores.topk_ids, (length, k), vocab_size, rollout)
    if (scores.extra_ids is None) != (scores.extra_logprobs is None):
        raise DataError(f"{name}: extra_ids and extra_logprobs come together or not at all")
    if scores.extra_ids is not None and scores.extra_logprobs is not None:
        shape = (length, *scores.extra_ids.shape[1:])
        used = scores.extra_ids != -1
        _check_list(name, "extra_ids", scores.extra_ids, shape, vocab_size, rollout, used)
        _check_shape(name, "extra_logprobs", scores.extra_logprobs, shape)
        filled = np.where(used, scores.extra_logprobs, 0.0)
        _check_logprobs(name, "extra_logprobs", filled, shape, rollout)
        if (rest := scores.extra_tail_logprobs) is not None:
            _check_logprobs(name, "extra_tail_logprobs", rest, (length,), rollout, tail=True)
    _check_distribution(name, rollout, scores)


def _check_distribution(name: str, rollout: Rollout, scores: TeacherScores) -> None:
    """List and tail sum to one, descend, and agree with the token's own log-prob."""
    listed = scores.topk_logprobs.astype(np.float64)
    rising = np.asarray((np.diff(listed, axis=1) > 0).any(axis=1))
    _refuse(name, rollout, rising, "topk_logprobs", None, "descending log-probs")
    mass = np.exp(listed).sum(axis=1) + np.exp(scores.tail_logprobs.astype(np.float64))
    _refuse(
        name,
        rollout,
        np.abs(mass - 1) > MASS_TOLERANCE,
        "mass of list and tail",
        mass,
        f"1 within {MASS_TOLERANCE}",
    )
    matches = scores.topk_ids == rollout.tokens[rollout.prompt_length :, None]
    in_list = matches.any(axis=1)
    own = scores.logprobs.astype(np.float64)
    listed_own = np.where(matches, listed, 0.0).sum(axis=1)
    apart = in_list & (np.abs(listed_own - own) > AGREEMENT_NATS)
    _refuse(name, rollout, apart, "logprobs", own, "the token's own entry in topk_logprobs")
    above = ~in_list & (own > scores.tail_logprobs + AGREEMENT_NATS)
    _refuse(name, rollout, above, "logprobs", own, "no more than the tail that holds the token")


def _check_logprobs(
    name: str,
    field: str,
    values: np.ndarray,
    shape: tuple[int, ...],
    rollout: Rollout,
    *,
    tail: bool = False,
) -> None:
    _check_shape(name, field, values, shape)
    bad = np.isnan(values) | (values > MASS_TOLERANCE)
    if not tail:
        bad |= np.isneginf(values)
    expected = "a log-prob, at most 0" if tail else "a finite log-prob, at most 0"
    _refuse(name, rollout, bad, field, values, expected)


def _check_shape(name: str, field: str, values: np.ndarray, shape: tuple[int, ...]) -> None:
    if values.shape != shape or values.dtype.kind != "f":
        raise DataError(
            f"{name}: {field} is {_form(values)}, expected floats of shape {list(shape)}"
        )


def _check_list(
    name: str,
    field: str,
    ids: np.ndarray,
    shape: tuple[int, ...],
    vocab_size: int,
    rollout: Rollout,
    used: np.ndarray | None = None,
) -> None:
    if ids.shape != shape or ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise DataError(f"{name}: {field} is {_form(ids)}, expected integers {list(shape)}")
    used = np.ones(ids.shape, bool) if used is None else used
    bad = used & ((ids < 0) | (ids >= vocab_size))
    _refuse(name, rollout, bad, field, ids, f"ids in [0, {vocab_size})")
    ordered = np.sort(ids, axis=1)
    twice = (np.diff(ordered, axis=1) == 0) & (ordered[:, 1:] != -1)
    _refuse(name, rollout, twice, field, ordered[:, 1:], "distinct ids in a row")


def _check_ids(name: str, what: str, ids: np.ndarray, vocab_size: int) -> None:
    bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(bad):
        raise DataError(
            f"{name}: {what} {bad[0]} has id {ids[bad[0]]}, expected ids in [0, {vocab_size})"
        )


def _refuse(
    name: str,
    rollout: Rollout,
    bad: np.ndarray,  # [R] or [R, K] bool
    field: str,
    values: np.ndarray | None,  # as bad
    expected: str,
) -> None:
    """Raise for the first True in `bad`, naming response token and value."""
    if not bad.any():
        return
    where = tuple(int(index[0]) for index in np.nonzero(bad))
    token = int(rollout.tokens[rollout.prompt_length + where[0]])
    found = "" if values is None else f" is {values[where]}"
    raise DataError(
        f"{name}: {field} of response token {where[0]} (id {token}){found}, expected {expected}"
    )


def _form(values: np.ndarray) -> str:
    return f"{values.dtype} {list(values.shape)}"
