"""One step, the plain loop and the Trainer: the same numbers, whatever the batching."""

import copy
import json

import pytest
import torch
from helpers_training import (
    SAME_UPDATE,
    largest_difference,
    make_rollouts,
    make_scored,
    make_trainer,
    options,
    tiny_model,
    update_error,
    weights,
)

from lopd.errors import ConfigError, DataError, ModelError
from lopd.models.head import HeadOptions, head_options
from lopd.training.batch import Collator, SequenceDataset
from lopd.training.logging import LOG_NAME
from lopd.training.loop import train_loop
from lopd.training.trainer import LopdTrainer, Objective, step
from lopd_kernels import reference

OBJECTIVES = [
    Objective("reverse_kl"),
    Objective("forward_kl", tail="renormalize"),
    Objective("jsd", beta=0.3, temperature=1.5),
    Objective("policy_gradient", advantage_clip=0.7),
    Objective("cross_entropy"),
]


def scored(count=12, **kwargs):
    return make_scored(make_rollouts(count, **kwargs))


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


def test_statistics_mean_what_they_say():
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


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_accumulation_changes_nothing(tmp_path, aggregation):
    dataset, runs = SequenceDataset(scored(8)), []
    for size in (8, 2, 1):
        trainer = make_trainer(
            tiny_model(),
            tmp_path / str(size),
            dataset,
            aggregation=aggregation,
            batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_steps=4,
        )
        trainer.train()
        runs.append((weights(trainer.model), losses(trainer)))
    assert largest_difference(runs[0][0], weights(tiny_model())) > 1e-3
    for other in runs[1:]:
        assert update_error(other[0], runs[0][0], weights(tiny_model())) < SAME_UPDATE
        assert runs[0][1] == pytest.approx(other[1], rel=1e-5)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("objective", [OBJECTIVES[0], OBJECTIVES[3]], ids=lambda o: o.name)
def test_packing_changes_nothing(tmp_path, objective, aggregation):
    dataset, runs, sizes = SequenceDataset(scored(11)), [], []
    for budget in (None, 24):
        trainer = make_trainer(
            tiny_model(),
            tmp_path / str(budget),
            dataset,
            objective,
            aggregation,
            batch_size=6,
            max_steps=4,  # the second of an epoch has five sequences
            max_tokens_per_batch=budget,
        )
        trainer.model.model.register_forward_pre_hook(
            lambda module, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)),
            with_kwargs=True,
        )
        trainer.train()
        runs.append(trainer)
    packs = [shape for shape in sizes if shape[0] == 1 and shape[1] > 15]
    assert len(packs) > 4 and max(width for _, width in packs) <= 24
    padded, packed, start = (weights(m) for m in (*(run.model for run in runs), tiny_model()))
    assert largest_difference(padded, start) > 1e-3
    assert update_error(packed, padded, start) < SAME_UPDATE
    logs = [[e for e in run.state.log_history if "loss" in e] for run in runs]
    for padded, packed in zip(*logs, strict=True):
        for name in padded.keys() - {"tokens_per_second", "learning_rate"}:
            assert packed[name] == pytest.approx(padded[name], rel=1e-4, abs=1e-6), name


def test_a_sequence_that_no_pack_holds_is_refused_before_training(tmp_path):
    trainer = make_trainer(tiny_model(), tmp_path, max_tokens_per_batch=5)
    with pytest.raises(ConfigError, match=r"max_tokens_per_batch: found 5, but a sequence has 1\d"):
        trainer.train()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
