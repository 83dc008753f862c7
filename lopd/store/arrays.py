"""The arrays of a shard: their names and types, and how sequences are written to them."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lopd.store.bits import id_bits, pack_bits
from lopd.store.codec import Codec, bucket_error, decode, encode
from lopd.store.lists import is_floored
from lopd.store.ragged import TopKLists, offsets_of
from lopd.store.types import FINISH_REASONS, Rollout, TeacherColumns

ROLLOUT_ARRAYS = {
    "token_offsets": np.int64,
    "response_offsets": np.int64,
    "prompt_id_offsets": np.int64,
    "prompt_ids": np.uint8,
    "sample": np.int32,
    "finish_reason": np.uint8,
    "tokens": np.int32,
    "loss_mask": np.bool_,
    "rollout_logprobs": np.float32,
}
RAW = "rollout_logprobs_raw"  # stored only where it differs from rollout_logprobs
# Stored only in shards where a sequence has them.
GIVEN_ARRAYS = {"weight": np.float32, "reward": np.float32, "token_weights": np.float32}
# None stands for any unsigned integer.
SCORE_ARRAYS: dict[str, Any] = {
    "teacher_logprobs": np.float32,
    "teacher_entropy": np.float32,
    "tail_logprobs": np.float32,
    "list_offsets": np.int64,
    "list_lengths": None,
    "list_ids": np.int32,
    "list_logprobs": np.float32,
}
LOSSY_ARRAYS: dict[Codec, dict[str, Any]] = {
    "exact": {},
    "packed": {"list_ids": np.uint8, "list_logprobs": np.float16},
    "compact": {
        "tokens": np.uint8,
        "loss_mask": np.uint8,
        "rollout_logprobs": np.float16,
        "teacher_logprobs": np.float16,
        "teacher_entropy": np.float16,
        "tail_logprobs": np.float16,
        "list_ids": np.uint8,
        "list_id_offsets": np.int64,
        "list_logprobs": np.uint8,
        "sampled_listed": np.uint8,
    },
}
# These locate everything else. They are small, so they are hashed whenever a shard is opened.
INDEX_ARRAYS = (
    "token_offsets",
    "response_offsets",
    "prompt_id_offsets",
    "prompt_ids",
    "sample",
    "finish_reason",
    "list_offsets",
    "list_id_offsets",
)


def index_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """sha256, in hex, of those of `INDEX_ARRAYS` that a shard has."""
    digest = hashlib.sha256()
    for name in INDEX_ARRAYS:
        if name in arrays:
            digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def rollout_arrays(
    rollouts: Sequence[Rollout], codec: Codec | None, vocab_size: int
) -> dict[str, np.ndarray]:
    """The rollout arrays of a shard; raw log-probs only where they differ."""
    names = [rollout.prompt_id.encode("utf-8") for rollout in rollouts]
    arrays = {
        "token_offsets": _offsets(len(r.tokens) for r in rollouts),
        "response_offsets": _offsets(len(r.rollout_logprobs) for r in rollouts),
        "prompt_id_offsets": _offsets(len(name) for name in names),
        "prompt_ids": np.frombuffer(b"".join(names), np.uint8),
        "sample": np.array([r.sample for r in rollouts]),
        "finish_reason": np.array([FINISH_REASONS.index(r.finish_reason) for r in rollouts]),
        "tokens": np.concatenate([r.tokens for r in rollouts]),
        "loss_mask": np.concatenate([r.loss_mask for r in rollouts]),
        "rollout_logprobs": np.concatenate([r.rollout_logprobs for r in rollouts]),
    }
    raw = np.concatenate([r.rollout_logprobs_raw for r in rollouts]).astype(np.float32)
    arrays = {name: values.astype(ROLLOUT_ARRAYS[name]) for name, values in arrays.items()}
    if not np.array_equal(raw, arrays["rollout_logprobs"], equal_nan=True):
        arrays[RAW] = raw
    arrays |= _given_arrays(rollouts)
    if codec == "compact":
        arrays["tokens"] = pack_bits(arrays["tokens"], id_bits(vocab_size))
        arrays["loss_mask"] = pack_bits(arrays["loss_mask"], 1)
        for name in {"rollout_logprobs", RAW} & arrays.keys():
            arrays[name] = arrays[name].astype(np.float16)
    return arrays


def _given_arrays(rollouts: Sequence[Rollout]) -> dict[str, np.ndarray]:
    """Weights and rewards, where a sequence has them."""
    arrays = {
        "weight": np.array([r.weight for r in rollouts], np.float32),
        "reward": np.array([math.nan if r.reward is None else r.reward for r in rollouts], "f4"),
    }
    absent = {
        "weight": (arrays["weight"] == 1).all(),
        "reward": np.isnan(arrays["reward"]).all(),
    }
    given = {name: values for name, values in arrays.items() if not absent[name]}
    if any(r.token_weights is not None for r in rollouts):
        weights = [
            np.ones(len(r.rollout_logprobs)) if r.token_weights is None else r.token_weights
            for r in rollouts
        ]
        given["token_weights"] = np.concatenate(weights).astype(np.float32)
    return given


def rollout_counts(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """The counts in the receipt of a shard of rollouts."""
    return {
        "sequences": len(rollouts),
        "tokens": sum(len(r.tokens) for r in rollouts),
        "response_tokens": sum(len(r.rollout_logprobs) for r in rollouts),
        "finish_reasons": {
            reason: sum(r.finish_reason == reason for r in rollouts) for reason in FINISH_REASONS
        },
    }


def score_arrays(
    rollouts: Sequence[Rollout], columns: Sequence[TeacherColumns], codec: Codec, vocab_size: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays that scores add to a shard, and the sums that they add to its receipt.

    `codec_error` is measured here, on what a reader will decode, because the exact log-probs are
    not stored.
    """
    sampled = np.concatenate([r.tokens[r.prompt_length :] for r in rollouts])
    rows = _offsets(len(part.teacher_logprobs) for part in columns)
    whole = _concatenate(columns)
    arrays, reference = encode(whole, sampled, rows, codec, vocab_size)
    error = 0.0
    if codec != "exact":
        stored = {**arrays, "response_offsets": rows}
        decoded = decode(stored, np.arange(len(rollouts)), sampled, codec, vocab_size)
        assert np.array_equal(decoded.lists.ids, reference.ids), "a codec lost ids"
        errors = bucket_error(reference, whole.tail_logprobs, decoded.lists, decoded.tail_logprobs)
        error = math.fsum(errors.tolist())
    tail, absent = whole.tail_logprobs, ~whole.lists.contains(sampled)
    floored = is_floored(tail[absent], whole.teacher_logprobs[absent])
    return arrays, {
        "list_entries": len(whole.lists.ids),
        "covered_mass": math.fsum((-np.expm1(tail.astype(np.float64))).tolist()),
        "entropy": _total(whole.teacher_entropy),
        "floored_tails": int(floored.sum()),
        "codec_error": error,
    }


def _concatenate(columns: Sequence[TeacherColumns]) -> TeacherColumns:
    return TeacherColumns(
        teacher_logprobs=np.concatenate([c.teacher_logprobs for c in columns]).astype(np.float32),
        teacher_entropy=np.concatenate([c.teacher_entropy for c in columns]).astype(np.float32),
        lists=TopKLists.concatenate([c.lists for c in columns]),
        tail_logprobs=np.concatenate([c.tail_logprobs for c in columns]).astype(np.float32),
    )


def _total(values: np.ndarray) -> float | None:
    """The sum, correctly rounded; None where the engine did not compute the values (NaN)."""
    total = math.fsum(values.tolist())
    return None if math.isnan(total) else total


def _offsets(lengths: Iterable[int]) -> np.ndarray:
    return offsets_of(np.fromiter(lengths, np.int64))
