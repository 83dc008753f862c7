"""One open shard: its arrays checked, and its sequences read from the mapped file."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lopd.errors import DataError
from lopd.store.arrays import (
    GIVEN_ARRAYS,
    LOSSY_ARRAYS,
    RAW,
    ROLLOUT_ARRAYS,
    SCORE_ARRAYS,
    index_digest,
)
from lopd.store.bits import id_bits, packed_bytes, unpack_bits
from lopd.store.codec import Codec, decode
from lopd.store.mapped import MappedFile
from lopd.store.ragged import Spans, offsets_of
from lopd.store.receipts import CacheReceipt, Receipt, altered
from lopd.store.shards import check_offsets
from lopd.store.types import FINISH_REASONS, Rollout, TeacherColumns


class ShardView:
    """The sequences of a shard by position, one or many at a time.

    Raises:
        ShardError: arrays are absent, have another type, or do not fit together.
    """

    def __init__(
        self,
        file: MappedFile,
        receipt: Receipt,
        codec: Codec | None,
        vocab_size: int,
    ) -> None:
        self.path = path = file.path
        self.file = file
        self.shard, self.sequences = receipt.shard, receipt.sequences
        self._codec, self._vocab_size = codec, vocab_size
        self._check_types()
        arrays = self.arrays
        n, response = self.sequences, len(arrays["rollout_logprobs"])
        compact = codec == "compact"
        tokens = int(arrays["token_offsets"][-1:].sum()) if compact else len(arrays["tokens"])
        check_offsets(path, "token_offsets", arrays["token_offsets"], n, tokens)
        check_offsets(path, "response_offsets", arrays["response_offsets"], n, response)
        size = len(arrays["prompt_ids"])
        check_offsets(path, "prompt_id_offsets", arrays["prompt_id_offsets"], n, size)
        self._check_lengths(
            {
                "tokens": packed_bytes(tokens, id_bits(vocab_size)) if compact else tokens,
                "loss_mask": packed_bytes(tokens, 1) if compact else tokens,
                "sample": n,
                "finish_reason": n,
                **self._present({RAW: response, "weight": n, "reward": n}),
                **self._present({"token_weights": response}),
            }
        )
        if tokens != receipt.tokens or response != receipt.response_tokens:
            raise altered(self.path, "token counts differ from the receipt")
        self.response_lengths = np.diff(arrays["response_offsets"])
        self._prompt_lengths = np.diff(arrays["token_offsets"]) - self.response_lengths
        bad = (self._prompt_lengths < 1) | (self.response_lengths < 1)
        bad |= arrays["finish_reason"] >= len(FINISH_REASONS)
        if bad.any():
            first = np.flatnonzero(bad)[0]
            raise altered(self.path, f"sequence {first} has an invalid length or finish reason")
        if codec is not None:
            self._check_scores(response)
        self._check_counts(receipt)
        if receipt.index_sha256 not in (None, index_digest(arrays)):
            raise altered(self.path, "offsets or names differ from the receipt")

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Read-only views of the mapped file."""
        return self.file.arrays()

    def rollouts(self, positions: np.ndarray) -> list[Rollout]:  # [n] int64
        """The sequences at these positions, copied; ids are checked against the vocabulary."""
        arrays = self.arrays
        spans = Spans.of(arrays["token_offsets"], positions)
        responses = Spans.of(arrays["response_offsets"], positions)
        tokens, mask = self._tokens(spans), self._loss_mask(spans)
        sampled = np.array(responses.take(arrays["rollout_logprobs"]), np.float32)
        raw = sampled
        if RAW in arrays:
            raw = np.array(responses.take(arrays[RAW]), np.float32)
        weight, reward = self.given("weight", 1.0), self.given("reward", math.nan)
        token_weights = None
        if "token_weights" in arrays:
            token_weights = np.array(responses.take(arrays["token_weights"]))
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
                    weight=float(weight[index]),
                    reward=None if np.isnan(reward[index]) else float(reward[index]),
                    token_weights=None if token_weights is None else token_weights[response],
                )
            )
        return rollouts

    def columns(
        self,
        positions: np.ndarray,  # [n] int64
        *,
        with_sampled: bool = False,
    ) -> TeacherColumns:
        """The scores of these sequences, end to end; list entries are checked.

        Views of the file where nothing is decoded. `with_sampled` as in `codec.decode`.
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
            raise altered(self.path, str(error)) from error

    def list_lengths(self) -> np.ndarray:  # [R] int64
        """Entries of each list as it was written."""
        lengths = self.arrays["list_lengths"].astype(np.int64)
        if self._codec == "compact":
            rows = np.arange(len(lengths))
            lengths += unpack_bits(self.arrays["sampled_listed"], rows, 1)
        return lengths

    def chunks(self, tokens: int) -> Iterator[np.ndarray]:
        """The positions in runs of about `tokens` response tokens, at least one sequence each."""
        which = (np.cumsum(self.response_lengths) - 1) // tokens
        yield from np.split(np.arange(self.sequences), np.flatnonzero(np.diff(which)) + 1)

    def given(self, name: str, absent: float) -> np.ndarray:  # [n] fp32
        """An array of `GIVEN_ARRAYS` with one value for each sequence; `absent` where it is not."""
        values = self.arrays.get(name)
        return np.full(self.sequences, absent, np.float32) if values is None else np.array(values)

    def _present(self, names: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the names that the shard has an array of."""
        return {name: value for name, value in names.items() if name in self.arrays}

    def _prompt_id(self, index: int) -> str:
        first, last = self.arrays["prompt_id_offsets"][index : index + 2]
        try:
            return self.arrays["prompt_ids"][first:last].tobytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise altered(self.path, f"the prompt id of sequence {index} is not UTF-8") from error

    def _tokens(self, spans: Spans) -> np.ndarray:  # int32, a copy
        if self._codec == "compact":
            bits = id_bits(self._vocab_size)
            tokens = unpack_bits(self.arrays["tokens"], spans.index, bits)
        else:
            tokens = np.array(spans.take(self.arrays["tokens"]))
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            raise altered(self.path, f"a token id lies outside [0, {self._vocab_size})")
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
        expected |= self._present({RAW: expected["rollout_logprobs"], **GIVEN_ARRAYS})
        if self.arrays.keys() != expected.keys():
            name = sorted(self.arrays.keys() ^ expected.keys())[0]
            raise altered(self.path, f"array '{name}' is missing or unknown")
        for name, values in self.arrays.items():
            dtype = expected[name]
            is_valid = values.dtype == dtype if dtype else values.dtype.kind == "u"
            if not is_valid or values.ndim != 1:
                raise altered(self.path, f"array '{name}' is {values.dtype} {list(values.shape)}")

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

    def _check_counts(self, receipt: Receipt) -> None:
        """Compare what can be counted without decoding."""
        counts = np.bincount(self.arrays["finish_reason"], minlength=len(FINISH_REASONS)).tolist()
        if dict(zip(FINISH_REASONS, counts, strict=True)) != receipt.finish_reasons:
            raise altered(self.path, "finish reasons differ from the receipt")
        if isinstance(receipt, CacheReceipt):
            entries = len(self.arrays["list_logprobs"])
            if self._codec == "compact":
                listed = self.arrays["sampled_listed"]
                entries += int(
                    np.unpackbits(listed, count=receipt.response_tokens, bitorder="little").sum()
                )
            if entries != receipt.list_entries:
                raise altered(self.path, "counts of list entries differ from the receipt")

    def _check_lengths(self, lengths: Mapping[str, int]) -> None:
        for name, expected in lengths.items():
            if len(self.arrays[name]) != expected:
                raise altered(
                    self.path,
                    f"array '{name}' has {len(self.arrays[name])} entries, expected {expected}",
                )
