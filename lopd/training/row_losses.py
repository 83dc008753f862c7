"""The loss of an objective on the rows of the LM head, and statistics of each row."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lopd.config.objective import Objective
from lopd.training.batch import Batch
from lopd.training.metrics import sequence_sums
from lopd.training.token_weights import select_rows
from lopd_kernels import (
    SkippingStats,
    linear_cross_entropy,
    linear_logprobs,
    linear_policy_gradient,
    linear_sparse_divergence,
)

GATHERED_ROWS = 1024  # rows of the head's weight that `_sampled_logprobs` gathers at a time


def loss_of_rows(
    rows: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    batch: Batch,
    objective: Objective,
    options: dict[str, Any],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of an objective over rows, and statistics by name, [N] each.

    Args:
        rows: hidden states that predict the batch's labels.
        weight: of the LM head.
        batch: from `lopd.training.batch.Collator`.
        objective: what to minimise.
        options: head options, temperature and workspace for the functions of `lopd_kernels`.
    """
    if objective.name == "cross_entropy":
        loss = linear_cross_entropy(
            rows,
            weight,
            batch["labels"],
            row_weights=batch["row_weights"],
            reduction="sum",
            **options,
        )
        return loss, {}
    if objective.name == "policy_gradient":
        return _policy_gradient(rows, weight, batch, objective, options)
    if objective.name == "log_ratio":
        return _log_ratio(rows, weight, batch, objective, options)
    if objective.token_weights == "entropy":
        return _gated(rows, weight, batch, objective, options)
    return _sparse_divergence(rows, weight, batch, objective, options)


