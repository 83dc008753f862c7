"""How small and how fast is the teacher cache, and how much precision does it lose?

    python -m benchmarks.cache [--quick] [--out DIR]

A synthetic teacher (`distributions`) scores synthetic answers. For each codec and top_p one cache
is written with the writer of `lopd score`, and read with the reader of `lopd distill`. First the
contents of `exact` are compared with what was written; a difference ends the run. Bytes are those
of the shard files per response token, including offsets and prompts. The error is the codec's own:
the mean over tokens of the KL divergence between exact and decoded over K + 1 buckets, from the
receipts. Rates are for one thread. Reading is from a warm page cache, into flat arrays (`read`) or
into the padded records of a collator (`records`). Writing includes validation, cut, encoding, hash
and fsync. The best of `--repeats` counts. One JSON row per cache is printed and, with --out,
written to DIR/cache.jsonl. The exit code is 1 if a limit is missed; --quick has no limits on rates.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lopd
from benchmarks.recorder import identity
from lopd.provenance import build_manifest
from lopd.store import CacheWriter, Rollout, TeacherCache, TeacherScores

MIN_READ_RATE, MIN_WRITE_RATE = 1e6, 1e5
MAX_ERROR = 1e-3
# (codec, top_p): bytes per response token
MAX_BYTES = {("packed", 0.999): 64, ("compact", 0.999): 40, ("compact", 0.99): 24}
CACHES = [("exact", 0.999), *MAX_BYTES]


@dataclass(frozen=True)
class Shape:
    sequences: int
    response: int
    prompt: int = 128
    vocab: int = 151936
    k: int = 64


FULL = Shape(sequences=256, response=2048)
QUICK = Shape(sequences=8, response=64, prompt=8)


def distributions(
    rows: int, vocab: int, k: int, rng: np.random.Generator, *, ids: str = "zipf"
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Top-k of synthetic next-token distributions: ids, log-probs [N, K], tail, entropy [N].

    The r-th most probable token has probability proportional to (r + 2)^-a, the Zipf-Mandelbrot
    law, over the whole vocabulary; log a is normal over positions with mean 2.25 and standard
    deviation 0.6, cut to a in [1.3, 60]: a mean entropy near 0.45 nat, half of the positions
    below 0.29, one in a hundred above 2.4. Their ids have density
    1 / (id + 100) (`zipf`: tokenizers number frequent tokens first), or are `uniform`.
    """
    exponents, logprobs, tail, entropy = _table(vocab, k)
    drawn_exponents = np.exp(rng.normal(2.25, 0.6, rows)).clip(1.3, 60)
    which = np.searchsorted(exponents, drawn_exponents).clip(max=len(exponents) - 1)
    spread = rng.random((rows, 3 * k))
    if ids == "zipf":
        drawn = (100 * ((vocab + 100) / 100) ** spread - 100).astype(np.int64)
    else:
        drawn = (spread * vocab).astype(np.int64)
    return _distinct(drawn, k), logprobs[which], tail[which], entropy[which]