def test_trainer_equals_the_plain_loop(tmp_path, objective):
    model = tiny_model("qwen3-tied")
    twin, start = copy.deepcopy(model), weights(model)
    changes = {"batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 5}
    dataset = SequenceDataset(scored(10))  # 5 micro-batches: an epoch ends on a short step
    trainer = make_trainer(model, tmp_path, dataset, objective=objective, **changes)
    batches = []
    collect = trainer.get_batch_samples

    def get_batch_samples(*args):
        micro_batches, num_items = collect(*args)
        batches.extend(micro_batches)
        return micro_batches, num_items

    trainer.get_batch_samples = get_batch_samples
    trainer.train()
    assert [len(micro_batches) for micro_batches in batches] == [3, 2, 3, 2, 3]
    log = train_loop(twin, batches, objective, options(**changes))
    assert update_error(weights(model), weights(twin), start) < SAME_UPDATE
    assert largest_difference(weights(model), start) > 1e-3
    assert losses(trainer) == pytest.approx([entry["loss"] for entry in log], rel=1e-5)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, ours in zip(history, log, strict=True):
        for name, value in ours.items():
            if name != "tokens_per_second":
                assert entry[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name


def log_history(trainer):
    """Every logged value that does not depend on the clock."""
    clock = {"tokens_per_second", "train_runtime", "train_samples_per_second"}
    clock |= {"train_steps_per_second", "train_loss", "total_flos"}
    return [{k: v for k, v in e.items() if k not in clock} for e in trainer.state.log_history]


RESUMED = {
    "accumulated": {"batch_size": 2, "gradient_accumulation_steps": 3},
    "packed": {"batch_size": 5, "max_tokens_per_batch": 30},
    "checkpointed": {"batch_size": 5, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("killed_at", [1, 4, 6])
@pytest.mark.parametrize("changes", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, changes, killed_at):
    """12 sequences: steps 2, 4 and 6 end or begin epochs; logs of 3 steps straddle the cut."""
    changes = {**changes, "max_steps": 7, "save_every": 1, "log_every": 3}
    whole = make_trainer(tiny_model(), tmp_path / "whole", **changes)
    whole.train()
    cut = make_trainer(tiny_model(), tmp_path / "cut", **changes)
    cut.add_callback(StopAfter(killed_at))
    cut.train()
    resumed = make_trainer(tiny_model(seed=9), tmp_path / "cut", **changes)
    torch.rand(3)  # what other code draws must not matter
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{killed_at}"))
    assert resumed.state.global_step == 7
    assert largest_difference(weights(whole.model), weights(resumed.model)) == 0.0
    assert log_history(resumed)[:-1] == log_history(whole)[:-1] and len(log_history(whole)) == 4
    states = [t.optimizer.state_dict()["state"] for t in (whole, resumed)]
    assert all(
        torch.equal(states[0][i][key], states[1][i][key]) for i in states[0] for key in states[0][i]
    )
    assert whole.lr_scheduler.state_dict() == resumed.lr_scheduler.state_dict()
    assert whole.model.config.use_cache is True
    logged = [json.loads(line) for line in (tmp_path / "cut" / LOG_NAME).read_text().splitlines()]
    assert [entry["step"] for entry in logged] == [3, 6, 7]


def StopAfter(steps):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= steps

    return Stop()


def test_epochs_count_where_no_steps_are_given(tmp_path):
    changes = {"max_steps": -1, "num_epochs": 2.0, "batch_size": 4, "log_every": 4}
    trainer = make_trainer(tiny_model(), tmp_path, SequenceDataset(scored(10)), **changes)
    trainer.train()
    assert [e["step"] for e in trainer.state.log_history if "loss" in e] == [4, 6]


def test_log_averages_over_the_steps_since_the_last(tmp_path):
    each = make_trainer(tiny_model(), tmp_path / "each", log_every=1)
    each.train()
    pairs = make_trainer(tiny_model(), tmp_path / "pairs", log_every=2)
    pairs.train()
    for name in ("loss", "student_tail", "student_entropy"):
        single = [entry[name] for entry in each.state.log_history if name in entry]
        double = [entry[name] for entry in pairs.state.log_history if name in entry]
        means = [(a + b) / 2 for a, b in zip(single[::2], single[1::2], strict=True)]
        assert double == pytest.approx(means, rel=1e-5), name
    assert all(e["tokens_per_second"] > 0 for e in each.state.log_history if "loss" in e)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = make_trainer(tiny_model(), tmp_path / "plain", max_steps=2)
    plain.train()
    saving = make_trainer(
        tiny_model(), tmp_path / "saving", max_steps=2, gradient_checkpointing=True
    )
    saving.train()
    assert saving.model.is_gradient_checkpointing
    start = weights(tiny_model())
    assert update_error(weights(saving.model), weights(plain.model), start) < SAME_UPDATE


def test_a_loss_that_is_not_finite_stops_training_and_names_step_and_sequences(tmp_path):
    items = scored(4)
    items[2].tail_logprobs[1] = float("nan")
    trainer = make_trainer(tiny_model(), tmp_path, SequenceDataset(items), batch_size=4)
    start = weights(trainer.model)
    with pytest.raises(DataError, match=r"step 1: the loss is nan.*p2/0"):
        trainer.train()
    assert largest_difference(start, weights(trainer.model)) == 0.0
    with pytest.raises(DataError, match=r"step 1: the loss is nan.*p2/0"):
        train_loop(trainer.model, [[Collator()(items)]], trainer.objective, options(max_steps=1))


def test_a_gradient_that_is_not_finite_stops_training_before_the_update(tmp_path):
    trainer = make_trainer(tiny_model(), tmp_path)
    model = trainer.model
    model.model.norm.weight.register_hook(lambda grad: grad * float("inf"))
    start = weights(model)
    with pytest.raises(
        DataError, match=r"step 1: the norm of the gradient is (inf|nan); sequences: p\d"
    ):
        trainer.train()
    assert largest_difference(start, weights(model)) == 0.0
    with pytest.raises(
        DataError, match=r"step 1: the norm of the gradient is (inf|nan); sequences: p\d"
    ):
        train_loop(model, [[Collator()(scored(4))]], Objective("reverse_kl"), options(max_steps=1))


def test_trainer_checks_the_head_at_start_up(tmp_path):
    model = tiny_model("granite")
    model.config.logits_scaling = 1.5
    assert head_options(model) != HeadOptions()
    model.lm_head.register_forward_hook(lambda module, args, output: output * 1.1)
    with pytest.raises(ModelError, match="its head does something"):
        make_trainer(model, tmp_path)


def test_other_kinds_of_parallelism_are_refused(tmp_path, monkeypatch):
    def refused(args, name):
        with pytest.raises(ConfigError, match=f"{name}.*: expected one process per GPU"):
            LopdTrainer(tiny_model(), args, Objective("reverse_kl"), SequenceDataset(scored()))

    for name, change in (("DataParallel", "_n_gpu"), ("DeepSpeed", "deepspeed")):
        args = options().training_arguments(tmp_path)
        setattr(args, change, 2)
        refused(args, name)
    args = options().training_arguments(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    refused(args, "FSDP")


def test_step_refuses_batches_that_bear_no_loss_or_have_no_teacher():
    model, batch = tiny_model(), Collator()(make_rollouts(2))
    with pytest.raises(DataError, match="p0/0, p1/0"):
        step(model, batch, Objective("cross_entropy"), 0.0)
    with pytest.raises(DataError, match="no teacher scores"):
        step(model, batch, Objective("reverse_kl"), 1.0)


def test_loop_wants_a_number_of_steps_and_enough_batches():
    batches = [[Collator()(scored(2))]]
    with pytest.raises(ConfigError, match="max_steps"):
        train_loop(tiny_model(), batches, Objective("reverse_kl"), options(max_steps=-1))
    with pytest.raises(DataError, match="after 1 of max_steps=6"):
        train_loop(tiny_model(), batches, Objective("reverse_kl"), options())


def test_loop_takes_batches_made_from_the_model_in_training():
    model, seen, modes = tiny_model().train(), [], []

    def online():
        while True:
            seen.append((model.training, model.lm_head.weight.detach().clone()))
            yield [Collator()(scored(2))]

    model.model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    train_loop(model, online(), Objective("reverse_kl"), options(max_steps=3, warmup_steps=0))
    assert [training for training, _ in seen] == [False] * 3
    assert modes[-3:] == [True] * 3
    assert not torch.equal(seen[1][1], seen[2][1])


def test_schedule_warms_up_and_ends_at_the_minimum():
    log = train_loop(
        tiny_model(),
        [[Collator()(scored(2))]] * 10,
        Objective("reverse_kl"),
        options(max_steps=10, warmup_steps=2, min_lr_ratio=0.1, learning_rate=1e-3),
    )
    rates = [entry["learning_rate"] for entry in log]
    assert rates[:3] == pytest.approx([0.0, 5e-4, 1e-3])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 1e-4 < rates[-1] < 1.5e-4


def test_mixed_precision_keeps_float32_weights(tmp_path):
    runs = []
    for mixed in ("none", "bf16"):
        trainer = make_trainer(tiny_model(), tmp_path / mixed, max_steps=3, mixed_precision=mixed)
        seen = []
        trainer.model.model.layers[0].mlp.register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output.dtype)
        )
        trainer.train()
        assert set(seen) == {torch.float32 if mixed == "none" else torch.bfloat16}
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        runs.append(losses(trainer))
    assert runs[0] != runs[1] and runs[0] == pytest.approx(runs[1], rel=0.02)