def _sparse_divergence(
    rows: Tensor, weight: Tensor, batch: Batch, objective: Objective, options: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    form: dict[str, Any] = {"divergence": objective.name, "tail": objective.tail}
    if objective.beta is not None:
        form["beta"] = objective.beta
    if objective.tail == "unbiased":
        form |= {
            "sampled_ids": batch["labels"],
            "sampled_logprobs": batch["teacher_logprobs"],
            "rollout_logprobs": batch["rollout_logprobs"],
            "importance_cap": objective.importance_cap,
        }
    loss, stats = linear_sparse_divergence(
        rows,
        weight,
        batch["topk_ids"],
        merged_logprobs(rows, weight, batch, objective.eos_class, options),
        tail_logprobs=batch["tail_logprobs"],
        row_weights=batch["row_weights"],
        reduction="sum",
        return_stats=True,
        **form,
        **_skipping(objective),
        **options,
    )
    reported = {"divergence": stats.loss, **_teacher_statistics(batch)}
    reported |= _skipping_statistics(stats.skipping, batch)
    if objective.name == "reverse_kl":
        reported["reverse_kl"] = stats.loss
    if stats.correction is not None and stats.importance is not None:
        reported |= _correction_statistics(
            stats.loss, stats.correction, stats.importance, objective
        )
    if stats.student_lse is None:  # renormalize does not compute the mass outside the list
        return loss, reported
    assert stats.student_tail_logprobs is not None and stats.student_entropy is not None
    reported["student_tail"] = stats.student_tail_logprobs.exp()
    reported["student_entropy"] = stats.student_entropy
    if "rollout_logprobs" in batch:
        sampled = _sampled_logprobs(rows, weight, batch, stats.student_lse, options)
        reported["log_ratio_to_rollout"] = sampled - batch["rollout_logprobs"]
    return loss, reported


def _gated(
    rows: Tensor, weight: Tensor, batch: Batch, objective: Objective, options: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward KL in rows where the teacher's entropy is above the bound, reverse KL elsewhere.

    Each row takes part in one of the two calls, so that the products with the LM head cost what
    they cost without a gate.

    Source: arXiv:2603.07079.
    """
    uncertain = batch["teacher_entropy"] > objective.weight_entropy
    losses, by_row = [], {"share_forward": uncertain.float()}
    for name, chosen in (("reverse_kl", ~uncertain), ("forward_kl", uncertain)):
        one = replace(objective, name=name, token_weights="none", weight_entropy=None)
        loss, stats = _sparse_divergence(
            rows[chosen], weight, select_rows(batch, chosen), one, options
        )
        losses.append(loss)
        stats.pop("reverse_kl", None)  # known in some rows only
        for key, values in stats.items():
            by_row.setdefault(key, values.new_zeros(len(chosen)))[chosen] = values
    return losses[0] + losses[1], by_row


def _skipping(objective: Objective) -> dict[str, Any]:
    """Which gradients outside the lists may be left out; none without a backward.

    The draws of `dense_share` come from torch's generator, whose state a checkpoint keeps.
    """
    if not torch.is_grad_enabled():
        return {}
    if objective.tolerance is not None:
        return {"tolerance": objective.tolerance}
    if objective.dense_share is not None:
        seed = int(torch.randint(2**62, ()))
        return {"dense_share": objective.dense_share, "seed": seed}
    return {}


def _skipping_statistics(skipping: SkippingStats | None, batch: Batch) -> dict[str, Tensor]:
    """What was left out in this call, the same for each of its rows [N]."""
    if skipping is None:
        return {}
    left_out = skipping.dropped_l1 / skipping.kept_l1.clamp(min=torch.finfo(torch.float32).tiny)
    rows = len(batch["labels"])
    return {"share_dense": skipping.share.expand(rows), "left_out": left_out.expand(rows)}


def _correction_statistics(
    loss: Tensor, correction: Tensor, importance: Tensor, objective: Objective
) -> dict[str, Tensor]:
    """Statistics [N] of the unbiased tail.

    `reverse_kl` is that over the buckets, as with other tails, a lower bound of the full KL;
    `full_reverse_kl` is an estimate of the latter, unbiased where no weight is capped.
    """
    stats = {
        "divergence": loss - correction,
        "reverse_kl": loss - correction,
        "full_reverse_kl": loss,
        "share_corrected": (importance > 0).float(),
        "importance": importance,
    }
    if (cap := objective.importance_cap) is not None:
        stats["share_capped"] = (importance >= cap).float()
    return stats


@torch.no_grad()
def merged_logprobs(
    rows: Tensor, weight: Tensor, batch: Batch, merged: Sequence[int], options: dict[str, Any]
) -> Tensor:
    """The teacher's listed log-probs [N, K], so that the ids of a class count as one token.

    The teacher's mass of the class, Q, is split among its ids as the student splits its own, P:
    q_c = Q p_c / P, a constant. Each divergence is a sum of phi(p, q) with phi(a p, a q) =
    a phi(p, q), so the terms of the class add up to phi(P, Q), and since dphi/dp is the same for
    all of them, the gradient too is that of one bucket.
    """
    listed = batch["topk_logprobs"]
    if not merged:
        return listed
    members = torch.tensor(merged, device=listed.device)
    bias = options["bias"]
    head = {**options, "bias": None if bias is None else bias[members]}
    places = torch.arange(len(merged), device=rows.device).expand(len(rows), -1)
    shares: Any = linear_logprobs(rows, weight[members], places, **head)  # [N, C]: log p_c / P
    is_member = batch["topk_ids"][..., None] == members  # [N, K, C]
    member = is_member.any(-1)
    mass = listed.masked_fill(~member, -torch.inf).logsumexp(1, keepdim=True)
    split = mass + shares.gather(1, is_member.int().argmax(-1))
    return torch.where(member, split.to(listed.dtype), listed)


@torch.no_grad()
def _sampled_logprobs(
    rows: Tensor, weight: Tensor, batch: Batch, lse: Tensor, options: dict[str, Any]
) -> Tensor:
    """log p [N] of the sampled tokens from the known lse [N], by one row of the weight each.

    The loss computes no lse for rows without a list: these take a pass over the head.
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
        unlisted_logprobs = linear_logprobs(rows[unlisted], weight, ids, **options)
        logprobs[unlisted] = unlisted_logprobs[:, 0]
    return logprobs


def _policy_gradient(
    rows: Tensor, weight: Tensor, batch: Batch, objective: Objective, options: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    clip, by_sequence = objective.advantage_clip, objective.importance == "sequence"
    row_weights = batch["row_weights"]
    correction: dict[str, Any] = {"clip_range": objective.clip_range}
    if by_sequence:
        with torch.no_grad():  # a separate pass over the head
            scores, entropy = linear_logprobs(
                rows, weight, batch["labels"][:, None], return_entropy=True, **options
            )
        logprobs = scores[:, 0]
        ratio = sequence_ratios(logprobs, batch, objective.importance_cap)
        row_weights = row_weights * ratio
    else:
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
        **_skipping(objective),
        **options,
    )
    if not by_sequence:  # the loss has no statistics of rows whose sequence ratio is 0
        logprobs, entropy, ratio = stats.logprobs, stats.student_entropy, stats.importance
    advantages = batch["teacher_logprobs"] - logprobs
    reported = {
        "divergence": -advantages,  # a one-sample estimate of the reverse KL
        "advantage": advantages,
        "advantage_squared": advantages.square(),
        "student_entropy": entropy,
        **_teacher_statistics(batch),
        **_skipping_statistics(stats.skipping, batch),
    }
    if "rollout_logprobs" in batch:
        reported["log_ratio_to_rollout"] = logprobs - batch["rollout_logprobs"]
    if objective.needs_rollout_logprobs:
        reported["importance"] = ratio
    if clip is not None:
        reported["share_clipped"] = (advantages.abs() > clip).float()
    return loss, reported


def _log_ratio(
    rows: Tensor, weight: Tensor, batch: Batch, objective: Objective, options: dict[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    scores, entropy = linear_logprobs(
        rows, weight, batch["labels"][:, None], return_entropy=True, **options
    )
    ratio = scores[:, 0] - batch["teacher_logprobs"]
    losses, size = ratio.square(), ratio.abs()
    if delta := objective.delta:
        losses = torch.where(size <= delta, losses, delta * (2.0 * size - delta))
    if objective.entropy_bonus:
        losses = losses - objective.entropy_bonus * entropy
    advantages = -ratio.detach()
    reported = {
        "divergence": -advantages,  # a one-sample estimate of the reverse KL
        "advantage": advantages,
        "advantage_squared": advantages.square(),
        "share_beyond_delta": (size > (delta or math.inf)).float(),
        "student_entropy": entropy.detach(),
        **_teacher_statistics(batch),
    }
    if "rollout_logprobs" in batch:
        reported["log_ratio_to_rollout"] = scores[:, 0].detach() - batch["rollout_logprobs"]
    return (batch["row_weights"] * losses).sum(), reported


def sequence_ratios(logprobs: Tensor, batch: Batch, cap: float | None) -> Tensor:
    """p(sequence) / p_rollout(sequence) over the loss tokens, for each row.

    Args:
        logprobs: [N], the student's, of the sampled tokens.
        batch: from `lopd.training.batch.Collator`, with rollout log-probs.
        cap: upper bound of a ratio; None for no bound.

    Returns:
        [N], the ratio of the row's sequence.
    """
    log_ratio = logprobs - batch["rollout_logprobs"]
    index = batch["sequence_index"]
    total = sequence_sums(log_ratio, index, len(batch["sequence_names"]))
    if cap is not None:
        total = total.clamp(max=math.log(cap))
    return total.exp()[index]


def _teacher_statistics(batch: Batch) -> dict[str, Tensor]:
    """The teacher's tail mass and, if the scoring engine reports it, its entropy."""
    stats = {"teacher_tail": batch["tail_logprobs"].exp()}
    if "teacher_entropy" in batch:
        stats["teacher_entropy"] = batch["teacher_entropy"]
    return stats
