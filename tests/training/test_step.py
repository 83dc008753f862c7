"""One step against dense logits: loss, gradients, statistics, and the router's loss."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_training import (
    OBJECTIVES,
    largest_difference,
    make_rollouts,
    make_scored,
    scored,
    tiny_model,
    tiny_moe,
    without_loss,
)

from lopd.config.objective import WEIGHT_SETTINGS, Objective
from lopd.errors import ConfigError, DataError
from lopd.models.head import run_with_loss_and_router
from lopd.training.batch import Collator
from lopd.training.metrics import MetricsAccumulator
from lopd.training.step import step
from lopd_kernels import reference


def gradients(model, batch, objective, num_items):
    model.zero_grad()
    loss, stats = step(model, batch, objective, num_items)
    loss.backward()
    return loss.detach(), stats, {n: p.grad.clone() for n, p in model.named_parameters()}


def dense_loss(model, batch, objective):
    """The definition: full logits, then the reference loss on the loss rows."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    rows = model(**inputs, use_cache=False).logits.flatten(0, 1)[batch["loss_index"]]
    shared = {"row_weights": batch["row_weights"], "temperature": objective.temperature}
    if objective.name == "cross_entropy":
        log_p = torch.log_softmax(rows / objective.temperature, -1)
        picked = log_p.gather(1, batch["labels"][:, None])[:, 0]
        return -(batch["row_weights"] * picked).sum()
    if objective.name == "policy_gradient":
        picked = torch.log_softmax(rows, -1).gather(1, batch["labels"][:, None])[:, 0]
        advantage = (batch["teacher_logprobs"] - picked.detach()).clamp(-0.7, 0.7)
        return -(batch["row_weights"] * advantage * picked).sum()
    return reference.sparse_divergence(
        rows,
        batch["topk_ids"],
        batch["topk_logprobs"],
        tail_logprobs=batch["tail_logprobs"],
        divergence=objective.name,
        tail=objective.tail,
        **({} if objective.beta is None else {"beta": objective.beta}),
        reduction="sum",
        **shared,
    )


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
@pytest.mark.parametrize("family", ["qwen3", "qwen3-tied", "gemma2", "cohere", "phi"])
def test_step_equals_the_dense_loss_on_the_models_logits(family, objective):
    model = tiny_model(family, spread=3.0)
    batch = Collator("sequence_mean")(scored(4))
    loss, _, found = gradients(model, batch, objective, 4.0)
    model.zero_grad()
    expected = dense_loss(model, batch, objective) / 4.0
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        error = (found[name] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-6)
        assert error < 1e-4, name


def test_padded_batch_equals_single_sequences():
    model, items, objective = tiny_model(), scored(5), Objective("reverse_kl")
    together = Collator(pad_token_id=7)(items)
    num_items = together["row_weights"].sum().item()
    loss, stats, grads = gradients(model, together, objective, num_items)
    model.zero_grad()
    losses, tails = 0.0, 0.0
    for item in items:
        part, part_stats = step(model, Collator()([item]), objective, num_items)
        part.backward()
        losses, tails = losses + part.item(), tails + part_stats["student_tail"].item()
    assert loss.item() == pytest.approx(losses, rel=1e-5)
    assert stats["student_tail"].item() == pytest.approx(tails, rel=1e-5)
    assert largest_difference(grads, {n: p.grad for n, p in model.named_parameters()}) < 1e-6


def test_statistics_equal_those_from_dense_logits():
    model, batch = tiny_model(spread=3.0), Collator()(scored(4))
    n = batch["row_weights"].sum().item()
    logits = model(batch["input_ids"], batch["attention_mask"]).logits.flatten(0, 1)
    log_p = torch.log_softmax(logits[batch["loss_index"]], -1)
    entropy = -(log_p.exp() * log_p).sum(1).mean().item()
    _, stats = step(model, batch, Objective("reverse_kl"), n)
    listed = torch.zeros_like(log_p).scatter_(1, batch["topk_ids"].long().clamp(min=0), 1.0)
    listed[batch["topk_ids"][:, 3] == -1] = 0.0
    for row, ids in zip(listed, batch["topk_ids"].tolist(), strict=True):
        row[[i for i in ids if i >= 0]] = 1.0
    tail = (log_p.exp() * (1 - listed)).sum(1).mean().item()
    assert stats["student_tail"].item() == pytest.approx(tail, rel=1e-4)
    assert stats["student_entropy"].item() == pytest.approx(entropy, rel=1e-4)
    assert stats["teacher_tail"].item() == pytest.approx(batch["tail_logprobs"].exp().mean().item())

    _, stats = step(model, batch, Objective("policy_gradient", advantage_clip=1.0), n)
    picked = log_p.gather(1, batch["labels"][:, None])[:, 0]
    advantage = batch["teacher_logprobs"] - picked
    assert stats["advantage"].item() == pytest.approx(advantage.mean().item(), rel=1e-4)
    assert stats["share_clipped"].item() == pytest.approx((advantage.abs() > 1).float().mean())
    assert 0 < stats["share_clipped"].item() < 1
    drift = (picked - batch["rollout_logprobs"]).mean().item()
    assert stats["log_ratio_to_rollout"].item() == pytest.approx(drift, rel=1e-4)
    assert all(not value.requires_grad for value in stats.values())


