"""Peak memory before a run: the parts against real runs, and settings that need less.

The first test checks that tensors are counted at all; the equalities depend on it.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers_training import SIZE, make_rollouts, make_scored, options, tiny_model

from benchmarks.tiny_families import tiny_config
from lopd.cli import main as lopd
from lopd.config.fields import parse_bytes
from lopd.config.objective import Objective
from lopd.config.plan import PlanConfig
from lopd.config.training import LoraOptions
from lopd.errors import ConfigError, MemoryPlanError, ModelError
from lopd.models.lora import add_lora
from lopd.stages.plan import GIB, main
from lopd.training.batch import Collator, SequenceDataset
from lopd.training.dry_run import (
    activation_bytes,
    dry_inputs,
    meta_model,
    optimizer_bytes,
    saved_bytes,
    state_bytes,
    storage_bytes,
)
from lopd.training.memory import (
    MemoryEstimate,
    MemoryPlanner,
    largest_batch,
    loss_bytes,
    planned_peak,
    proposals,
)
from lopd.training.trainer import LopdTrainer
from lopd_kernels.workspace import workspace_needed

LENGTH = 16
MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3")
    tiny_model().config.save_pretrained(path)
    return str(path)


def config(folder, **changes):
    defaults = {"model": folder, "gpu_memory": "1GiB", "batch_size": 4, "sequence_length": LENGTH}
    return PlanConfig(**{**defaults, **changes})


def real_inputs(batch):
    ids = torch.zeros(batch, LENGTH, dtype=torch.int64)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_saved_bytes_include_every_linear_layer(folder):
    """A lower bound by hand: the inputs of the linear layers of each row."""
    dry = meta_model(folder, "float32")
    one, two = (saved_bytes(dry, dry_inputs(b, LENGTH, packed=False))[0] for b in (2, 4))
    layers, width, hidden = SIZE["num_hidden_layers"], SIZE["intermediate_size"], 32
    least = 4 * 2 * LENGTH * (layers * (3 * width + 4 * hidden) + 2 * hidden)
    assert two - one > least


@pytest.mark.parametrize("family", ["qwen3", "qwen3-tied", "gemma2", "gemma3", "cohere", "phi"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_dry_run_saves_as_much_as_a_real_forward(tmp_path, family, batch, checkpointing):
    real = tiny_model(family).train()
    real.set_attn_implementation("eager" if family == "gemma2" else "sdpa")
    real.config.save_pretrained(tmp_path)
    expected = activation_bytes(real, real_inputs(batch), checkpointing)
    dry = meta_model(str(tmp_path), "float32")
    assert activation_bytes(dry, dry_inputs(batch, LENGTH, packed=False), checkpointing) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_counted(folder, dtype):
    pytest.importorskip("peft")
    lora = LoraOptions(lora_rank=4)
    real = add_lora(tiny_model().to(getattr(torch, dtype)), lora).train()
    dry = meta_model(folder, dtype, lora)
    for checkpointing in (False, True):
        expected = activation_bytes(real, real_inputs(3), checkpointing)
        assert expected == activation_bytes(dry, dry_inputs(3, LENGTH, packed=False), checkpointing)
    estimate = MemoryPlanner(dry).estimate(config(folder, dtype=dtype))
    assert estimate.gradients == sum(p.nbytes for p in real.parameters() if p.requires_grad)
    assert estimate.gradients < estimate.weights / 2


def test_checkpointing_counts_checkpoints_and_one_layer(tmp_path):
    settings = tiny_model().config
    sizes = []
    for layers in (2, 6):
        settings.num_hidden_layers, settings.layer_types = layers, ["full_attention"] * layers
        settings.save_pretrained(tmp_path)
        dry = meta_model(str(tmp_path), "float32")
        inputs = dry_inputs(3, LENGTH, packed=False)
        sizes.append([activation_bytes(dry, inputs, wanted) for wanted in (False, True)])
    (whole, checkpointed), (deep, deep_checkpointed) = sizes
    assert deep_checkpointed - checkpointed == 4 * 3 * LENGTH * 32 * 4  # a checkpoint a layer
    assert deep - whole > 5 * (deep_checkpointed - checkpointed)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "adafactor", "sgd"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_optimizer_state_equals_that_of_a_real_step(tmp_path, folder, optim, dtype):
    items = SequenceDataset(make_scored(make_rollouts(4)), vocab_size=SIZE["vocab_size"])
    args = options(max_steps=1, optim=optim).training_arguments(tmp_path)
    model = tiny_model().to(getattr(torch, dtype))
    trainer = LopdTrainer(model, args, Objective("reverse_kl"), items, Collator())
    trainer.train()
    real = state_bytes(trainer.optimizer.optimizer)
    assert optimizer_bytes(meta_model(folder, dtype), optim) == real
    assert (real == 0) is (optim == "sgd")


def test_eight_bit_state_follows_its_layout():
    large, small = torch.nn.Linear(64, 65, bias=False), torch.nn.Linear(63, 65, bias=False)
    assert optimizer_bytes(large, "adamw_8bit") == 2 * 4160 + 8 * 17
    assert optimizer_bytes(small, "adamw_8bit") == 8 * 4095


def test_a_tied_weight_is_counted_once(tmp_path):
    model = tiny_model("qwen3-tied")
    model.config.save_pretrained(tmp_path)
    estimate = MemoryPlanner(meta_model(str(tmp_path), "float32")).estimate(config(str(tmp_path)))
    assert estimate.weights == storage_bytes([*model.parameters(), *model.buffers()])
    assert estimate.gradients == sum(p.nbytes for p in model.parameters())


def test_a_pack_has_no_mask(folder):
    dry = meta_model(folder, "float32")
    padded, packed = (
        saved_bytes(dry, inputs)[0]
        for inputs in (dry_inputs(4, 64, packed=False), dry_inputs(1, 4 * 64, packed=True))
    )
    masks = SIZE["num_hidden_layers"] * 4 * 64**2 * 4  # as floats, in each layer
    positions = 2 * (4 * 64 - 64) * 16 * 4  # cos and sin, which a padded batch's rows share
    assert padded - packed == masks - positions


def test_the_loss_memory_respects_workspace_bytes(tmp_path):
    settings, folder = tiny_model().config, str(tmp_path)
    settings.vocab_size = 20000
    settings.save_pretrained(folder)
    dry = meta_model(folder, "bfloat16")
    free = loss_bytes(dry, config(folder, batch_size=64))
    bound = free // 2
    bounded = loss_bytes(dry, config(folder, batch_size=64, workspace_bytes=bound))
    assert bound / 2 < bounded <= bound
    with pytest.raises(ConfigError, match="workspace_bytes is 1000, .* need at least"):
        loss_bytes(dry, config(folder, workspace_bytes=1000))
    pg = config(folder, batch_size=64, objective="policy_gradient")
    assert loss_bytes(dry, pg) < free


@pytest.mark.parametrize("workspace", [None, 8 * MIB], ids=["free", "bounded"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_the_loss_memory_includes_the_gradient_of_the_hidden_states(tmp_path, frozen, workspace):
    model = tiny_model()
    model.config.vocab_size = 20000
    model.config.save_pretrained(tmp_path)
    dry = meta_model(str(tmp_path), "bfloat16").requires_grad_(not frozen)
    settings = config(str(tmp_path), batch_size=64, workspace_bytes=workspace)
    with_gradient, without = (
        workspace_needed(
            64 * LENGTH,
            20000,
            SIZE["hidden_size"],
            settings.k + 1,
            dtype=torch.bfloat16,
            hidden_grad=hidden_grad,
            weight_grad=not frozen,
            workspace_bytes=workspace,
        )
        for hidden_grad in (True, False)
    )
    assert loss_bytes(dry, settings) == with_gradient > without


class Invented(MemoryPlanner):
    """Estimates by a rule instead of dry runs."""

    can_checkpoint = True

    def __init__(self):
        super().__init__(torch.nn.Identity())

    def estimate(self, config):
        tokens = config.rows[0] * config.rows[1]
        state = {"adafactor": 1, "adamw_8bit": 40}.get(config.optim, 100) * MIB
        layers = 1 if config.gradient_checkpointing else 10
        loss, activations = config.workspace or GIB, tokens * layers * MIB
        return MemoryEstimate(100 * MIB, 100 * MIB, state, loss, activations)


@pytest.mark.parametrize(
    ("memory", "changes", "taken"),
    [
        (1400, {}, ["gradient_checkpointing"]),
        (800, {}, ["gradient_checkpointing", "workspace_bytes"]),
        (470, {}, ["gradient_checkpointing", "workspace_bytes", "batch_size"]),
        (
            470,
            {"max_tokens_per_batch": 64},
            ["gradient_checkpointing", "workspace_bytes", "max_tokens_per_batch"],
        ),
        (395, {}, ["gradient_checkpointing", "workspace_bytes", "optim"]),
        (350, {}, ["gradient_checkpointing", "workspace_bytes", "optim", "batch_size"]),
        (100, {}, ["gradient_checkpointing", "workspace_bytes", "optim"]),
    ],
)
def test_proposals_come_in_order_and_end_with_the_first_that_fits(folder, memory, changes, taken):
    planner, asked = Invented(), config(folder, **changes)
    found = list(proposals(planner, asked, memory * MIB))
    fits = [planner.estimate(each).total <= memory * MIB for each in found]
    assert fits == [*[False] * (len(found) - 1), memory > 300]
    changed = [name for name in vars(asked) if getattr(found[-1], name) != getattr(asked, name)]
    assert sorted(changed) == sorted(taken)


@pytest.mark.parametrize("packed", [False, True])
def test_largest_batch_is_the_largest_that_fits(folder, packed):
    planner = Invented()
    asked = config(
        folder,
        batch_size=100,
        sequence_length=10,
        gradient_checkpointing=True,
        max_tokens_per_batch=1000 if packed else None,
    )
    found = largest_batch(planner, asked, (1324 + 373) * MIB)
    if packed:
        assert found == replace(asked, max_tokens_per_batch=373)
    else:
        assert found == replace(asked, batch_size=37)
    assert largest_batch(planner, asked, (1324 + 9) * MIB) is None


def test_the_plan_prints_whether_the_run_fits(folder, capsys):
    main(config(folder))
    assert "fits, " in capsys.readouterr().out
    total = MemoryPlanner(meta_model(folder, "float32")).estimate(config(folder)).total
    with pytest.raises(MemoryPlanError, match="needs .* use a larger GPU"):
        main(config(folder, gpu_memory="100kB"))
    table = capsys.readouterr().out
    assert ["total", f"{total / GIB:.2f}", "GiB"] in [line.split() for line in table.splitlines()]
    assert "--gradient-checkpointing" in table
    main(config(folder, gpu_memory=str(total), reserve=0.0))
    with pytest.raises(MemoryPlanError, match="that a reserve of 5% leaves of"):
        main(config(folder, gpu_memory=str(total)))


@pytest.mark.parametrize(("memory", "code"), [("8GiB", 0), ("100kB", 1), ("much", 2)])
def test_the_exit_code_says_whether_the_run_fits(folder, memory, code, capsys):
    words = ["plan", "--model", folder, "--gpu-memory", memory, "--sequence-length", "16"]
    assert lopd(words) == code


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size: found 0"),
        ({"max_tokens_per_batch": 8}, "max_tokens_per_batch: found 8; expected at least"),
        ({"reserve": 1.0}, "reserve: found 1.0"),
        ({"gpu_memory": "24 apples"}, "gpu_memory: found '24 apples'"),
        ({"workspace_bytes": "0"}, "workspace_bytes: found '0'"),
        ({"dtype": "float16"}, "float16"),
    ],
)
def test_settings_are_refused(folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(folder, **changes)


def test_an_unknown_optimizer_and_a_model_that_needs_values_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="optim: found 'adam'"):
        main(config(folder, optim="adam"))
    tiny_config("jetmoe").save_pretrained(tmp_path)  # splits tokens by counts of its router
    with pytest.raises(ModelError, match="JetMoeForCausalLM: its memory cannot be planned"):
        main(config(str(tmp_path)))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 << 30),
        ("80GB", 80 * 10**9),
        ("24000MiB", 24000 << 20),
        ("1.5gib", 3 << 29),
        (" 2 TB ", 2 * 10**12),
        ("512", 512),
        (4096, 4096),
        ("7B", 7),
        ("24G", 24 << 30),
        ("500m", 500 << 20),
    ],
)
def test_valid_sizes_are_parsed(text, size):
    assert parse_bytes("x", text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1e9", "24Gib/s", "0", 0, "nan"])
def test_invalid_sizes_are_refused(text):
    with pytest.raises(ConfigError, match="x: found '.*'; expected a size"):
        parse_bytes("x", text)


def a_run(**changes):
    data = SequenceDataset(make_scored(make_rollouts(6)))
    objective = Objective(changes.pop("objective", "reverse_kl"))
    longest = max(len(item.rollout.tokens) for item in data)
    return options(**changes), SimpleNamespace(train_dataset=data, objective=objective), longest


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 3, "optim": "adafactor"},
        {"max_tokens_per_batch": 40, "gradient_checkpointing": True, "objective": "cross_entropy"},
        {"lora_rank": 2, "lora_targets": "q_proj", "workspace_bytes": "1MiB"},
    ],
    ids=str,
)
def test_the_planned_peak_of_a_run_equals_that_of_lopd_plan(folder, changes):
    settings, trainer, longest = a_run(**changes)
    changes.pop("objective", None)
    asked = config(folder, **{"batch_size": 4, "sequence_length": longest, "k": 4, **changes})
    if trainer.objective.name == "cross_entropy":
        asked = replace(asked, objective="policy_gradient")
    expected = MemoryPlanner(meta_model(folder, "float32", asked)).estimate(asked).total
    assert planned_peak(settings, trainer, folder, k=4) == expected


def test_runs_that_cannot_be_planned_have_no_planned_peak(folder, tmp_path, capsys):
    settings, trainer, _ = a_run(mixed_precision="bf16")
    assert planned_peak(settings, trainer, folder, k=4) is None
    settings, trainer, _ = a_run()
    assert planned_peak(settings, trainer, str(tmp_path), k=4) is None
    assert "the peak memory cannot be estimated (" in capsys.readouterr().err


def test_a_number_of_gibibytes_without_its_unit_is_refused(folder):
    with pytest.raises(
        ConfigError, match="gpu_memory: found '24', a number of bytes; expected .* 24GiB"
    ):
        config(folder, gpu_memory="24")


def test_a_plan_says_what_it_assumes(folder, capsys):
    main(config(folder, gpu_memory="24G"))
    expected = (
        "planned for 4 x 16 tokens a micro-batch, all with loss (reverse_kl with lists of 64)"
    )
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_on_fused_experts_are_planned(dtype, tmp_path):
    tiny_config("qwen3_moe").save_pretrained(tmp_path)
    plain, adapted = (
        MemoryPlanner(meta_model(str(tmp_path), dtype, lora)).estimate(
            config(str(tmp_path), dtype=dtype, **({} if lora is None else {"lora_rank": 4}))
        )
        for lora in (None, config(str(tmp_path), dtype=dtype, lora_rank=4))
    )
    assert adapted.activations > 0 and 0 < adapted.gradients < plain.gradients


@pytest.mark.parametrize("kind", ["opt", "gpt2", "qwen3_moe", "deepseek_v3", "falcon_h1"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_families_whose_masks_and_experts_need_care_are_planned(kind, dtype, tmp_path):
    tiny_config(kind).save_pretrained(tmp_path)
    planner = MemoryPlanner(meta_model(str(tmp_path), dtype))
    for batch_size in (1, 3):
        estimate = planner.estimate(config(str(tmp_path), dtype=dtype, batch_size=batch_size))
        assert estimate.activations > 0
