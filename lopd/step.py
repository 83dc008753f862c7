"""What is minimised, and one micro-batch of it: batch in, loss and statistics out.

Nothing here knows of a Trainer: `lopd.trainer` and `lopd.loop` are two ways to call `step`.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lopd.data import Batch
from lopd.errors import ConfigError, DataError
from lopd.heads import HeadOptions, run_with_loss
from lopd_kernels import linear_cross_entropy, linear_policy_gradient, linear_sparse_divergence

SPARSE = ("reverse_kl", "forward_kl", "jsd")
OBJECTIVES = (*SPARSE, "policy_gradient", "cross_entropy")
TAILS = ("bucket", "renormalize", "truncate")


@dataclass(frozen=True)
class Objective:
    """What is minimised at a response token, p the student and q the teacher.

    `reverse_kl` KL(p || q), `forward_kl` KL(q || p), `jsd` between them at `beta`, each over
    the teacher's list and, by `tail`, the mass outside it; `policy_gradient` -A log p of the
    sampled token with A = log q - log p of the current student, a constant, clipped to
    [-advantage_clip, advantage_clip]; `cross_entropy` -log p of the token.

    `temperature` divides the student's logits: the one that the teacher was scored at.
    """

    name: str
    tail: str = "bucket"
    beta: float | None = None  # 0.5 for jsd, which alone has one
    advantage_clip: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            known = ", ".join(OBJECTIVES)
            raise ConfigError(f"objective: found '{self.name}'; expected one of {known}")
        if self.tail not in TAILS:
            raise ConfigError(f"tail: found '{self.tail}'; expected one of {', '.join(TAILS)}")
        if self.name == "jsd" and self.beta is None:
            object.__setattr__(self, "beta", 0.5)
        if self.beta is not None and self.name != "jsd":
            raise ConfigError(f"beta: {self.name} has no mixture; only jsd does")
        if self.beta is not None and not 0 < self.beta < 1:
            raise ConfigError(
                f"beta: found {self.beta}; expected strictly between 0 and 1; at the ends use "
                "forward_kl or reverse_kl"
            )
        if self.tail != "bucket" and self.name not in SPARSE:
            raise ConfigError(f"tail: {self.name} has none; only {', '.join(SPARSE)} do")
        if self.advantage_clip is not None and self.name != "policy_gradient":
            raise ConfigError(f"advantage_clip: {self.name} has no advantage; use policy_gradient")
        if self.advantage_clip is not None and not 0 < self.advantage_clip < math.inf:
            raise ConfigError(
                f"advantage_clip: found {self.advantage_clip}; expected a positive number"
            )
        if not 0 < self.temperature < math.inf:
            raise ConfigError(f"temperature: found {self.temperature}; expected a positive number")

    @property
    def needs_teacher(self) -> bool:
        return self.name != "cross_entropy"


def step(
    model: Any, batch: Batch, objective: Objective, num_items: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and statistics of one micro-batch, on the model's device.

        loss = sum_n row_weights[n] * L[n] / num_items

    Every statistic is such a sum too, so that micro-batches add up to the mean over the
    optimizer step whatever their sizes.

    Args:
        batch: what `lopd.data.Collator` makes.
        num_items: sum of `row_weights` over all micro-batches of the optimizer step.

    Raises:
        DataError: num_items is not positive, or the batch lacks the teacher's columns.
    """
    if not num_items > 0:
        raise DataError(
            f"num_items: found {num_items}; the optimizer step bears no loss (sequences "
            f"{', '.join(batch['sequence_names'])})"
        )
    if objective.needs_teacher and "teacher_logprobs" not in batch:
        raise DataError(
            f"objective {objective.name}: the batch has no teacher scores; train on a TeacherCache"
        )
    weights = batch["row_weights"]

    def loss_fn(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, head: HeadOptions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rows = hidden.flatten(0, 1)[batch["loss_index"]]
        options = {
            "row_weights": weights,
            "reduction": "sum",
            "bias": bias,
            "temperature": objective.temperature,
            "validate": False,
            **head.kwargs(),
        }
        if objective.name == "cross_entropy":
            return linear_cross_entropy(rows, weight, batch["labels"], **options), {}
        if objective.name == "policy_gradient":
            return _policy_gradient(rows, weight, batch, objective, options)
        return _sparse_divergence(rows, weight, batch, objective, options)

    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    loss, by_row = run_with_loss(model, inputs, loss_fn)
    stats = {name: (weights * row).sum().detach() / num_items for name, row in by_row.items()}
    return loss / num_items, stats


def _sparse_divergence(
    rows: Tensor, weight: Tensor, batch: Batch, objective: Objective, options: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    form: dict[str, Any] = {"divergence": objective.name, "tail": objective.tail}
    if objective.beta is not None:
        form["beta"] = objective.beta
    result: Any = linear_sparse_divergence(
        rows,
        weight,
        batch["topk_ids"],
        batch["topk_logprobs"],
        tail_logprobs=batch["tail_logprobs"],
        return_stats=True,
        **form,
        **options,
    )
    loss, stats = result
    reported = {
        "teacher_tail": batch["tail_logprobs"].exp(),
        **_teacher_entropy(batch),
    }
    if objective.tail != "renormalize":  # which never looks outside the list
        reported["student_tail"] = stats.student_tail_logprobs.exp()
        reported["student_entropy"] = stats.student_entropy
    return loss, reported


def _policy_gradient(
    rows: Tensor, weight: Tensor, batch: Batch, objective: Objective, options: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    clip = objective.advantage_clip
    loss, stats = linear_policy_gradient(
        rows,
        weight,
        batch["labels"],
        batch["teacher_logprobs"],
        advantage_clip=clip,
        return_stats=True,
        **options,
    )
    advantages = batch["teacher_logprobs"] - stats.logprobs
    reported = {
        "advantage": advantages,
        "advantage_squared": advantages.square(),
        "student_entropy": stats.student_entropy,
        **_teacher_entropy(batch),
    }
    if "rollout_logprobs" in batch:
        reported["log_ratio_to_rollout"] = stats.logprobs - batch["rollout_logprobs"]
    if clip is not None:
        reported["share_clipped"] = (advantages.abs() > clip).float()
    return loss, reported


def _teacher_entropy(batch: Batch) -> dict[str, Tensor]:
    """Nothing where the engine that scored could not tell it."""
    return {key: batch[key] for key in ("teacher_entropy",) if key in batch}


def check_finite(loss: Tensor, batch: Batch, step_number: int) -> None:
    """Raise DataError, naming the step and the sequences, for a loss that is not finite."""
    if not torch.isfinite(loss):
        raise DataError(
            f"step {step_number}: the loss is {loss.item()}; sequences in the batch: "
            f"{', '.join(batch['sequence_names'])}; look at their teacher scores, or lower the "
            "learning rate and resume from the last checkpoint"
        )


class StatsWindow:
    """Statistics since the last log: means over optimizer steps, and loss tokens per second."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps, self._tokens, self._began = 0, 0, 0.0

    def begin_step(self) -> None:
        if self._steps == 0:
            self._began = time.perf_counter()
        self._steps += 1

    def add(self, stats: dict[str, Tensor], tokens: int) -> None:
        """One micro-batch of the step that was begun last."""
        self._tokens += tokens
        for name, value in stats.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def pop(self) -> dict[str, float]:
        """What was added since the last call."""
        means = {name: value.item() / self._steps for name, value in self._sums.items()}
        means["tokens_per_second"] = self._tokens / (time.perf_counter() - self._began)
        self._reset()
        return means
