"""Sequences as the flat arrays of a shard, and back."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lopd.errors import DataError, ShardError
from lopd.store.bits import id_bits, pack_bits, packed_bytes, unpack_bits
from lopd.store.codec import Codec, Scored, Spans, bucket_error, decode, encode, offsets_of
from lopd.store.lists import Lists, in_lists, is_floored
from lopd.store.shards import check_offsets
from lopd.store.types import FINISH_REASONS, Rollout

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
RAW = "rollout_logprobs_raw"  # only where it differs
# None: any unsigned integer.
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


# What says where everything else lies; small, and so hashed whenever a shard is opened.
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
    """sha256, in hex, of the arrays that a shard has of `INDEX_ARRAYS`."""
    digest = hashlib.sha256()
    for name in INDEX_ARRAYS:
        if name in arrays:
            digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def rollout_arrays(
    rollouts: Sequence[Rollout], codec: Codec | None, vocab_size: int
) -> dict[str, np.ndarray]:
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
    if not np.array_equal(raw, arrays["rollout_logprobs"], equal_nan=True):
        arrays[RAW] = raw
    if codec == "compact":
        arrays["tokens"] = pack_bits(arrays["tokens"], id_bits(vocab_size))
        arrays["loss_mask"] = pack_bits(arrays["loss_mask"], 1)
        for name in {"rollout_logprobs", RAW} & arrays.keys():
            arrays[name] = arrays[name].astype(np.float16)
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


def score_shard(
    rollouts: Sequence[Rollout], scored: Sequence[Scored], codec: Codec, vocab_size: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays that a cache shard adds, and what its receipt adds: sums over response tokens.

    `codec_error` is measured here, on what a reader will decode, for nothing that is stored
    could tell it later.
    """
    sampled = np.concatenate([r.tokens[r.prompt_length :] for r in rollouts])
    rows = _offsets(len(s.logprobs) for s in scored)
    whole = _together(scored)
    arrays, reference = encode(whole, sampled, rows, codec, vocab_size)
    error = 0.0
    if codec != "exact":
        stored = {**arrays, "response_offsets": rows}
        decoded = decode(stored, np.arange(len(rollouts)), sampled, codec, vocab_size)
        assert np.array_equal(decoded.lists.ids, reference.ids), "a codec lost ids"
        errors = bucket_error(reference, whole.tail, decoded.lists, decoded.tail)
        error = math.fsum(errors.tolist())
    absent = ~in_lists(whole.lists, sampled)
    return arrays, {
        "list_entries": len(whole.lists.ids),
        "covered_mass": math.fsum((-np.expm1(whole.tail.astype(np.float64))).tolist()),
        "entropy": _total(whole.entropy),
        "floored_tails": int(is_floored(whole.tail[absent], whole.logprobs[absent]).sum()),
        "codec_error": error,
    }


def _together(scored: Sequence[Scored]) -> Scored:
    lists = [s.lists for s in scored]
    return Scored(
        logprobs=np.concatenate([s.logprobs for s in scored]).astype(np.float32),
        entropy=np.concatenate([s.entropy for s in scored]).astype(np.float32),
        lists=Lists(
            np.concatenate([item.ids for item in lists]),
            np.concatenate([item.logprobs for item in lists]),
            np.concatenate([item.lengths for item in lists]),
        ),
        tail=np.concatenate([s.tail for s in scored]).astype(np.float32),
    )