def test_the_loss_at_the_teacher_is_zero_with_zero_gradient():
    model, rollouts = tiny_model(), make_rollouts(4)
    items = make_scored(rollouts)
    batch = Collator()(items)
    logits = model(batch["input_ids"], batch["attention_mask"]).logits.flatten(0, 1)
    log_q = torch.log_softmax(logits[batch["loss_index"]].detach(), -1)
    top = log_q.topk(4)
    batch["topk_ids"], batch["topk_logprobs"] = top.indices.int(), top.values
    batch["tail_logprobs"] = torch.log1p(-top.values.exp().sum(1))
    loss, _, grads = gradients(model, batch, Objective("reverse_kl"), 1.0)
    assert abs(loss.item()) < 1e-4
    assert max(g.abs().max().item() for g in grads.values()) < 1e-4


def test_batches_without_loss_or_teacher_are_refused():
    model, batch = tiny_model(), Collator()(make_rollouts(2))
    with pytest.raises(DataError, match="p0/0, p1/0"):
        step(model, batch, Objective("cross_entropy"), 0.0)
    with pytest.raises(DataError, match="no teacher scores"):
        step(model, batch, Objective("reverse_kl"), 1.0)


MANY_OBJECTIVES = [
    *OBJECTIVES,
    Objective("reverse_kl", tail="unbiased"),
    Objective("reverse_kl", dense_share=0.5),
    Objective("reverse_kl", tolerance=0.1),
    Objective("reverse_kl", eos_class=(1, 2)),
    Objective("log_ratio", entropy_bonus=0.1),
    Objective("policy_gradient", importance="sequence"),
    Objective("policy_gradient", clip_range=0.2),
    *(Objective("reverse_kl", token_weights=rule) for rule in WEIGHT_SETTINGS if rule != "none"),
]


@pytest.mark.parametrize("weights", [1.0, 0.0])
@pytest.mark.parametrize("objective", MANY_OBJECTIVES, ids=lambda each: each.name)
def test_a_micro_batch_with_nothing_to_train_adds_nothing(objective, weights):
    """As a process of several may have one; its gradients must be there, and 0, for all to meet."""
    items = [replace(item, rollout=replace(item.rollout, reward=1.0)) for item in scored(4)]
    batch, idle = Collator()(items[:2]), items[2:]
    idle = Collator()(idle if weights == 0 else [without_loss(item) for item in idle])
    idle["row_weights"] = weights * idle["row_weights"]
    assert len(idle["labels"]) == 0 or idle["row_weights"].sum() == 0
    model, metrics = tiny_moe("qwen3_moe"), MetricsAccumulator()
    loss, _, found = gradients(model, idle, objective, 9.0)
    assert loss == 0.0
    assert all((gradient == 0).all() for gradient in found.values())
    metrics.begin_step()
    for each in (batch, idle):
        torch.manual_seed(0)
        loss, stats = step(model, each, objective, 9.0)
        metrics.add({"loss": loss.detach(), **stats}, len(each["labels"]))
        if each is batch:
            alone = loss.item()
    means = metrics.pop()
    assert means["loss"] == pytest.approx(alone)
    assert all(np.isfinite(value) for value in means.values()), means


def test_the_routers_loss_is_weighted_by_the_micro_batchs_share_in_training():
    model = tiny_moe("qwen3_moe")
    batch = Collator()(scored(6))
    tokens = float(len(batch["labels"]))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    _, router = run_with_loss_and_router(model, inputs, lambda hidden, *_: hidden.sum())
    with torch.no_grad():
        plain, stats = step(model, batch, Objective("reverse_kl"), 3 * tokens)
    assert "router_loss" not in stats
    loss, stats = step(model, batch, Objective("reverse_kl"), 3 * tokens)
    assert stats["router_loss"].item() == pytest.approx(router.item() / 3, rel=1e-6)
    assert loss.item() == pytest.approx(plain.item() + router.item() / 3, rel=1e-6)
    loss.backward()
    gates = [p.grad for n, p in model.named_parameters() if n.endswith("mlp.gate.weight")]
    assert gates and all(grad.abs().max() > 0 for grad in gates)
    assert not stats["router_loss"].requires_grad


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.name)
def test_a_workspace_that_is_too_small_is_the_callers_error(objective):
    model, batch = tiny_model(), Collator()(scored())
    small = replace(objective, workspace_bytes=1000)
    with pytest.raises(ConfigError, match="^workspace_bytes is 1000, .* need.* at least"):
        step(model, batch, small, 8.0)
    with torch.no_grad(), pytest.raises(ConfigError, match="^workspace_bytes is 1000"):
        step(model, batch, small, 8.0)
