"""How biased and how noisy is the gradient of each form of the reverse KL? By enumeration.

    python -m benchmarks.gradients --out benchmarks/results

A student and a teacher over a small vocabulary are made from seeds. The rollout policy is the
student, or a student that has drifted from it. For each form, the gradient with respect to the
logits is computed for every token that could have been sampled, so expectation and variance are
exact. Bias is |E g - G| / |G| and noise sqrt(E |g - E g|^2) / |G|, with G the gradient of the KL
over the whole vocabulary.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.recorder import identity
from lopd_kernels import sparse_divergence

NAME = "gradients.jsonl"
VOCAB = 300
LISTS = (8, 16, 64)
SEEDS = range(20)
SPREAD, DISTANCE = 2.5, 1.0  # of the student's logits, and of the teacher's from them
DRIFTS = (0.0, 0.5)  # of the rollout policy's logits from the student's


@dataclass(frozen=True)
class Problem:
    """Distributions over the vocabulary [V] in fp64; the list is the teacher's top k."""

    logits: Tensor
    teacher: Tensor  # log-probs
    rollout: Tensor  # log-probs
    ids: Tensor  # [K]

    @classmethod
    def make(cls, seed: int, k: int, drift: float) -> "Problem":
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(3, VOCAB, generator=generator, dtype=torch.float64)
        logits = SPREAD * noise[0]
        teacher = (logits + DISTANCE * noise[1]).log_softmax(0)
        rollout = (logits + drift * noise[2]).log_softmax(0)
        return cls(logits, teacher, rollout, teacher.topk(k).indices)

    @property
    def student(self) -> Tensor:
        return self.logits.log_softmax(0)

    @property
    def listed(self) -> Tensor:
        return torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, self.ids, True)

    @property
    def full(self) -> Tensor:
        """The gradient [V] of the KL over the whole vocabulary."""
        p, ratio = self.student.exp(), self.student - self.teacher
        return p * (ratio - (p * ratio).sum())

    def every_sample(self, with_sampled: bool = False, **options: Any) -> Tensor:
        """Gradients [V, V] of `sparse_divergence`, row A if A was sampled."""
        ids, tokens = self.ids.expand(VOCAB, -1), torch.arange(VOCAB)
        if with_sampled:
            ids = torch.cat([ids, torch.where(self.listed, -1, tokens)[:, None]], 1)
        logprobs = self.teacher[ids.clamp(min=0)]
        outside = torch.ones(VOCAB, VOCAB, dtype=torch.bool).scatter(1, ids.clamp(min=0), False)
        outside[self.listed] = ~self.listed  # a pad has listed id 0
        tail = self.teacher.expand(VOCAB, -1).masked_fill(~outside, -math.inf).logsumexp(1)
        logits = self.logits.repeat(VOCAB, 1).requires_grad_()
        loss = sparse_divergence(
            logits, ids, logprobs, tail_logprobs=tail, reduction="sum", **options
        )
        return torch.autograd.grad(loss, logits)[0]

    def sample(self) -> dict[str, Any]:
        return {
            "tail": "unbiased",
            "sampled_ids": torch.arange(VOCAB),
            "sampled_logprobs": self.teacher,
            "rollout_logprobs": self.rollout,
        }


def sampled_token(problem: Problem) -> Tensor:
    """w r_A grad log p_A: the policy gradient, weighted by the ratio to the rollout policy."""
    p = problem.student
    slopes = torch.eye(VOCAB, dtype=torch.float64) - p.exp()
    return ((p - problem.rollout).exp() * (p - problem.teacher))[:, None] * slopes


def published(problem: Problem) -> Tensor:
    """The bucket plus w (r_A grad log p_A - r_tail grad log p_tail)."""
    p, listed = problem.student, problem.listed
    tails = [x.masked_fill(listed, -math.inf).logsumexp(0) for x in (p, problem.teacher)]
    slopes = torch.eye(VOCAB, dtype=torch.float64) - p.exp()
    tail_slope = (p - tails[0]).exp().masked_fill(listed, 0.0) - p.exp()
    weight = (p - problem.rollout).exp().masked_fill(listed, 0.0)[:, None]
    correction = (p - problem.teacher)[:, None] * slopes - (tails[0] - tails[1]) * tail_slope
    return problem.every_sample() + weight * correction


FORMS: dict[str, Callable[[Problem], Tensor]] = {
    "bucket, the list alone": lambda problem: problem.every_sample(),
    "bucket, list and sampled token": lambda problem: problem.every_sample(with_sampled=True),
    "generalized": lambda problem: problem.every_sample(tail="generalized"),
    "truncate": lambda problem: problem.every_sample(tail="truncate"),
    "sampled token": sampled_token,
    "published correction": published,
    "unbiased": lambda problem: problem.every_sample(**problem.sample()),
    "unbiased, weights at most 1": lambda problem: problem.every_sample(
        **problem.sample(), importance_cap=1.0
    ),
}


def measure(form: str, k: int, drift: float) -> dict[str, float]:
    """Means over the seeds of bias, noise and the student's mass outside the list."""
    sums = {"bias": 0.0, "noise": 0.0, "outside": 0.0}
    for seed in SEEDS:
        problem = Problem.make(seed, k, drift)
        gradients, shares, size = FORMS[form](problem), problem.rollout.exp(), problem.full.norm()
        mean = shares @ gradients
        variance = shares @ (gradients - mean).square().sum(1)
        sums["bias"] += float((mean - problem.full).norm() / size)
        sums["noise"] += float(variance.sqrt() / size)
        sums["outside"] += float(problem.student.exp()[~problem.listed].sum())
    return {name: total / len(SEEDS) for name, total in sums.items()}


def rows() -> Iterator[dict[str, Any]]:
    environment = identity(torch.device("cpu"), None)
    for drift in DRIFTS:
        for k in LISTS:
            for form in FORMS:
                setting = {"form": form, "k": k, "drift": drift, "vocab": VOCAB}
                command = "python -m benchmarks.gradients"
                yield {**setting, **measure(form, k, drift), "command": command, **environment}


def table(measured: list[dict[str, Any]]) -> str:
    """Markdown: bias and noise of each form, by length of the list, for each drift."""
    by_key = {(row["form"], row["k"], row["drift"]): row for row in measured}
    lists = sorted({row["k"] for row in measured})
    blocks = []
    for drift in sorted({row["drift"] for row in measured}):
        outside = ", ".join(
            f"{by_key[next(iter(FORMS)), k, drift]['outside']:.0%} at k = {k}" for k in lists
        )
        policy = f"drifted by {drift:g} per logit" if drift else "the student itself"
        lines = [
            f"Rollout policy: {policy}. The student's mass outside the list is {outside}.",
            "",
            f"| form | {' | '.join(f'bias, k = {k} | noise' for k in lists)} |",
            f"| --- |{' ---: |' * (2 * len(lists))}",
        ]
        for form in FORMS:
            cells = [
                f"{by_key[form, k, drift][name]:.2f}" for k in lists for name in ("bias", "noise")
            ]
            lines.append(f"| {form} | {' | '.join(cells)} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    results = list(rows())
    text = "".join(json.dumps(row) + "\n" for row in results)
    (args.out / NAME).write_text(text, encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
