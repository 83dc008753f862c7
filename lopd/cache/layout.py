"""Sequences as the flat arrays of a shard, and back."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lopd.cache.codec import (
    Codec,
    Lists,
    decode,
    encode,
    id_bits,
    in_lists,
    is_floored,
    packed_bytes,
)
from lopd.cache.records import FINISH_REASONS, MASS_TOLERANCE, Rollout
from lopd.cache.shards import check_offsets
from lopd.errors import ShardError

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
SCORE_ARRAYS = {
    "teacher_logprobs": np.float32,
    "teacher_entropy": np.float32,
    "tail_logprobs": np.float32,
    "list_offsets": np.int64,
}


@dataclass(frozen=True)
class Scored:
    """What a cache stores of one sequence besides the rollout."""

    logprobs: np.ndarray  # [R] fp32
    entropy: np.ndarray  # [R] fp32
    lists: Lists
    tail: np.ndarray  # [R] fp32


def rollout_arrays(rollouts: Sequence[Rollout]) -> dict[str, np.ndarray]:
    """The arrays of a shard of sequences; raw log-probs only where they differ."""
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
    if not np.array_equal(raw, arrays["rollout_logprobs"]):
        arrays["rollout_logprobs_raw"] = raw
    return arrays


def rollout_counts(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """What a receipt says of a shard of sequences."""
    return {
        "sequences": len(rollouts),
        "tokens": sum(len(r.tokens) for r in rollouts),
        "response_tokens": sum(len(r.rollout_logprobs) for r in rollouts),
        "finish_reasons": {
            reason: sum(r.finish_reason == reason for r in rollouts) for reason in FINISH_REASONS
        },
    }


def score_arrays(scored: Sequence[Scored], codec: Codec, vocab_size: int) -> dict[str, np.ndarray]:
    """The arrays that a cache shard adds; list lengths in the smallest type that holds them."""
    lengths = np.concatenate([s.lists.lengths for s in scored])
    together = Lists(
        np.concatenate([s.lists.ids for s in scored]),
        np.concatenate([s.lists.logprobs for s in scored]),
        lengths,
    )
    return {
        "teacher_logprobs": np.concatenate([s.logprobs for s in scored]).astype(np.float32),
        "teacher_entropy": np.concatenate([s.entropy for s in scored]).astype(np.float32),
        "tail_logprobs": np.concatenate([s.tail for s in scored]).astype(np.float32),
        "list_offsets": _offsets(len(s.lists.ids) for s in scored),
        "list_lengths": lengths.astype(np.min_scalar_type(int(lengths.max()))),
        **encode(together, codec, vocab_size),
    }


def score_counts(rollouts: Sequence[Rollout], scored: Sequence[Scored]) -> dict[str, Any]:
    """What a receipt adds for a cache: sums over response tokens, correctly rounded."""
    floored = 0
    for rollout, s in zip(rollouts, scored, strict=True):
        absent = ~in_lists(s.lists, rollout.tokens[rollout.prompt_length :])
        floored += int(is_floored(s.tail[absent], s.logprobs[absent]).sum())
    return {
        "list_entries": sum(len(s.lists.ids) for s in scored),
        "covered_mass": math.fsum(
            float(mass) for s in scored for mass in -np.expm1(s.tail.astype(np.float64))
        ),
        "entropy": math.fsum(float(value) for s in scored for value in s.entropy),
        "floored_tails": floored,
    }


class ShardView:
    """One open shard: sequences by position, straight from the mapped file.

    Raises:
        ShardError: arrays that are absent, of another type, or that do not fit together.
    """

    def __init__(
        self,
        path: Path,
        arrays: Mapping[str, np.ndarray],
        receipt: Mapping[str, Any],
        codec: Codec | None,
        vocab_size: int,
    ) -> None:
        self.path = path
        self.arrays = arrays
        self.sequences: int = receipt["sequences"]
        self._codec, self._vocab_size = codec, vocab_size
        self._check_types()
        n, tokens = self.sequences, len(arrays["tokens"])
        response = len(arrays["rollout_logprobs"])
        check_offsets(path, "token_offsets", arrays["token_offsets"], n, tokens)
        check_offsets(path, "response_offsets", arrays["response_offsets"], n, response)
        names = len(arrays["prompt_ids"])
        check_offsets(path, "prompt_id_offsets", arrays["prompt_id_offsets"], n, names)
        self._check_lengths({"loss_mask": tokens, "sample": n, "finish_reason": n})
        if tokens != receipt["tokens"] or response != receipt["response_tokens"]:
            raise self._altered("token counts differ from the receipt")
        if codec is not None:
            self._check_scores(response)

    def rollout(self, index: int) -> Rollout:
        """Sequence `index` as copies; ids are checked against the vocabulary."""
        arrays = self.arrays
        start, stop = arrays["token_offsets"][index : index + 2]
        tokens = arrays["tokens"][start:stop].copy()
        response = self._response(index)
        sampled = arrays["rollout_logprobs"][response].copy()
        prompt_length = len(tokens) - len(sampled)
        reason = int(arrays["finish_reason"][index])
        raw = arrays.get("rollout_logprobs_raw")
        if prompt_length < 1 or not len(sampled) or reason >= len(FINISH_REASONS):
            raise self._altered(f"sequence {index} has impossible lengths or finish reason")
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise self._altered(f"sequence {index} has an id outside [0, {self._vocab_size})")
        first, last = arrays["prompt_id_offsets"][index : index + 2]
        return Rollout(
            prompt_id=arrays["prompt_ids"][first:last].tobytes().decode("utf-8"),
            sample=int(arrays["sample"][index]),
            tokens=tokens,
            prompt_length=prompt_length,
            finish_reason=FINISH_REASONS[reason],
            loss_mask=arrays["loss_mask"][start:stop].copy(),
            rollout_logprobs=sampled,
            rollout_logprobs_raw=sampled if raw is None else raw[response].copy(),
        )

    def scored(self, index: int) -> Scored:
        """The scores of sequence `index`, list entries checked; views where not decoded."""
        response = self._response(index)
        return Scored(
            logprobs=self.arrays["teacher_logprobs"][response],
            entropy=self.arrays["teacher_entropy"][response],
            lists=self._lists(index, response),
            tail=self.arrays["tail_logprobs"][response],
        )

    def _lists(self, index: int, response: slice) -> Lists:
        assert self._codec is not None
        start, stop = (int(at) for at in self.arrays["list_offsets"][index : index + 2])
        lengths = self.arrays["list_lengths"][response].astype(np.int64)
        ids, logprobs = decode(
            self.arrays["list_ids"],
            self.arrays["list_logprobs"],
            start,
            stop,
            self._codec,
            self._vocab_size,
        )
        if lengths.sum() != stop - start:
            raise self._altered(f"list lengths of sequence {index} do not add up")
        if len(ids) and (ids.min() < 0 or ids.max() >= self._vocab_size):
            raise self._altered(f"sequence {index} has a listed id outside [0, {self._vocab_size})")
        if not (np.isfinite(logprobs) & (logprobs <= MASS_TOLERANCE)).all():
            raise self._altered(f"sequence {index} has a listed log-prob that is none")
        return Lists(ids, logprobs, lengths)

    @cached_property
    def _response_offsets(self) -> np.ndarray:
        return self.arrays["response_offsets"]

    def _response(self, index: int) -> slice:
        start, stop = self._response_offsets[index : index + 2]
        return slice(int(start), int(stop))

    def _check_types(self) -> None:
        expected: dict[str, Any] = dict(ROLLOUT_ARRAYS)
        if "rollout_logprobs_raw" in self.arrays:
            expected["rollout_logprobs_raw"] = np.float32
            self._check_lengths({"rollout_logprobs_raw": len(self.arrays["rollout_logprobs"])})
        if self._codec is not None:
            packed = self._codec == "packed"
            expected |= SCORE_ARRAYS
            expected["list_ids"] = np.uint8 if packed else np.int32
            expected["list_logprobs"] = np.float16 if packed else np.float32
            expected["list_lengths"] = None
        if self.arrays.keys() != expected.keys():
            odd = sorted(self.arrays.keys() ^ expected.keys())[0]
            raise self._altered(f"array '{odd}' is missing or unknown")
        for name, values in self.arrays.items():
            right = values.dtype == expected[name] if expected[name] else values.dtype.kind == "u"
            if not right or values.ndim != 1:
                raise self._altered(f"array '{name}' is {values.dtype} {list(values.shape)}")

    def _check_scores(self, response: int) -> None:
        arrays = self.arrays
        entries = len(arrays["list_logprobs"])
        check_offsets(self.path, "list_offsets", arrays["list_offsets"], self.sequences, entries)
        packed = packed_bytes(entries, id_bits(self._vocab_size))
        names = ("teacher_logprobs", "teacher_entropy", "tail_logprobs", "list_lengths")
        self._check_lengths(
            {
                **dict.fromkeys(names, response),
                "list_ids": packed if self._codec == "packed" else entries,
            }
        )

    def _check_lengths(self, lengths: Mapping[str, int]) -> None:
        for name, expected in lengths.items():
            if len(self.arrays[name]) != expected:
                raise self._altered(
                    f"array '{name}' has {len(self.arrays[name])} entries, expected {expected}"
                )

    def _altered(self, what: str) -> ShardError:
        return ShardError(f"{self.path}: {what}: altered; run the stage again to redo it")


def _offsets(lengths: Any) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.fromiter(lengths, np.int64))]).astype(np.int64)
