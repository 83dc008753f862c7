"""FLOPs compared with a count of the operators, and the utilisation."""

import pytest
import torch
from helpers_artefacts import logged
from helpers_training import VOCAB, make_rollouts, make_scored, options, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.tiny_families import tiny_model as tiny_family
from lopd.config.objective import Objective
from lopd.config.training import LoraOptions
from lopd.models.flops import FlopsMeter, mfu, pairs, peak_flops, size_of, step_flops
from lopd.models.head import run_with_loss
from lopd.models.lora import add_lora
from lopd.training.batch import Collator, SequenceDataset
from lopd.training.logging import line
from lopd.training.trainer import LopdTrainer

LENGTH = 12


def counted(model):
    """FLOPs of a dense forward and backward over one sequence, attention in full."""
    model.set_attn_implementation("eager")
    ids = torch.zeros(1, LENGTH, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with FlopCounterMode(display=False) as counter:
        run_with_loss(
            model.train(), inputs, lambda h, w, b, _: torch.nn.functional.linear(h, w, b).sum()
        ).backward()
    return counter.get_total_flops()


def uncausal(size, loss_tokens=LENGTH):
    """Like `step_flops`, with every pair of positions."""
    pairs_left = len(size.windows) * pairs(LENGTH, None)
    missing = len(size.windows) * LENGTH**2 - pairs_left
    return step_flops(size, [LENGTH], loss_tokens) + 12 * size.attention * missing


@pytest.mark.parametrize("family", ["qwen3", "qwen3-tied", "granite", "phi"])
def test_flops_equal_those_of_the_operators(family):
    model = tiny_model(family)
    rotary = 3 * LENGTH * 16 * 2  # positions times frequencies, a product without parameters
    assert uncausal(size_of(model)) == pytest.approx(counted(model), abs=rotary)


def test_frozen_matrices_count_no_weight_gradient():
    pytest.importorskip("peft")
    model = add_lora(tiny_model("qwen3"), LoraOptions(lora_rank=4))
    size = size_of(model)
    assert size.trained < size.matrices and not size.head_trained
    assert uncausal(size) == pytest.approx(counted(model), rel=0.005)


def test_the_head_counts_for_loss_tokens_only():
    size = size_of(tiny_model())
    more = step_flops(size, [LENGTH], 5) - step_flops(size, [LENGTH], 4)
    assert more == 6 * VOCAB * 32


def mixture(active):
    from transformers import MixtralConfig, MixtralForCausalLM

    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 4,
    }
    return MixtralForCausalLM(MixtralConfig(**settings, num_experts_per_tok=active))


def test_only_active_experts_count():
    sizes = [size_of(mixture(active)) for active in (1, 3)]
    assert sizes[1].matrices - sizes[0].matrices == 2 * 3 * 32 * 48


@pytest.mark.parametrize("kind", ["mamba", "gemma4_text"])
def test_unknown_attention_gives_no_utilisation(kind):
    assert size_of(tiny_family(kind)) is None


def test_unknown_experts_give_no_utilisation(monkeypatch):
    monkeypatch.setattr("lopd.models.architecture.EXPERTS", ())
    model = mixture(1)
    assert size_of(model) is None
    meter = FlopsMeter(model, torch.device("cpu"))
    batch = Collator()(make_scored(make_rollouts(2)))
    assert meter.count([batch]) == 0 and meter.read(1.0) == {}


@pytest.mark.parametrize("window", [None, 1, 4, 12, 50])
def test_pairs_of_a_mask(window):
    q, k = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    mask = (k <= q) if window is None else (k <= q) & (q - k < window)
    assert pairs(12, window) == mask.sum().item()


def test_peaks_are_of_the_device_and_dtype():
    h100 = "NVIDIA H100 80GB HBM3"
    assert peak_flops(h100, torch.bfloat16) == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", torch.bfloat16) == 756e12
    assert peak_flops("NVIDIA L40S", torch.bfloat16) == 362e12
    assert peak_flops(h100, torch.float32) == pytest.approx(66.9e12)
    assert peak_flops("cpu", torch.float32) is peak_flops(h100, torch.float64) is None
    torch.set_float32_matmul_precision("high")
    try:
        assert peak_flops(h100, torch.float32) is None
    finally:
        torch.set_float32_matmul_precision("highest")


def test_utilisation_is_of_all_devices():
    assert mfu(flops=30.0, seconds=2.0, peak=10.0, devices=3) == 0.5
    meter = FlopsMeter(tiny_model(), torch.device("cpu"), devices=2)
    meter.peak = 1e6
    batch = Collator()(make_scored(make_rollouts(4)))
    flops = meter.count([batch]) + meter.count([batch])
    tokens = 2 * len(batch["labels"])
    # two devices with the same work: twice the tokens, in 0.5 s
    assert meter.read(2 * tokens / 0.5) == {"mfu": pytest.approx(flops / (0.5 * 1e6))}
    assert meter.read(1.0) == {}


def test_padding_and_packing_count_the_same():
    items = make_scored(make_rollouts(4))
    meter = FlopsMeter(tiny_model(), torch.device("cpu"))
    assert meter.count([Collator()(items)]) == meter.count([Collator(packed=True)(items)])


def test_a_run_logs_its_utilisation(tmp_path, capsys):
    items = SequenceDataset(make_scored(make_rollouts(8)), vocab_size=VOCAB)
    args = options(max_steps=4, log_every=2).training_arguments(tmp_path)
    trainer = LopdTrainer(tiny_model(), args, Objective("reverse_kl"), items, Collator())
    trainer.meter.peak = 1e9
    trainer.train()
    lines = [text for text in capsys.readouterr().err.splitlines() if text.startswith("step ")]
    assert [text.split("  ")[0] for text in lines] == ["step 2/4", "step 4/4"]
    assert all("  mfu " in text and " tok/s" in text for text in lines)
    records = logged(tmp_path)
    assert all(record["mfu"] > 0 and "peak_mib" not in record for record in records)
    lengths = [len(item.rollout.tokens) for item in make_scored(make_rollouts(8))]
    epochs = 2 * step_flops(trainer.meter.size, lengths, _loss_tokens(items))
    assert trainer.state.total_flos == pytest.approx(epochs)


def _loss_tokens(items):
    return sum(len(Collator()(items.__getitems__([i]))["labels"]) for i in range(len(items)))


def test_a_log_line_has_the_known_figures():
    logs = {"loss": 0.123456, "tokens_per_second": 12345.6, "mfu": 0.4123, "peak_mib": 30123.4}
    expected = "step 3/9  loss 0.1235  12,346 tok/s  mfu 41.2%  peak 30,123 MiB"
    assert line(3, 9, logs) == expected
    assert line(3, 9, {"loss": 2.0, "grad_norm": 0.5}) == "step 3/9  loss 2  grad 0.5"
