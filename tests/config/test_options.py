"""Settings of a training run and of its objective: what is refused, and the error messages."""

import pytest
from helpers_training import make_rollouts, make_scored, tiny_model
from transformers import TrainingArguments

from lopd.config.objective import Objective
from lopd.config.report import ReportConfig
from lopd.config.rollout import RolloutConfig
from lopd.config.score import ScoreConfig
from lopd.config.training import TrainOptions
from lopd.config.verify import VerifyConfig
from lopd.errors import ConfigError
from lopd.training.batch import Collator
from lopd.training.step import step


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "kl"}, "objective: found 'kl'"),
        ({"tail": "clip"}, "tail: found 'clip'"),
        ({"name": "jsd", "beta": 1.0}, "beta: found 1.0"),
        ({"name": "jsd", "beta": float("nan")}, "beta: found nan"),
        ({"beta": 0.5}, "beta: reverse_kl has no mixture"),
        ({"name": "policy_gradient", "beta": 0.3}, "beta: policy_gradient has no mixture"),
        ({"temperature": float("inf")}, "temperature: found inf"),
        ({"temperature": 0.0}, "temperature: found 0.0"),
        ({"advantage_clip": 1.0}, "use policy_gradient"),
        ({"name": "policy_gradient", "advantage_clip": 0.0}, "advantage_clip: found 0.0"),
        (
            {"name": "policy_gradient", "advantage_clip": float("nan")},
            "advantage_clip: found nan",
        ),
        ({"name": "policy_gradient", "tail": "truncate"}, "policy_gradient has none"),
    ],
)
def test_objective_refuses(changes, message):
    with pytest.raises(ConfigError, match=message):
        Objective(**{"name": "reverse_kl", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 0}, "max_steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"warmup_steps": 4, "max_steps": 3}, "warmup_steps: found 4; the run ends at max_steps=3"),
        ({"adam_beta1": 1.0}, "adam_beta1: found 1.0"),
        ({"adam_beta2": -0.1}, "adam_beta2: found -0.1"),
        ({"adam_epsilon": 0.0}, "adam_epsilon: found 0.0"),
        ({"min_lr_ratio": 1.5, "lr_scheduler_type": "cosine_with_min_lr"}, "min_lr_ratio"),
        ({"seed": -1}, "seed: found -1"),
        ({"seed": 2**32}, "seed: found 4294967296"),
        ({"device": "mps"}, "device: found 'mps'"),
        ({"device": "meta"}, "device: found 'meta'"),
        ({"report_to": "wandbb"}, "report_to: found 'wandbb'; expected one of none,"),
        ({"dtype": "float16"}, "loss scaling"),
        ({"dtype": "int8"}, "dtype"),
        ({"loss_aggregation": "mean"}, "loss_aggregation"),
        ({"min_lr_ratio": 0.1}, "cosine does not use it"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr_ratio: found 0.0"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, "constant_with_warmup"),
        ({"num_epochs": 2.0, "max_steps": 5}, "num_epochs: found 2.0, which has no effect"),
        ({"lora_alpha": 16.0}, "lora_alpha: found 16.0, which has no effect: lora_rank is 0"),
        ({"lora_dropout": 0.1}, "lora_dropout: found 0.1, which has no effect: lora_rank is 0"),
        ({"optim": "sgd", "adam_beta2": 0.5}, "adam_beta2: found 0.5, .* sgd does not take it"),
        ({"optim": "adafactor", "adam_epsilon": 0.1}, "adam_epsilon: .* adafactor does not take"),
        ({"save_every": 0, "save_total_limit": 5}, "save_total_limit: found 5, .* save_every is 0"),
        ({"lora_targets": "q_proj"}, "lora_targets: found 'q_proj', which has no effect"),
    ],
)
def test_options_refuse(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainOptions(**changes)


NUMBERS = [
    *("num_epochs", "learning_rate", "min_lr_ratio", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "weight_decay", "max_grad_norm"),
]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_options_refuse_numbers_out_of_range(name, value):
    with pytest.raises(ConfigError, match=f"{name}: found {value}; expected"):
        TrainOptions(**{name: value})


def test_no_run_has_more_epochs_than_it_could_ever_make():
    with pytest.raises(
        ConfigError, match=r"num_epochs: found 1e\+300; expected a number in \(0, 1"
    ):
        TrainOptions(num_epochs=1e300)


def test_options_accept_the_ends_of_their_ranges():
    zero = {"weight_decay": 0, "max_grad_norm": 0, "adam_beta1": 0.0, "warmup_steps": 0}
    assert TrainOptions(**zero, seed=2**32 - 1).seed == 2**32 - 1
    assert TrainOptions(warmup_steps=3, max_steps=3).warmup_steps == 3
    assert TrainOptions(warmup_steps=3).max_steps == -1


def test_several_greedy_answers_are_refused():
    paths = {"student": "s", "prompts": "p", "out": "o", "device": "cpu"}
    with pytest.raises(ConfigError, match="num_samples: found 4 with temperature 0, at which all"):
        RolloutConfig(**paths, temperature=0.0, num_samples=4)
    with pytest.raises(ConfigError, match="top_p: found 0.9, which has no effect: temperature 0"):
        RolloutConfig(**paths, temperature=0.0, top_p=0.9)
    assert RolloutConfig(**paths, temperature=0.0).num_samples == 1


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (RolloutConfig, {"student": "s", "prompts": "p", "batch_size": 8}, "batch_size: found 8"),
        (ScoreConfig, {"teacher": "t", "rollouts": "r", "tokens_per_batch": 9}, "tokens_per_batch"),
    ],
)
def test_what_vllm_decides_itself_is_refused(config, changes, message):
    with pytest.raises(ConfigError, match=f"{message}.*, which has no effect: vllm forms its own"):
        config(out="o", engine="vllm", **changes)


