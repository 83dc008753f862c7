"""The Trainer: equality with the plain loop, batching, resuming, and refusals."""

import copy

import pytest
import torch
from helpers_artefacts import logged
from helpers_training import (
    OBJECTIVES,
    SAME_UPDATE,
    check_overrides,
    largest_difference,
    make_deaf,
    make_trainer,
    options,
    scored,
    tiny_model,
    update_error,
    weights,
)
from transformers import Trainer

from lopd.errors import ConfigError, DataError, ModelError
from lopd.models.head import HeadOptions, head_options
from lopd.training.batch import Collator, SequenceDataset
from lopd.training.holdout import Holdout
from lopd.training.loop import train_loop
from lopd.training.trainer import LopdTrainer, Objective


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


def test_a_sequence_longer_than_a_pack_is_refused_before_training(tmp_path):
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
    "sampled": {"batch_size": 5, "objective": Objective("reverse_kl", dense_share=0.4)},
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
    torch.rand(3)  # random numbers that other code draws must not matter
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
    log = logged(tmp_path / "cut")
    assert [entry["step"] for entry in log] == [3, 6, 7]


def StopAfter(steps):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= steps

    return Stop()


def test_epochs_count_without_max_steps(tmp_path):
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
        with pytest.raises(ConfigError, match=f"{name}.*: expected one .* with or without fsdp"):
            LopdTrainer(tiny_model(), args, Objective("reverse_kl"), SequenceDataset(scored()))

    for name, change in (("DataParallel", "_n_gpu"), ("DeepSpeed", "deepspeed")):
        args = options().training_arguments(tmp_path)
        setattr(args, change, 2)
        refused(args, name)
    args = options().training_arguments(tmp_path)
    for name, value in (("FSDP", "1"), ("DeepSpeed", "true"), ("Megatron-LM", "TRUE")):
        variable = f"ACCELERATE_USE_{name.upper().replace('-', '_')}"
        with monkeypatch.context() as launched:
            launched.setenv(variable, value)
            refused(args, f"{name} by accelerate's settings")


def test_packs_are_checked_before_an_evaluation_too(tmp_path):
    model, data = tiny_model(), SequenceDataset(scored())
    holdout = Holdout(data, Objective("reverse_kl"), eval_steps=1)
    args, sizes = options().training_arguments(tmp_path), {"max_tokens_per_batch": 24}
    trainer = LopdTrainer(
        model, args, Objective("reverse_kl"), data, Collator(), holdout=holdout, **sizes
    )
    make_deaf(model)
    with pytest.raises(ModelError, match="cannot be packed"):
        trainer.evaluate()


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


# Methods that ours add; all others must exist in Trainer, or nothing would call them.
OWN = {"_check_sharding", "unsharded_state", "gather", "step_dataset", "_out_of_memory"}
OWN |= {"_check_weights", "_rotate", "_stop", "minimise", "use_packs", "statistics", "check_packs"}


def test_every_override_is_a_method_of_the_installed_trainer():
    check_overrides(LopdTrainer, Trainer, OWN)
