"""Combinations of settings in which every pair of values occurs."""

import itertools
import random


def pairwise(seed: int = 0, allowed=lambda row: True, **choices) -> list[dict]:
    """Rows of one value per name, such that any two values of two names occur in some row.

    Greedy: of several random rows, take the one that covers the most missing pairs. Pairs that
    occur in no `allowed` row are left out.
    """
    rng = random.Random(seed)
    names = list(choices)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(range(len(choices[a])), range(len(choices[b])))
    }
    rows = []
    while missing:
        (a, x), (b, y) = min(missing)
        candidates = []
        for attempt in range(400):
            if attempt >= 40 and candidates:
                break
            picked = {name: rng.randrange(len(choices[name])) for name in names}
            picked[a], picked[b] = x, y
            if allowed({name: choices[name][index] for name, index in picked.items()}):
                pairs = set(itertools.combinations(picked.items(), 2))
                candidates.append((len(pairs & missing), picked, pairs))
        if not candidates:
            missing.remove(((a, x), (b, y)))
            continue
        _, best, pairs = max(candidates, key=lambda candidate: candidate[0])
        missing -= pairs
        rows.append({name: choices[name][index] for name, index in best.items()})
    return rows


def label(row: dict) -> str:
    return "-".join(str(value) for value in row.values())
