"""One micro-batch of training: from a batch to its loss and statistics.

`lopd.training.trainer` and `lopd.training.loop` are two ways to call `step`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lopd.config.objective import Objective
from lopd.errors import ConfigError, DataError
from lopd.models.head import HeadOptions, run_with_loss, run_with_loss_and_router
from lopd.models.packing import pack_kwargs
from lopd.training.batch import Batch
from lopd.training.metrics import by_position, by_teacher, drift_moments
from lopd.training.row_losses import loss_of_rows
from lopd.training.token_weights import RULES, weigh_tokens
from lopd.training.topk_overlap import topk_overlap
from lopd_kernels.workspace import WorkspaceError


def step(
    model: Any, batch: Batch, objective: Objective, num_items: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and statistics of one micro-batch, on the model's device.

        loss = sum_n row_weights[n] * L[n] / num_items

    For a mixture of experts in training, the router's loss on these tokens is added, times
    `sum_n row_weights[n] / num_items`, the micro-batch's share of the optimizer step.

    Args:
        model: as in `lopd.models.head.run_with_loss`.
        batch: from `lopd.training.batch.Collator`, on the model's device.
        objective: what to minimise.
        num_items: sum of `row_weights` over all micro-batches of the optimizer step.

    Returns:
        The loss and the statistics by name, without gradient. Statistics are sums like the loss,
        so that those of micro-batches of any size add up to the mean over the optimizer step;
        those in `lopd.training.metrics.ESS` are logs of sums.

    Raises:
        DataError: num_items is not positive, or the batch has no teacher scores or rollout
            log-probs and the objective needs them.
        ConfigError: the loss does not fit in `objective.workspace_bytes`.

    >>> import numpy as np
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from lopd.data.demonstrations import Demonstration
    >>> from lopd.training.batch import Collator
    >>> sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    >>> model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    >>> tokens, loss_mask = np.arange(6, dtype=np.int32), np.arange(6) >= 2
    >>> batch = Collator()([Demonstration("prompt", 0, tokens, 2, "stop", loss_mask)])
    >>> loss, stats = step(model, batch, Objective("cross_entropy"), num_items=4.0)
    >>> loss.backward()
    >>> loss.shape, model.lm_head.weight.grad.shape
    (torch.Size([]), torch.Size([32, 16]))
    """
    _check_batch(batch, objective, num_items)

    def loss_fn(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, head: HeadOptions
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rows, options = head_arguments(batch, objective, hidden, bias, head)
        part, weighing = batch, dict[str, Tensor]()
        if objective.token_weights in RULES:
            kept, part, weighing = weigh_tokens(rows.detach(), weight, batch, objective, options)
            rows = rows[kept]
        loss, by_row = loss_of_rows(rows, weight, part, objective, options)
        stats = _statistics(by_row, part, num_items)
        if weighing:
            stats["kept_share"] = weighing["kept_share"] / num_items
            stats["weight_moments"] = weighing["weight_moments"]
        if objective.needs_teacher and torch.is_grad_enabled():
            some = part["overlap_rows"]
            ids, weights = part["topk_ids"][some], part["row_weights"][some]
            stats["topk_overlap"] = topk_overlap(rows.detach()[some], weight, ids, weights, options)
        return loss, stats

    inputs = model_inputs(batch)
    router: Tensor | None = None
    try:
        if torch.is_grad_enabled():
            (loss, stats), router = run_with_loss_and_router(model, inputs, loss_fn)
        else:  # the router's loss belongs to training only
            loss, stats = run_with_loss(model, inputs, loss_fn)
    except WorkspaceError as error:
        raise ConfigError(str(error)) from error
    loss = loss / num_items
    if router is not None:
        router = router * batch["row_weights"].sum() / num_items
        stats["router_loss"] = router.detach()
        loss = loss + router
    return loss, stats


def head_arguments(
    batch: Batch, objective: Objective, hidden: Tensor, bias: Tensor | None, head: HeadOptions
) -> tuple[Tensor, dict[str, Any]]:
    """Rows with a loss [N, D], and the options of the loss, from what a head is called with."""
    options = {
        "bias": bias,
        "temperature": objective.temperature,
        "validate": False,
        "workspace_bytes": objective.workspace_bytes,
        **head.kwargs(),
    }
    return hidden.flatten(0, 1)[batch["loss_index"]], options


def _check_batch(batch: Batch, objective: Objective, num_items: float) -> None:
    names = ", ".join(batch["sequence_names"])
    if not num_items > 0:
        raise DataError(
            f"num_items: found {num_items}; the optimizer step has no tokens with loss (sequences "
            f"{names})"
        )
    if objective.needs_teacher and "teacher_logprobs" not in batch:
        raise DataError(
            f"objective {objective.name}: the batch has no teacher scores; train on a TeacherCache"
        )
    for column, rule, what in (
        ("rewards", "advantage", "rewards"),
        ("teacher_entropy", "entropy", "the teacher's entropies"),
    ):
        if objective.token_weights == rule and column not in batch:
            raise DataError(
                f"sequences {names}: {what} are not all known, and token_weights '{rule}' needs "
                "them; train with other --token-weights"
            )
    if objective.needs_rollout_logprobs and "rollout_logprobs" not in batch:
        raise DataError(
            f"sequences {names}: their rollout log-probs are not all known, and importance "
            "correction needs them; train with --importance none, no --clip-range and --tail bucket"
        )


def _statistics(by_row: dict[str, Tensor], batch: Batch, num_items: float) -> dict[str, Tensor]:
    weights = batch["row_weights"]
    by_row = {name: row.detach() for name, row in by_row.items()}
    divergence, log_ratio = by_row.pop("divergence", None), by_row.get("log_ratio_to_rollout")
    if log_ratio is not None:
        by_row["abs_log_ratio_to_rollout"] = log_ratio.abs()
    stats = {name: (weights * row).sum() / num_items for name, row in by_row.items()}
    if log_ratio is not None:
        count = len(batch["sequence_names"])
        stats |= drift_moments(log_ratio, weights, batch["sequence_index"], count)
    if divergence is not None:
        stats["divergence_from"] = by_position(divergence, weights, batch["parts"])
        if "teacher_index" in batch:
            which = (batch["teacher_index"], batch["teacher_names"])
            stats |= by_teacher(divergence, weights, *which)
    return stats


def model_inputs(batch: Batch) -> dict[str, Any]:
    """Arguments of the model: the ids, and the padding mask or the boundaries of a pack."""
    ids = batch["input_ids"]
    if "position_ids" not in batch:
        return {"input_ids": ids, "attention_mask": batch["attention_mask"]}
    boundaries = pack_kwargs(batch["sequence_lengths"], ids.device)
    return {"input_ids": ids, "position_ids": batch["position_ids"], **boundaries}


def check_finite(what: str, value: Tensor | float, batches: Sequence[Batch], number: int) -> None:
    """Check a loss or a gradient norm.

    Args:
        what: name of the value, for the message.
        batches: the micro-batches that it was computed from.
        number: the optimizer step, from 1.

    Raises:
        DataError: the value is not finite; the message names step and sequences.
    """
    value = value.item() if isinstance(value, Tensor) else value
    if not math.isfinite(value):
        names = ", ".join(name for batch in batches for name in batch["sequence_names"])
        raise DataError(
            f"step {number}: the {what} is {value}; sequences: {names}; check their teacher "
            "scores, or start a new run (another --out) with a lower learning rate"
        )
