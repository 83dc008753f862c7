"""What is minimised, and one micro-batch of it: batch in, loss and statistics out.

Nothing here knows of a Trainer: `lopd.training.trainer` and `lopd.training.loop` are two ways to
call `step`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lopd.errors import DataError
from lopd.models.head import HeadOptions, run_with_loss, run_with_loss_and_router
from lopd.models.packing import pack_kwargs
from lopd.training.batch import Batch
from lopd.training.metrics import by_position, drift_moments, sequence_sums, topk_overlap
from lopd.training.objective import Objective
from lopd_kernels import (
    linear_cross_entropy,
    linear_logprobs,
    linear_policy_gradient,
    linear_sparse_divergence,
)

GATHERED_ROWS = 1024  # rows of the head that one step of `_sampled_logprobs` holds


def step(
    model: Any, batch: Batch, objective: Objective, num_items: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and statistics of one micro-batch, on the model's device.

        loss = sum_n row_weights[n] * L[n] / num_items

    plus, for a mixture of experts in training, its router's loss on these tokens times
    `sum_n row_weights[n] / num_items`, this micro-batch's share of the step.

    Every statistic is such a sum too, so that micro-batches add up to the mean over the
    optimizer step whatever their sizes; those of `lopd.training.metrics.ESS` are logs of sums.

    Args:
        batch: what `lopd.training.batch.Collator` makes.
        num_items: sum of `row_weights` over all micro-batches of the optimizer step.

    Raises:
        DataError: num_items is not positive, or the batch lacks the teacher's columns or the
            rollout log-probs that a correction needs.
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
    if objective.needs_rollout_logprobs and "rollout_logprobs" not in batch:
        raise DataError(
            f"sequences {', '.join(batch['sequence_names'])}: their rollout log-probs are not all "
            "known, and a correction needs them; train with --importance none and no --clip_range"
        )
    weights = batch["row_weights"]

    def loss_fn(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, head: HeadOptions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rows = hidden.flatten(0, 1)[batch["loss_index"]]
        options = {
            "bias": bias,
            "temperature": objective.temperature,
            "validate": False,
            "workspace_bytes": objective.workspace_bytes,
            **head.kwargs(),
        }
        if objective.name == "cross_entropy":
            loss = linear_cross_entropy(
                rows, weight, batch["labels"], row_weights=weights, reduction="sum", **options
            )
            return loss, {}
        form = _policy_gradient if objective.name == "policy_gradient" else _sparse_divergence
        loss, by_row = form(rows, weight, batch, objective, options)
        if torch.is_grad_enabled():
            by_row["topk_overlap"] = _overlap(rows, weight, batch, options)
        return loss, by_row

    inputs = model_inputs(batch)
    router: Tensor | None = None
    if torch.is_grad_enabled():
        (loss, by_row), router = run_with_loss_and_router(model, inputs, loss_fn)
    else:  # a measurement: the router's loss belongs to training alone
        loss, by_row = run_with_loss(model, inputs, loss_fn)
    overlap = by_row.pop("topk_overlap", None)
    by_row = {name: row.detach() for name, row in by_row.items()}
    if (log_ratio := by_row.get("log_ratio_to_rollout")) is not None:
        by_row["abs_log_ratio_to_rollout"] = log_ratio.abs()
    divergence = by_row.pop("divergence", None)
    stats = {name: (weights * row).sum() / num_items for name, row in by_row.items()}
    index, count = batch["sequence_index"], len(batch["sequence_names"])
    if log_ratio is not None:
        stats |= drift_moments(log_ratio, weights, index, count)
    if divergence is not None:
        stats["divergence_from"] = by_position(divergence, weights, batch["parts"])
    if overlap is not None:
        stats["topk_overlap"] = overlap
    if router is not None:
        share = router * weights.sum() / num_items
        stats["router_loss"] = share.detach()
        return loss / num_items + share, stats
    return loss / num_items, stats


def model_inputs(batch: Batch) -> dict[str, Any]:
    """What the model is called with: ids, and a mask of padding or the bounds of a pack."""
    ids = batch["input_ids"]
    if "position_ids" not in batch:
        return {"input_ids": ids, "attention_mask": batch["attention_mask"]}
    bounds = pack_kwargs(batch["sequence_lengths"], ids.device)
    return {"input_ids": ids, "position_ids": batch["position_ids"], **bounds}


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
        row_weights=batch["row_weights"],
        reduction="sum",
        return_stats=True,
        **form,
        **options,
    )
    loss, stats = result
    reported = {
        "divergence": stats.loss,
        "teacher_tail": batch["tail_logprobs"].exp(),
        **_teacher_entropy(batch),
    }
    if objective.name == "reverse_kl":
        reported["reverse_kl"] = stats.loss
    if objective.tail == "renormalize":  # which never looks outside the list
        return loss, reported
    reported["student_tail"] = stats.student_tail_logprobs.exp()
    reported["student_entropy"] = stats.student_entropy
    if "rollout_logprobs" in batch:
        sampled = _sampled_logprobs(rows, weight, batch, stats.student_lse, options)
        reported["log_ratio_to_rollout"] = sampled - batch["rollout_logprobs"]
    return loss, reported


@torch.no_grad()
def _sampled_logprobs(
    rows: Tensor, weight: Tensor, batch: Batch, lse: Tensor, options: dict[str, Any]
) -> Tensor:
    """log p [N] of the sampled tokens by one row of the head each, once lse is known.

    A row without a list has no lse and is read by itself.
    """
    labels, logits = batch["labels"], torch.empty_like(lse)
    for start in range(0, len(labels), GATHERED_ROWS):
        part = slice(start, start + GATHERED_ROWS)
        product = rows[part].to(lse.dtype) * weight[labels[part]].to(lse.dtype)
        logits[part] = product.sum(-1)
    if (bias := options["bias"]) is not None:
        logits += bias[labels]
    logits *= options["logit_scale"]
    if (cap := options["softcap"]) is not None:
        logits = cap * torch.tanh(logits / cap)
    logprobs = logits / options["temperature"] - lse
    unlisted = batch["unlisted"]
    if len(unlisted):
        ids = labels[unlisted, None]
        alone: Any = linear_logprobs(rows[unlisted], weight, ids, **options)
        logprobs[unlisted] = alone[:, 0]
    return logprobs


def _policy_gradient(
    rows: Tensor, weight: Tensor, batch: Batch, objective: Objective, options: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    clip, by_sequence = objective.advantage_clip, objective.importance == "sequence"
    row_weights = batch["row_weights"]
    if by_sequence:
        logprobs, entropy = _logprobs_and_entropy(rows, weight, batch["labels"], options)
        ratio = sequence_ratios(logprobs, batch, objective.importance_cap)
        row_weights = row_weights * ratio
    correction: dict[str, Any] = {"clip_range": objective.clip_range}
    if not by_sequence:
        correction["importance"] = objective.importance
        correction["importance_cap"] = objective.importance_cap
    loss, stats = linear_policy_gradient(
        rows,
        weight,
        batch["labels"],
        batch["teacher_logprobs"],
        advantage_clip=clip,
        rollout_logprobs=batch.get("rollout_logprobs"),
        row_weights=row_weights,
        reduction="sum",
        return_stats=True,
        **correction,
        **options,
    )
    if not by_sequence:  # where a ratio of 0 would take its rows out of the statistics
        logprobs, entropy, ratio = stats.logprobs, stats.student_entropy, stats.importance
    advantages = batch["teacher_logprobs"] - logprobs
    reported = {
        "divergence": -advantages,  # of one sample: its mean is the reverse KL
        "advantage": advantages,
        "advantage_squared": advantages.square(),
        "student_entropy": entropy,
        "teacher_tail": batch["tail_logprobs"].exp(),
        **_teacher_entropy(batch),
    }
    if "rollout_logprobs" in batch:
        reported["log_ratio_to_rollout"] = logprobs - batch["rollout_logprobs"]
    if objective.needs_rollout_logprobs:
        reported["importance"] = ratio
    if clip is not None:
        reported["share_clipped"] = (advantages.abs() > clip).float()
    return loss, reported


def _overlap(rows: Tensor, weight: Tensor, batch: Batch, options: dict[str, Any]) -> Tensor:
    part = batch["probes"]
    return topk_overlap(
        rows.detach()[part], weight, batch["topk_ids"][part], batch["row_weights"][part], options
    )


@torch.no_grad()
def _logprobs_and_entropy(
    rows: Tensor, weight: Tensor, labels: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Of the sampled tokens, [N] each: a pass of its own, without gradient."""
    result: Any = linear_logprobs(rows, weight, labels[:, None], return_entropy=True, **options)
    logprobs, entropy = result
    return logprobs[:, 0], entropy


def sequence_ratios(logprobs: Tensor, batch: Batch, cap: float | None) -> Tensor:
    """p(sequence) / p_rollout(sequence) over its loss tokens, at most `cap`: [N], by row."""
    log_ratio = logprobs - batch["rollout_logprobs"]
    index = batch["sequence_index"]
    total = sequence_sums(log_ratio, index, len(batch["sequence_names"]))
    if cap is not None:
        total = total.clamp(max=math.log(cap))
    return total.exp()[index]


def _teacher_entropy(batch: Batch) -> dict[str, Tensor]:
    """Nothing where the engine that scored could not tell it."""
    return {key: batch[key] for key in ("teacher_entropy",) if key in batch}


def check_finite(what: str, value: Tensor | float, batches: Sequence[Batch], number: int) -> None:
    """Raise DataError, naming step and sequences, for a loss or norm that is not finite."""
    found = value.item() if isinstance(value, Tensor) else value
    if not math.isfinite(found):
        names = ", ".join(name for batch in batches for name in batch["sequence_names"])
        raise DataError(
            f"step {number}: the {what} is {found}; sequences: {names}; look at their teacher "
            "scores, or begin anew, with another --out, at a lower learning rate"
        )