@functools.lru_cache
def _table(vocab: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """512 exponents a; for each, the top log-probs [512, k], the tail and the entropy."""
    exponents = np.exp(np.linspace(np.log(1.3), np.log(60), 512))
    log_rank = np.log(np.arange(1, vocab + 1) + 2.0)
    columns = zip(*(_row_of(-a * log_rank, k) for a in exponents), strict=True)
    logprobs, tail, entropy = (np.stack(column) for column in columns)
    return exponents, logprobs, tail, entropy


def _row_of(logits: np.ndarray, k: int) -> tuple[np.ndarray, float, float]:
    logprobs = logits - logits[0]
    logprobs -= np.log(np.exp(logprobs).sum())
    entropy = -(np.exp(logprobs) * logprobs).sum()
    rest = np.log(np.exp(logprobs[k:] - logprobs[k]).sum()) + logprobs[k]
    return logprobs[:k], float(rest), float(entropy)


def _distinct(drawn: np.ndarray, k: int) -> np.ndarray:  # [N, k] of [N, 3 k]
    """The first k distinct ids of each row, in drawing order."""
    order = np.argsort(drawn, axis=1, kind="stable")
    ranked = np.take_along_axis(drawn, order, axis=1)
    first = np.ones(drawn.shape, bool)
    np.put_along_axis(first, order[:, 1:], np.diff(ranked, axis=1) > 0, axis=1)
    assert first.sum(axis=1).min() >= k, "too few different ids"
    places = np.argsort(~first, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(drawn, places, axis=1).astype(np.int32)


def make_records(shape: Shape, *, ids: str) -> list[tuple[Rollout, TeacherScores]]:
    """Answers whose tokens are sampled from the distributions, and their scores."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(shape.sequences):
        listed, logprobs, tail, entropy = distributions(
            shape.response, shape.vocab, shape.k, rng, ids=ids
        )
        mass = np.cumsum(np.exp(logprobs), axis=1)
        rank = (rng.random((shape.response, 1)) > mass).sum(axis=1)
        inside = rank < shape.k
        rows = np.arange(shape.response)
        outside = np.array([_absent(row, shape.vocab, rng) for row in listed])
        column = np.minimum(rank, shape.k - 1)
        token = np.where(inside, listed[rows, column], outside)
        logprob = np.where(inside, logprobs[rows, column], tail - 5.0).astype(np.float32)
        prompt = rng.integers(0, shape.vocab, shape.prompt)
        tokens = np.concatenate([prompt, token]).astype(np.int32)
        student = np.minimum(logprob + rng.normal(0, 0.1, shape.response), 0).astype(np.float32)
        rollout = Rollout(
            prompt_id=f"prompt-{number}",
            sample=0,
            tokens=tokens,
            prompt_length=shape.prompt,
            finish_reason="length",
            loss_mask=np.arange(len(tokens)) >= shape.prompt,
            rollout_logprobs=student,
            rollout_logprobs_raw=student,
        )
        scores = TeacherScores(
            teacher_logprobs=logprob,
            teacher_entropy=entropy.astype(np.float32),
            topk_ids=listed,
            topk_logprobs=logprobs.astype(np.float32),
            tail_logprobs=tail.astype(np.float32),
        )
        records.append((rollout, scores))
    return records


def _absent(listed: np.ndarray, vocab: int, rng: np.random.Generator) -> int:
    while True:
        token = int(rng.integers(vocab))
        if token not in listed:
            return token


def manifest_of(shape: Shape, codec: str, top_p: float) -> dict[str, Any]:
    model = {"path": "", "weights": "0" * 64, "tokenizer": "0" * 64, "vocab_size": shape.vocab}
    return build_manifest(
        "cache",
        stage="benchmark",
        config={},
        model=model,
        inputs={"rollouts": {"digest": "0" * 64, "model": {"weights": "0" * 64}}},
        plan={"shards": [shape.sequences]},
        k=shape.k,
        top_p=top_p,
        codec=codec,
        temperature=1.0,
    )


def seconds(work: Any, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def measure(
    records: list[tuple[Rollout, TeacherScores]],
    shape: Shape,
    codec: str,
    top_p: float,
    ids: str,
    repeats: int,
) -> dict[str, Any]:
    tokens = shape.sequences * shape.response
    with tempfile.TemporaryDirectory() as folder:
        writers = (
            CacheWriter.create(Path(folder, str(number)), manifest_of(shape, codec, top_p))
            for number in range(repeats)
        )
        write = seconds(lambda: next(writers).write(0, records), repeats)
        path = Path(folder, "0")
        if codec == "exact":
            check_exact(records, TeacherCache.open(path, support="list"))
        read = seconds(
            lambda: [part.tail_logprobs.sum() for part in TeacherCache.open(path).chunks()], repeats
        )
        padded = seconds(lambda: [len(item.topk_ids) for item in TeacherCache.open(path)], repeats)
        cache = TeacherCache.open(path)
        summary, details = cache.summary(), cache.details()
    return {
        "codec": codec,
        "top_p": top_p,
        "k": shape.k,
        "vocab": shape.vocab,
        "ids": ids,
        "response_tokens": tokens,
        "prompt_tokens": shape.sequences * shape.prompt,
        "bytes_per_token": summary["bytes_per_response_token"],
        "bytes_per_token_by_array": details["bytes_per_token_by_array"],
        "mean_list_length": summary["mean_list_length"],
        "list_length_quantiles": details["list_length_quantiles"],
        "mean_entropy_nat": summary["mean_entropy"],
        "mean_covered_mass": summary["mean_covered_mass"],
        "error_nat": summary["codec_error"],
        "read_tokens_per_s": tokens / read,
        "records_tokens_per_s": tokens / padded,
        "write_tokens_per_s": tokens / write,
    }


def check_exact(records: list[tuple[Rollout, TeacherScores]], cache: TeacherCache) -> None:
    """The gate: `exact` returns a prefix of each written list, bit for bit."""
    for (_, scores), stored in zip(records, cache, strict=True):
        width = stored.topk_ids.shape[1]
        listed = stored.topk_ids >= 0
        same = (stored.topk_ids == scores.topk_ids[:, :width]) & (
            stored.topk_logprobs == scores.topk_logprobs[:, :width]
        )
        if not same[listed].all():
            raise SystemExit("benchmarks.cache: 'exact' returns other values than were written")


def missed(rows: list[dict[str, Any]], *, rates: bool) -> list[str]:
    """The limits that the rows miss; limits on sizes apply to ids as tokenizers number them."""
    failures = []
    for row in rows:
        name = f"{row['codec']} at top_p {row['top_p']}, {row['ids']} ids"
        limit = MAX_BYTES.get((row["codec"], row["top_p"]))
        if limit and row["ids"] == "zipf" and row["bytes_per_token"] > limit:
            failures.append(f"{name}: {row['bytes_per_token']:.1f} bytes, at most {limit}")
        if row["error_nat"] > MAX_ERROR:
            failures.append(f"{name}: error {row['error_nat']:.1e} nat, at most {MAX_ERROR}")
        for what, least in (("read", MIN_READ_RATE), ("write", MIN_WRITE_RATE)):
            if rates and row[f"{what}_tokens_per_s"] < least:
                rate = row[f"{what}_tokens_per_s"]
                failures.append(f"{name}: {what} {rate:.2g} tokens/s, at least {least:.0e}")
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="toy size, no limits on rates")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    shape, rows = QUICK if args.quick else FULL, []
    environment = {
        **identity(torch.device("cpu"), None),
        "numpy": np.__version__,
        "lopd": lopd.__version__,
        "command": "python -m benchmarks.cache" + " --quick" * args.quick,
    }
    for ids in ("zipf", "uniform"):
        records = make_records(shape, ids=ids)
        for codec, top_p in CACHES:
            rows.append({**environment, **measure(records, shape, codec, top_p, ids, args.repeats)})
            print(json.dumps(rows[-1]), flush=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out / "cache.jsonl").write_text(lines, encoding="utf-8")
    failures = [] if args.quick else missed(rows, rates=True)
    for failure in failures:
        print(f"missed: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
