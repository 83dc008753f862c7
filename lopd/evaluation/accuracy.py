"""Accuracy of a model on prompts with answers: greedy, avg@n, pass@k, by answer length."""

import math
from typing import Any

import numpy as np

from lopd.data.prompts import Prompt
from lopd.engines.base import Engine, Generation, Sampling, sequence_seed
from lopd.engines.progress import Progress
from lopd.errors import ConfigError
from lopd.evaluation.grading import Grader

Z95 = 1.959964  # the normal distribution's 97.5 % quantile
LENGTH_BUCKETS = 4


def generate_answers(
    engine: Engine, prompts: list[Prompt], sampling: Sampling, num_samples: int, seed: int
) -> list[Generation]:
    """Generate `num_samples` answers to each prompt, ordered by prompt."""
    with Progress(total=len(prompts) * num_samples, unit="seq", desc="answering") as bar:
        return engine.generate(
            [prompt.tokens for prompt in prompts for _ in range(num_samples)],
            sampling,
            [sequence_seed(seed, prompt.id, i) for prompt in prompts for i in range(num_samples)],
            progress=bar.update,
        )


def measure_accuracy(
    engine: Engine,
    prompts: list[Prompt],
    grader: Grader,
    sampling: Sampling,
    *,
    num_samples: int,
    seed: int,
) -> tuple[dict[str, Any], list[dict[str, Any]], list[Generation]]:
    """Answer each prompt once greedily and `num_samples` times by sampling, and grade the answers.

    An answer that was cut off at `max_new_tokens` counts as wrong.

    Args:
        sampling: of the sampled answers; the greedy ones share its `max_new_tokens`.

    Returns:
        The accuracies; one record for each answer, the greedy ones first; the sampled answers,
        ordered by prompt.
    """
    greedy_sampling = Sampling(sampling.max_new_tokens, temperature=0.0)
    greedy = generate_answers(engine, prompts, greedy_sampling, 1, 0)
    sampled = generate_answers(engine, prompts, sampling, num_samples, seed)

    def record(prompt: Prompt, sample: int | None, generation: Generation) -> dict[str, Any]:
        text = engine.tokenizer.decode(generation.tokens.tolist(), skip_special_tokens=True)
        answer, correct = grader(text, str(prompt.answer))
        return {
            "id": prompt.id,
            "sample": sample,
            "text": text,
            "tokens": len(generation.tokens),
            "finish_reason": generation.finish_reason,
            "answer": answer,
            "correct": generation.finish_reason == "stop" and correct,
        }

    jobs = [(prompt, i) for prompt in prompts for i in range(num_samples)]
    greedy_records = [record(p, None, answer) for p, answer in zip(prompts, greedy, strict=True)]
    sampled_records = [record(*job, answer) for job, answer in zip(jobs, sampled, strict=True)]
    results = summarize(greedy_records, sampled_records)
    return results, greedy_records + sampled_records, sampled


def summarize(greedy: list[dict[str, Any]], sampled: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies from the records of one greedy and n sampled answers to each prompt."""
    prompts, n = len(greedy), len(sampled) // len(greedy)
    correct = np.array([item["correct"] for item in sampled]).reshape(prompts, n)
    lengths = np.array([item["tokens"] for item in sampled])
    truncated = np.array([item["finish_reason"] == "length" for item in sampled])
    results = {
        "prompts": prompts,
        "samples": n,
        "greedy": mean_with_interval(np.array([item["correct"] for item in greedy], dtype=float)),
        f"avg@{n}": mean_with_interval(correct.mean(1)),
        "truncated": float(truncated.mean()),
        "no_answer": float(np.mean([item["answer"] is None for item in sampled])),
        "mean_tokens": float(lengths.mean()),
        "by_length": accuracy_by_length(lengths, correct.ravel(), truncated),
    }
    for k in sorted({1 << i for i in range(n.bit_length())} | {n}):
        results[f"pass@{k}"] = mean_with_interval(pass_at_k(correct.sum(1), n, k))
    return results


def accuracy_by_length(
    lengths: np.ndarray,  # [N] tokens
    correct: np.ndarray,  # [N] bool
    truncated: np.ndarray,  # [N] bool
) -> list[dict[str, float]]:
    """Accuracy by answer length, in buckets between quantiles of the lengths.

    Answers of equal length share a bucket, so ties give fewer buckets of unequal size.
    """
    shares = np.arange(1, LENGTH_BUCKETS) / LENGTH_BUCKETS
    bucket = np.searchsorted(np.quantile(lengths, shares), lengths)
    return [
        {
            "shortest": int(lengths[rows].min()),
            "longest": int(lengths[rows].max()),
            "count": int(rows.sum()),
            "accuracy": float(correct[rows].mean()),
            "truncated": float(truncated[rows].mean()),
        }
        for rows in (bucket == number for number in np.unique(bucket))
    ]


def pass_at_k(num_correct: np.ndarray, n: int, k: int) -> np.ndarray:  # [P], [P]
    """Unbiased pass@k of each prompt: 1 - C(n - c, k) / C(n, k), c of n answers correct.

    Raises:
        ConfigError: k is not between 1 and n.

    Source: Chen et al., arXiv 2107.03374.
    """
    if not 1 <= k <= n:
        raise ConfigError(f"pass@k: found k={k}; expected 1 to the {n} samples")
    return np.array([1.0 - math.comb(n - int(c), k) / math.comb(n, k) for c in num_correct])


def mean_with_interval(per_prompt: np.ndarray) -> dict[str, float]:  # [P] in [0, 1]
    """Mean over prompts with its 95 % Wilson interval.

    The interval is that of as many 0/1 trials as give the same standard error, and of at least
    one trial for each prompt, so it has a width even if all prompts agree.

    Returns:
        `mean`, `low` and `high`.
    """
    count, mean = len(per_prompt), float(per_prompt.mean())
    variance = float(per_prompt.var(ddof=1)) / count if count > 1 else 0.0
    trials = max(count, mean * (1 - mean) / variance) if variance > 0 else count
    centre = (mean + Z95**2 / (2 * trials)) / (1 + Z95**2 / trials)
    spread = mean * (1 - mean) / trials + Z95**2 / (4 * trials**2)
    half = Z95 * math.sqrt(spread) / (1 + Z95**2 / trials)
    return {"mean": mean, "low": max(0.0, centre - half), "high": min(1.0, centre + half)}
