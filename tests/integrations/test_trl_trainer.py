"""The TRL trainer trains as `lopd distill` does, and takes caches and datasets alike."""

import json
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers_artefacts import trained_weights, write_cache
from helpers_training import SAME_UPDATE, check_overrides, make_deaf, update_error, weights
from helpers_trl import QUIET, make_trainer

from lopd import DistillConfig, Objective, distill
from lopd.errors import ConfigError, DataError, ModelError, ProvenanceError, ShardError
from lopd.models.load import load_model
from lopd.store import TeacherCache
from lopd.training.batch import Collator
from lopd.training.step import step

pytest.importorskip("trl", reason="part of the extra `trl`")

from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

from lopd.integrations.datasets import from_dataset, to_dataset
from lopd.integrations.trl import OfflineDistillationConfig, OfflineDistillationTrainer


@pytest.fixture
def cache(pipeline):
    return TeacherCache.open(pipeline / "cache")


SETTINGS = [
    {},
    {"objective": "jsd", "beta": 0.3, "loss_aggregation": "sequence_mean"},
    {"objective": "policy_gradient", "advantage_clip": 1.0, "support": "list"},
    {"objective": "forward_kl", "tail": "renormalize", "workspace_bytes": "64MiB"},
    {"padding_free": True},
]


@pytest.mark.thorough
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_it_takes_the_steps_of_lopd_distill(pipeline, tmp_path, cache, settings):
    """Whole epochs in one step each, so that the order of the data does not matter."""
    settings = dict(settings)
    theirs = {"padding_free": settings.pop("padding_free", False)}
    common = {
        "learning_rate": 3e-3, "max_steps": 3, "weight_decay": 0.1, "adam_beta1": 0.9,
        "adam_beta2": 0.98, "adam_epsilon": 1e-8, "max_grad_norm": 1.0, **settings,
    }  # fmt: skip
    trainer = make_trainer(
        pipeline,
        tmp_path / "trl",
        cache,
        gradient_accumulation_steps=3,
        lr_scheduler_type="constant",
        logging_steps=1,
        **theirs,
        **common,
    )
    start = weights(trainer.model)
    trainer.train()
    distill(
        DistillConfig(
            student=str(pipeline / "student"),
            cache=str(pipeline / "cache"),
            out=str(tmp_path / "lopd"),
            batch_size=4,
            gradient_accumulation_steps=3,
            device="cpu",
            log_every=1,
            **common,
        )
    )
    expected = trained_weights(tmp_path / "lopd")
    assert update_error(weights(trainer.model), expected, start) < SAME_UPDATE
    found = logged(trainer)
    lines = (tmp_path / "lopd/train_log.jsonl").read_text().splitlines()
    ours = [entry for entry in map(json.loads, lines) if "loss" in entry]
    assert len(found) == len(ours) == 3
    for left, right in zip(found, ours, strict=True):
        statistics = {*right} - {"epoch", "learning_rate", "step", "tokens_per_second"}
        assert {"loss", "grad_norm", "teacher_tail"} <= statistics
        for name in statistics:
            assert left[name] == pytest.approx(right[name], rel=1e-3, abs=1e-5), name


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_rows_without_padding_have_the_loss_and_gradients_of_padded_ones(
    pipeline, tmp_path, cache, aggregation
):
    found = []
    for packed in (False, True):
        trainer = make_trainer(
            pipeline, tmp_path, cache, padding_free=packed, loss_aggregation=aggregation
        )
        rows = [trainer.train_dataset[i] for i in range(7)]
        batch = trainer._collate(rows)
        width = sum(row["length"] for row in rows) if packed else max(r["length"] for r in rows)
        assert batch["input_ids"].shape == (1 if packed else 7, width)
        weight = batch["row_weights"].sum().item()
        trainer.metrics.begin_step()
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=weight)
        loss.backward()
        gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
        held_out = trainer.evaluate(cache)["eval_loss"]
        found.append((loss.item(), held_out, gradients))
    (loss, held_out, expected), (again, held_out_again, gradients) = found
    assert again == pytest.approx(loss, rel=1e-5)
    assert held_out_again == pytest.approx(held_out, rel=1e-5)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() < 1e-4 * gradient.norm(), name


def test_a_model_that_mixes_packed_sequences_is_refused(pipeline, tmp_path, cache):
    trainer = make_trainer(pipeline, tmp_path, cache, padding_free=True, max_steps=1)
    make_deaf(trainer.model)
    for use in (lambda: trainer.evaluate(cache), trainer.train):
        with pytest.raises(ModelError, match=r"cannot be packed.*padding_free"):
            use()


def test_every_override_is_a_method_of_the_installed_trl(pipeline):
    own = {"gather", "minimise", "use_packs", "statistics", "check_packs"}
    own |= {"_objective_on", "_numbered", "_numbered_all"}
    check_overrides(OfflineDistillationTrainer, SFTTrainer, own)