class ShardView:
    """One open shard: sequences by position, one or many at a time, from the mapped file.

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
        n, response = self.sequences, len(arrays["rollout_logprobs"])
        compact = codec == "compact"
        tokens = int(arrays["token_offsets"][-1:].sum()) if compact else len(arrays["tokens"])
        check_offsets(path, "token_offsets", arrays["token_offsets"], n, tokens)
        check_offsets(path, "response_offsets", arrays["response_offsets"], n, response)
        names = len(arrays["prompt_ids"])
        check_offsets(path, "prompt_id_offsets", arrays["prompt_id_offsets"], n, names)
        self._check_lengths(
            {
                "tokens": packed_bytes(tokens, id_bits(vocab_size)) if compact else tokens,
                "loss_mask": packed_bytes(tokens, 1) if compact else tokens,
                "sample": n,
                "finish_reason": n,
            }
        )
        if tokens != receipt["tokens"] or response != receipt["response_tokens"]:
            raise self._altered("token counts differ from the receipt")
        self.response_lengths = np.diff(arrays["response_offsets"])
        self._prompt_lengths = np.diff(arrays["token_offsets"]) - self.response_lengths
        odd = (self._prompt_lengths < 1) | (self.response_lengths < 1)
        odd |= arrays["finish_reason"] >= len(FINISH_REASONS)
        if odd.any():
            first = np.flatnonzero(odd)[0]
            raise self._altered(f"sequence {first} has impossible lengths or finish reason")
        if codec is not None:
            self._check_scores(response)
        if receipt.get("index_sha256") not in (None, index_digest(arrays)):
            raise self._altered("offsets or names differ from the receipt")

    def rollouts(self, positions: np.ndarray) -> list[Rollout]:  # [n] int64
        """Those sequences as copies; ids are checked against the vocabulary."""
        arrays = self.arrays
        spans = Spans.of(arrays["token_offsets"], positions)
        responses = Spans.of(arrays["response_offsets"], positions)
        tokens, mask = self._tokens(spans), self._loss_mask(spans)
        sampled = np.array(responses.take(arrays["rollout_logprobs"]), np.float32)
        raw = sampled
        if RAW in arrays:
            raw = np.array(responses.take(arrays[RAW]), np.float32)
        at = offsets_of(spans.lengths).tolist()
        row = offsets_of(responses.lengths).tolist()
        rollouts = []
        for number, index in enumerate(positions.tolist()):
            part = slice(at[number], at[number + 1])
            response = slice(row[number], row[number + 1])
            rollouts.append(
                Rollout(
                    prompt_id=self._prompt_id(index),
                    sample=int(arrays["sample"][index]),
                    tokens=tokens[part],
                    prompt_length=int(self._prompt_lengths[index]),
                    finish_reason=FINISH_REASONS[int(arrays["finish_reason"][index])],
                    loss_mask=mask[part],
                    rollout_logprobs=sampled[response],
                    rollout_logprobs_raw=raw[response],
                )
            )
        return rollouts

    def scored(self, positions: np.ndarray, *, with_sampled: bool = False) -> Scored:  # [n] int64
        """Their scores, end to end, list entries checked; views where not decoded.

        `with_sampled`, for codec `compact`, as in `codec.decode`.
        """
        assert self._codec is not None
        sampled = np.empty(0, np.int32)
        if self._codec == "compact":
            sampled = self._response_tokens(positions)
        try:
            return decode(
                self.arrays,
                positions,
                sampled,
                self._codec,
                self._vocab_size,
                with_sampled=with_sampled,
            )
        except DataError as error:
            raise self._altered(str(error)) from error

    def list_lengths(self) -> np.ndarray:  # [R] int64
        """Of every list as it was written."""
        lengths = self.arrays["list_lengths"].astype(np.int64)
        if self._codec == "compact":
            rows = np.arange(len(lengths))
            lengths += unpack_bits(self.arrays["sampled_listed"], rows, 1)
        return lengths

    def chunks(self, tokens: int) -> Iterator[np.ndarray]:
        """The shard's sequences in runs of about so many response tokens, one at least."""
        which = (np.cumsum(self.response_lengths) - 1) // tokens
        yield from np.split(np.arange(self.sequences), np.flatnonzero(np.diff(which)) + 1)

    def _prompt_id(self, index: int) -> str:
        first, last = self.arrays["prompt_id_offsets"][index : index + 2]
        try:
            return self.arrays["prompt_ids"][first:last].tobytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._altered(f"the prompt id of sequence {index} is not UTF-8") from error

    def _tokens(self, spans: Spans) -> np.ndarray:  # int32, a copy
        if self._codec == "compact":
            bits = id_bits(self._vocab_size)
            tokens = unpack_bits(self.arrays["tokens"], spans.index, bits)
        else:
            tokens = np.array(spans.take(self.arrays["tokens"]))
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise self._altered(f"a token id lies outside [0, {self._vocab_size})")
        return tokens

    def _loss_mask(self, spans: Spans) -> np.ndarray:  # bool, a copy
        if self._codec == "compact":
            return unpack_bits(self.arrays["loss_mask"], spans.index, 1).astype(bool)
        return np.array(spans.take(self.arrays["loss_mask"]))

    def _response_tokens(self, positions: np.ndarray) -> np.ndarray:  # [R] int32
        stops = self.arrays["token_offsets"][positions + 1]
        return self._tokens(Spans(stops - self.response_lengths[positions], stops))

    def _check_types(self) -> None:
        expected: dict[str, Any] = dict(ROLLOUT_ARRAYS)
        if self._codec is not None:
            expected |= SCORE_ARRAYS | LOSSY_ARRAYS[self._codec]
        if RAW in self.arrays:
            expected[RAW] = expected["rollout_logprobs"]
        if self.arrays.keys() != expected.keys():
            odd = sorted(self.arrays.keys() ^ expected.keys())[0]
            raise self._altered(f"array '{odd}' is missing or unknown")
        for name, values in self.arrays.items():
            right = values.dtype == expected[name] if expected[name] else values.dtype.kind == "u"
            if not right or values.ndim != 1:
                raise self._altered(f"array '{name}' is {values.dtype} {list(values.shape)}")
        if RAW in self.arrays:
            self._check_lengths({RAW: len(self.arrays["rollout_logprobs"])})

    def _check_scores(self, response: int) -> None:
        arrays = self.arrays
        entries = len(arrays["list_logprobs"])
        check_offsets(self.path, "list_offsets", arrays["list_offsets"], self.sequences, entries)
        names = ("teacher_logprobs", "teacher_entropy", "tail_logprobs", "list_lengths")
        expected = dict.fromkeys(names, response)
        if self._codec == "exact":
            expected["list_ids"] = entries
        elif self._codec == "packed":
            expected["list_ids"] = packed_bytes(entries, id_bits(self._vocab_size))
        else:
            expected["sampled_listed"] = packed_bytes(response, 1)
            offsets, size = arrays["list_id_offsets"], len(arrays["list_ids"])
            check_offsets(self.path, "list_id_offsets", offsets, self.sequences, size)
        self._check_lengths(expected)

    def _check_lengths(self, lengths: Mapping[str, int]) -> None:
        for name, expected in lengths.items():
            if len(self.arrays[name]) != expected:
                raise self._altered(
                    f"array '{name}' has {len(self.arrays[name])} entries, expected {expected}"
                )

    def _altered(self, what: str) -> ShardError:
        return ShardError(f"{self.path}: {what}: altered; run the stage again to redo it")


def _total(values: np.ndarray) -> float | None:
    """The sum, correctly rounded; None where an engine did not tell them (NaN)."""
    total = math.fsum(values.tolist())
    return None if math.isnan(total) else total


def _offsets(lengths: Any) -> np.ndarray:
    return offsets_of(np.fromiter(lengths, np.int64))
