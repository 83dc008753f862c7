"""Fields of records that other tools wrote: ids, masks, log-probs and stand-ins for them, names."""

import hashlib
import math
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lopd.data.records import read_records
from lopd.data.skipped import Skipped
from lopd.errors import ConfigError, DataError, LopdError
from lopd.store import FINISH_REASONS, Rollout
from lopd.store.validate import MASS_TOLERANCE

# Values that tools write where there is no log-prob. No softmax gives a log-prob of -1000: logits
# would have to be a thousand apart.
STAND_INS = (-100.0, -999.0)
LOWEST = -1000.0
# Logs of the smallest numbers of fp32 and fp64, normal or not: what log(max(p, tiny)) gives.
FLOORS = (-87.3365, -103.2789, -708.3964, -744.4401)
_SAME = 4  # tokens of one answer that do not have exactly the same log-prob by chance
# Words of servers for an answer that ended by itself.
_STOPS = ("tool_calls", "function_call", "eos_token", "end_turn")
Item = TypeVar("Item")


def read_sequences(
    path: str | Path,
    skipped: Skipped,
    parse: Callable[[str, dict[str, Any], Counter[str]], list[Item]],
    rollout_of: Callable[[Item], Rollout],
) -> Iterator[Item]:
    """The sequences of a file of records, in order.

    Args:
        skipped: takes the records that cannot be used.
        parse: the sequences of one record, from its place, the record, and the number of sequences
            by prompt before it, which it counts on.

    Raises:
        DataError: a record is not of the format, or a sample of a prompt is there twice.
    """
    seen: Counter[str] = Counter()
    places: dict[tuple[str, int], str] = {}
    for where, record in read_records(path, skip=skipped.handle):
        try:
            items = _parsed(where, parse, record, seen.copy())
            names = [(rollout_of(item).prompt_id, rollout_of(item).sample) for item in items]
            for t, name in enumerate(names):
                if name in places or name in names[:t]:
                    raise DataError(
                        f"{where}: sample {name[1]} of '{name[0]}' is at "
                        f"{places.get(name, where)} already; number the samples of a prompt"
                    )
        except DataError as error:
            skipped.handle(error)
            continue
        places.update(dict.fromkeys(names, where))
        seen.update(name for name, _ in names)
        skipped.kept += 1
        yield from items


def _parsed(where: str, parse: Callable[..., list[Item]], *arguments: Any) -> list[Item]:
    try:
        return parse(where, *arguments)
    except LopdError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{where}: a field has another type than expected ({' '.join(str(error).split())})"
        ) from error


def sequence_name(
    where: str, name: Any, sample: Any, prompt: np.ndarray, seen: Counter[str]
) -> tuple[str, int]:
    """The prompt's id and the number of the sample, counted in `seen` where they are not given."""
    if name is None:
        name = hashlib.sha256(prompt.astype("<i4").tobytes()).hexdigest()[:16]
    if type(name) not in (str, int):
        raise DataError(f"{where}: id is {short(name)}; expected a string or a number")
    name = str(name)
    if sample is None:
        sample = seen[name]
    if type(sample) is not int or not 0 <= sample < 2**31:
        raise DataError(f"{where}: sample is {short(sample)}; expected a number from 0")
    seen[name] += 1
    return name, sample


def loss_mask(where: str, values: Any) -> np.ndarray:  # [R] bool
    """A mask of zeros and ones, also as true and false."""
    array = np.array([int(v) if type(v) is bool else v for v in values])
    if array.dtype.kind not in "iuf" or not np.isin(array, (0, 1)).all():
        raise DataError(f"{where}: loss_mask is {short(values)}; expected 0 and 1")
    return array == 1


def refuse_without_loss(where: str, mask: np.ndarray) -> None:
    """Refuse an answer whose mask leaves nothing to train on.

    Raises:
        DataError: no token of the mask is True.
    """
    if not mask.any():
        raise DataError(f"{where}: no token bears loss; drop the record, or mend its mask")


def finish_reason(where: str, reason: Any, last: int, eos_ids: Sequence[int]) -> str:
    """ "stop" or "length", from a record's word or from the last token."""
    if reason in FINISH_REASONS:
        return str(reason)
    if reason in _STOPS:
        return "stop"
    if reason is not None:
        raise DataError(
            f"{where}: finish_reason is {short(reason)}; expected {' or '.join(FINISH_REASONS)}"
        )
    if not eos_ids:
        raise ConfigError(
            f"{where}: no finish_reason; add it to the file, or name the folder of the student"
        )
    return "stop" if last in eos_ids else "length"


def integers(where: str, name: str, values: Any) -> np.ndarray:  # int32
    """A list of token ids as an array."""
    try:
        array = np.array(values)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ValueError
        if array.size and not (array.min() >= 0 and array.max() < 2**31):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise DataError(
            f"{where}: {name} are {short(values)}; expected a list of integers from 0"
        ) from None
    return array.astype(np.int32)


def floats(where: str, name: str, values: Any) -> np.ndarray:  # fp64, NaN for null
    """A list of numbers as an array."""
    try:
        array = np.array([np.nan if value is None else logprob(value) for value in values])
    except (TypeError, ValueError, OverflowError):
        raise DataError(
            f"{where}: {name} are {short(values)}; expected a list of numbers"
        ) from None
    return array.astype(np.float64)


def number(where: str, name: str, value: Any) -> float | None:
    """A field that holds one number, or null."""
    if value is None:
        return None
    if type(value) not in (bool, int, float) or not math.isfinite(value):
        raise DataError(
            f"{where}: {name} is {short(value)}; expected a finite number; leave the field out if "
            "it means something else"
        )
    return float(value)


def logprob(value: Any) -> float:
    """The number as a float; TypeError if it is none."""
    if type(value) not in (int, float):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def is_stand_in(values: np.ndarray) -> np.ndarray:  # bool, as values
    """Values that cannot be the log-prob of a sampled token, whatever the model.

    >>> is_stand_in(np.array([-0.5, 0.0, 1.0, -100.0, -9999.0, np.nan, -np.inf])).tolist()
    [False, False, True, True, True, True, True]
    >>> is_stand_in(np.log([1e-37, np.finfo(np.float32).tiny, np.finfo(np.float64).tiny])).tolist()
    [False, True, True]
    """
    values = np.asarray(values, np.float64)
    with np.errstate(invalid="ignore"):
        return ~(values <= MASS_TOLERANCE) | is_padding(values)


def is_padding(values: np.ndarray) -> np.ndarray:
    """Where values stand for no log-prob."""
    values = np.asarray(values, np.float64)
    known = np.isin(np.round(values, 4), STAND_INS + FLOORS)
    return (values <= LOWEST) | known | np.isnan(values)


def refuse_stand_ins(
    where: str, response: np.ndarray, bad: np.ndarray, values: np.ndarray, name: str
) -> None:
    """DataError if a token of the response has no log-prob."""
    if bad.any():
        t = int(np.flatnonzero(bad)[0])
        raise DataError(
            f"{where}: {name} of response token {t} (id {response[t]}) is {values[t]:g}, which no "
            "sampled token has; dump its log-prob, or set its loss_mask to 0"
        )


def refuse_same(where: str, logprobs: np.ndarray, name: str, remedy: str) -> None:
    """Refuse an answer whose tokens all have the same log-prob."""
    if len(logprobs) >= _SAME and (logprobs == logprobs[0]).all():
        raise DataError(
            f"{where}: all {len(logprobs)} {name} are {logprobs[0]:g}, which stands for none; "
            f"{remedy}"
        )


def short(value: Any) -> str:
    """A value in a message."""
    return reprlib.repr(value)