@pytest.mark.thorough
def test_caches_datasets_and_lists_train_alike(pipeline, tmp_path, cache):
    found = []
    dataset = to_dataset(cache)
    for number, data in enumerate((cache, dataset, from_dataset(dataset), [*cache])):
        settings = {"max_steps": 4, "learning_rate": 3e-3, "seed": 5}
        trainer = make_trainer(pipeline, tmp_path / str(number), data, **settings)
        trainer.train()
        found.append(weights(trainer.model))
    for other in found[1:]:
        assert all((other[name] == value).all() for name, value in found[0].items())


def test_a_cache_is_read_for_the_vocabulary_of_the_student(pipeline, tmp_path, cache):
    """So that the mass of listed ids which its head lacks moves to the tail."""
    trainer = make_trainer(pipeline, tmp_path, cache, support="list")
    source = trainer._collate.sources["train"].source
    assert source.vocab_size == trainer.model.get_input_embeddings().weight.shape[0]
    assert source.support == "list"


@pytest.mark.parametrize("objective", ["forward_kl", "policy_gradient"])
def test_evaluation_is_the_held_out_divergence(pipeline, tmp_path, cache, objective):
    data = [*cache]
    parts = {"short": data[:4], "long": data[4:10]}
    trainer = make_trainer(
        pipeline, tmp_path, data[4:], parts, objective=objective, per_device_eval_batch_size=2
    )
    held_out = "reverse_kl" if objective == "policy_gradient" else objective
    metrics = trainer.evaluate()
    for name, items in parts.items():
        batch = Collator(pad_token_id=trainer.processing_class.pad_token_id)(items)
        with torch.no_grad():
            expected, _ = step(trainer.model, batch, Objective(held_out), len(batch["labels"]))
        assert metrics[f"eval_{name}_loss"] == pytest.approx(expected.item(), rel=1e-5)
    given = trainer.evaluate(parts["long"])
    assert given["eval_loss"] == pytest.approx(metrics["eval_long_loss"])
    assert trainer.evaluate(to_dataset(cache))["eval_loss"] > 0


