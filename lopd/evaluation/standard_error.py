"""The standard error of a mean over tokens that come in answers to prompts."""

from collections.abc import Sequence

import numpy as np

from lopd.store.types import prompt_name


def standard_error(
    totals: np.ndarray,  # [S] sum over the tokens of each sequence
    counts: np.ndarray,  # [S] tokens
    prompts: Sequence[str],  # S ids
) -> float | None:
    """Standard error of `totals.sum() / counts.sum()`, for prompts drawn at random.

    With T_i and N_i the sums of totals and of counts over the answers to prompt i of n,

        sqrt(n / (n - 1) sum_i (T_i - mean N_i)^2) / sum_i N_i

    Tokens of one answer depend on each other, and so do the answers to one prompt; taking them as
    independent would give too small a value.

    Returns:
        None for a single prompt, which says nothing of others.

    Source: the ratio estimator, Cochran, Sampling Techniques, 1977, section 6.4.

    >>> ones = np.ones(4)
    >>> standard_error(np.array([1.0, 1.0, 3.0, 3.0]), ones, ["a", "a", "b", "b"])
    1.0
    >>> round(standard_error(np.array([1.0, 1.0, 3.0, 3.0]), ones, ["a", "b", "c", "d"]), 3)
    0.577
    """
    groups = np.unique([prompt_name(prompt) for prompt in prompts], return_inverse=True)[1]
    sums, sizes = np.bincount(groups, totals), np.bincount(groups, counts)
    if (n := len(sums)) < 2:
        return None
    residuals = sums - sums.sum() / sizes.sum() * sizes
    return float(np.sqrt(n / (n - 1) * (residuals**2).sum()) / sizes.sum())
