"""Accuracy: pass@k, confidence intervals, accuracy by answer length, and the table of results."""

import math
from typing import Any

import numpy as np

from lopd.errors import ConfigError

Z95 = 1.959964


LENGTH_BUCKETS = 4


def by_length(
    lengths: np.ndarray,  # [N] tokens
    correct: np.ndarray,  # [N] bool
    truncated: np.ndarray,  # [N] bool
) -> list[dict[str, float]]:
    """Accuracy by answer length, in buckets between quantiles of the lengths.

    Answers of one length share a bucket, so that ties make fewer buckets of uneven size.
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


def pass_at_k(correct: np.ndarray, n: int, k: int) -> np.ndarray:
    """Chance that k answers drawn from n, c of them right, hold a right one; per prompt."""
    if not 1 <= k <= n:
        raise ConfigError(f"pass@k: found k={k}; expected 1 to the {n} samples")
    return np.array([1.0 - math.comb(n - int(c), k) / math.comb(n, k) for c in correct])


def estimate(per_prompt: np.ndarray) -> dict[str, float]:
    """Mean over prompts and its 95 % Wilson interval.

    The spread of the prompts fixes the number of 0/1 trials with the same standard error,
    at least one a prompt; so the interval keeps a width when all prompts agree.
    """
    count, mean = len(per_prompt), float(per_prompt.mean())
    variance = float(per_prompt.var(ddof=1)) / count if count > 1 else 0.0
    trials = max(count, mean * (1 - mean) / variance) if variance > 0 else count
    centre = (mean + Z95**2 / (2 * trials)) / (1 + Z95**2 / trials)
    spread = mean * (1 - mean) / trials + Z95**2 / (4 * trials**2)
    half = Z95 * math.sqrt(spread) / (1 + Z95**2 / trials)
    return {"mean": mean, "low": max(0.0, centre - half), "high": min(1.0, centre + half)}


def table(results: dict[str, Any]) -> list[str]:
    lines = [f"{results['prompts']} prompts, {results['samples']} sampled answers each"]
    for name, value in results.items():
        if isinstance(value, dict) and "low" in value:
            lines.append(
                f"{name:>8}  {value['mean']:.3f}  [{value['low']:.3f}, {value['high']:.3f}]"
            )
    lines.append(f"truncated {results['truncated']:.3f}, mean tokens {results['mean_tokens']:.1f}")
    for row in results["by_length"]:
        lines.append(
            f"{row['shortest']:>6} to {row['longest']} tokens: {row['count']} answers, "
            f"{row['accuracy']:.3f} right, {row['truncated']:.3f} truncated"
        )
    if "kl" in results:
        kl = results["kl"]
        lines.append(f"KL to the teacher {kl['nats_per_token']:.4f} nat/token (k={kl['k']})")
    if "cache_kl" in results:
        kl = results["cache_kl"]
        seen = "" if kl["held_out"] else ", which it was trained on"
        lines.append(
            f"KL to the cached teacher {kl['nats_per_token']:.4f} nat/token "
            f"({kl['sequences']} sequences{seen})"
        )
    return lines