def test_it_evaluates_saves_and_resumes(pipeline, tmp_path, cache):
    settings = {
        "max_steps": 4, "learning_rate": 3e-3, "save_strategy": "steps", "save_steps": 2,
        "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1,
    }  # fmt: skip
    whole = make_trainer(pipeline, tmp_path / "out", cache, cache, **settings)
    whole.train()
    assert len([entry for entry in whole.state.log_history if "eval_loss" in entry]) == 2
    again = make_trainer(pipeline, tmp_path / "out", cache, cache, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    expected = weights(whole.model)
    assert all((expected[name] == value).all() for name, value in weights(again.model).items())
    whole.save_model(tmp_path / "saved")
    saved = trained_weights(tmp_path / "saved")
    assert all((expected[name] == value).all() for name, value in saved.items())
    assert "lopd" in (tmp_path / "out/README.md").read_text()


def test_adapters_are_trained_and_the_base_is_not(pipeline, tmp_path, cache):
    peft = pytest.importorskip("peft", reason="part of the extra `peft`")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(pipeline, tmp_path, cache, peft_config=config, max_steps=2)
    start = weights(trainer.model)
    trainer.train()
    moved = {name for name, value in weights(trainer.model).items() if (value != start[name]).any()}
    assert moved and all("lora_" in name for name in moved)


def test_mixed_precision_reaches_the_backbone(pipeline, tmp_path, cache):
    trainer = make_trainer(pipeline, tmp_path, cache, bf16=True, max_steps=1)
    seen = []
    projection = trainer.model.model.layers[0].self_attn.q_proj
    projection.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trainer.train()
    assert {*seen} == {torch.bfloat16} and math.isfinite(
        trainer.state.log_history[-1]["train_loss"]
    )


def test_a_loss_that_is_not_finite_stops_the_run(pipeline, tmp_path, cache):
    trainer = make_trainer(pipeline, tmp_path, cache, max_steps=2)
    with torch.no_grad():
        trainer.model.model.norm.weight.fill_(math.nan)
    with pytest.raises(DataError, match=r"step 1: the loss is nan; sequences: p\d"):
        trainer.train()


def test_every_setting_of_the_loss_is_a_setting_here(tmp_path):
    ours = {each.name for each in fields(OfflineDistillationConfig)}
    of_the_cache = {"name", "eos_class", "calibrated"}
    settings = {each.name for each in fields(Objective)} - of_the_cache
    assert settings <= ours
    (args,) = HfArgumentParser(OfflineDistillationConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--objective", "jsd", "--beta", "0.3", "--bf16", "False"]
    )
    assert (args.objective, args.beta, args.tail) == ("jsd", 0.3, "bucket")
    assert args.learning_rate == DistillConfig(student="s", cache="c", out="o").learning_rate
    json.loads(args.to_json_string())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 1024}, "max_length: found 1024, which has no effect: sequences stay"),
        ({"packing": True}, "packing: found True, which has no effect: padding_free puts"),
        ({"attention": "sdpa"}, "attention: applies to rows without padding only; set padding"),
        ({"padding_free": True, "attention": "eager"}, "attention: found 'eager'; expected one"),
        ({"shuffle_dataset": True}, "shuffle_dataset: found True, which has no effect"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of: found 8, which has no effect"),
        ({"eval_accumulation_steps": 2}, "eval_accumulation_steps: found 2, which has no effect"),
        ({"loss_type": "dft"}, "loss_type: found 'dft', which has no effect: objective is the"),
        ({"completion_only_loss": True}, "completion_only_loss: found True, which"),
        ({"remove_unused_columns": True}, "remove_unused_columns: found True"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices: found False"),
        ({"objective": "kl"}, "objective: found 'kl'"),
        ({"beta": 0.5}, "beta: reverse_kl has no mixture"),
        ({"objective": "jsd", "beta": 1.0}, "beta: found 1.0"),
        ({"workspace_bytes": "much"}, "workspace_bytes"),
    ],
)
def test_settings_without_a_meaning_are_refused(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        OfflineDistillationConfig(str(tmp_path), **{**QUIET, **settings})


def test_data_that_the_objective_cannot_use_are_refused(pipeline, tmp_path, cache):
    other = write_cache(
        tmp_path / "cache", pipeline / "teacher", pipeline / "rollouts", temperature=2.0
    )
    warm = TeacherCache.open(other)
    with pytest.raises(ConfigError, match=r"temperature: found 1.0, but .* scored at 2.0"):
        make_trainer(pipeline, tmp_path / "out", warm, temperature=1.0)
    with pytest.raises(ConfigError, match="eval: .* was scored for .*temperature=2.0"):
        make_trainer(pipeline, tmp_path / "out", cache, warm)
    with pytest.raises(ConfigError, match="unbiased needs temperature 2"):
        make_trainer(pipeline, tmp_path / "out", warm, tail="unbiased")
    unfinished = write_cache(
        tmp_path / "part", pipeline / "teacher", pipeline / "rollouts", shards=(0,)
    )
    part = TeacherCache.open(unfinished, allow_incomplete=True)
    with pytest.raises(ProvenanceError, match="incomplete-cache: found 1 unfinished or damaged"):
        make_trainer(pipeline, tmp_path / "out", part)
    with pytest.raises(ShardError, match="1 of 2 shards are unfinished"):
        make_trainer(pipeline, tmp_path / "out", part, folder=False)
    with pytest.raises(DataError, match="no column 'prompt_token_ids'"):
        make_trainer(pipeline, tmp_path / "out", to_dataset(cache).select_columns(["id"]))
    with pytest.raises(ConfigError, match="expected an OfflineDistillationConfig"):
        model = load_model(pipeline / "student", dtype="float32", device="cpu")
        OfflineDistillationTrainer(model, SFTConfig(str(tmp_path), **QUIET), cache)


def test_sharded_models_are_refused(pipeline, tmp_path, cache, monkeypatch):
    config = OfflineDistillationConfig(str(tmp_path), **QUIET)
    remedy = "expected one process per GPU; start with torchrun, each process with the whole"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=f"DeepSpeed by accelerate's settings: {remedy}"):
        OfflineDistillationTrainer(str(pipeline / "student"), config, cache)
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    config.fsdp = True
    with pytest.raises(ConfigError, match=f"fsdp: found True; {remedy}"):
        OfflineDistillationTrainer(str(pipeline / "student"), config, cache)


def test_outputs_are_refused(pipeline, tmp_path, cache):
    trainer = make_trainer(pipeline, tmp_path, cache)
    with pytest.raises(ConfigError, match="no logits are made"):
        trainer.compute_loss(trainer.model, {}, return_outputs=True)
    with pytest.raises(ConfigError, match="no logits are made; use evaluate"):
        trainer.predict(cache)


def test_the_how_to_page_runs(pipeline, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/how-to/trl.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)

    class OnCpu(OfflineDistillationConfig):
        def __init__(self, *args, **settings):
            settings |= {"max_steps": 1, "save_strategy": "no"}
            super().__init__(*args, **{**QUIET, **settings})

    monkeypatch.setattr("lopd.integrations.trl.OfflineDistillationConfig", OnCpu)
    for name in ("student", "cache"):
        (tmp_path / name).symlink_to(pipeline / name)
    monkeypatch.chdir(tmp_path)
    for example in examples:
        exec(compile(example, "trl.md", "exec"), {})
    assert len(examples) == 2 and (tmp_path / "scores.arrow").exists()