def test_the_student_of_a_list_is_scored_in_batches_beside_vllm():
    settings = {"teacher": "t", "rollouts": "r", "out": "o", "engine": "vllm"}
    assert ScoreConfig(**settings, tokens_per_batch=9, support="student").tokens_per_batch == 9


@pytest.mark.parametrize("name", ["tokens_per_batch", "seed", "max_noise_share", "engine"])
def test_settings_of_a_rescore_are_refused_without_one(name):
    value = {"engine": "vllm", "max_noise_share": 0.5}.get(name, 9)
    with pytest.raises(ConfigError, match=f"{name}: found .*, which has no effect: without rescor"):
        VerifyConfig(path="c", **{name: value})
    models = {"teacher": "t", "student": "s"}
    assert getattr(VerifyConfig(path="c", rescore=1, **models, **{name: value}), name) == value


def test_settings_of_answers_are_refused_in_a_report_without_them():
    with pytest.raises(ConfigError, match="list_length: found 9, which has no effect: answers is"):
        ReportConfig(runs="r", answers=0, list_length=9)
    assert ReportConfig(runs="r", answers=1, list_length=9).list_length == 9


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    from transformers.integrations import integration_utils

    found = ["tensorboard"]
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: found)
    assert TrainOptions(report_to="tensorboard").report_to == "tensorboard"
    with pytest.raises(ConfigError, match="report_to: 'wandb' is not installed"):
        TrainOptions(report_to="wandb")


def test_beta_defaults_to_half_for_jsd_and_to_none_otherwise():
    assert Objective("jsd").beta == 0.5
    assert Objective("jsd") == Objective("jsd", beta=0.5) != Objective("jsd", beta=0.3)
    assert Objective("reverse_kl").beta is None
    model, batch = tiny_model(), Collator()(make_scored(make_rollouts(4)))
    half, less = (step(model, batch, Objective("jsd", beta=b), 1.0)[0].item() for b in (None, 0.1))
    assert half != pytest.approx(less, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "adam"}, "optim: found 'adam'; expected one of adamw_torch,"),
        ({"optim": "galore_adamw"}, "optim: 'galore_adamw' cannot be used here"),
        ({"workspace_bytes": "2 pies"}, "workspace_bytes: found '2 pies'"),
        ({"workspace_bytes": 0}, "workspace_bytes: found '0'"),
        ({"mixed_precision": "fp16"}, "mixed_precision: found 'fp16'"),
        ({"mixed_precision": "bf16", "dtype": "bfloat16"}, "it is for float32 weights"),
    ],
)
def test_options_of_memory_refuse(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainOptions(**changes)


def test_options_of_memory_reach_the_trainer(tmp_path):
    args = TrainOptions(device="cpu").training_arguments(tmp_path)
    assert (args.optim, args.bf16) == (TrainingArguments(output_dir="x", use_cpu=True).optim, False)
    changed = TrainOptions(device="cpu", optim="adafactor", mixed_precision="bf16")
    args = changed.training_arguments(tmp_path)
    assert (args.optim, args.bf16) == ("adafactor", True)
    assert TrainOptions().workspace is None
    assert TrainOptions(workspace_bytes="1.5KiB").workspace == 1536


@pytest.mark.parametrize("name", ["cross_entropy", "policy_gradient", "reverse_kl", "jsd"])
def test_workspace_bytes_bounds_every_loss(name):
    model, batch = tiny_model(), Collator()(make_scored(make_rollouts(4)))
    with pytest.raises(ValueError, match="workspace_bytes is 10, .* need at least"):
        step(model, batch, Objective(name, workspace_bytes=10), 1.0)
    free, bounded = (
        step(model, batch, Objective(name, workspace_bytes=bound), 1.0)[0]
        for bound in (None, 50_000)
    )
    assert bounded.item() == pytest.approx(free.item(), rel=1e-6)
    assert Objective(name, workspace_bytes=7).held_out.workspace_bytes == 7
