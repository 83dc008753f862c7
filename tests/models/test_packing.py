"""Packs have the hidden states, losses and gradients of their separate sequences."""

import pytest
import torch
from helpers_training import largest_difference, make_rollouts, make_scored, tiny_model, tiny_window

from benchmarks.tiny_families import tiny_model as family_model
from lopd.config.objective import Objective
from lopd.errors import ConfigError, ModelError
from lopd.models import packing as attention
from lopd.models.packing import check_packing, pack_attention, varlen_attention
from lopd.training.batch import Collator
from lopd.training.step import model_inputs, step

FAMILIES = ["qwen3", "qwen3-tied", "gemma2", "gemma3", "cohere", "granite", "phi", "opt"]


def gradients(model, batches, objective=None):
    model.zero_grad()
    num_items = sum(batch["row_weights"].sum().item() for batch in batches)
    total = 0.0
    for batch in batches:
        loss, _ = step(model, batch, objective or Objective("reverse_kl"), num_items)
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_padded(family, checkpointing):
    model, items = tiny_model(family), make_scored(make_rollouts(7))
    loss, expected = gradients(model, [Collator()(items)])  # sdpa with a mask of padding
    assert pack_attention(model) == "sdpa"
    check_packing(model, "sdpa")
    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable()
    pack = Collator(packed=True)
    assert pack(items)["input_ids"].shape == (1, sum(len(i.rollout.tokens) for i in items))
    for batches in ([items], [items[:3], items[3:]]):
        again, found = gradients(model, [pack(part) for part in batches])
        assert again == pytest.approx(loss, rel=1e-5)
        assert (
            largest_difference(found, expected)
            < 2e-6 * max(g.abs().max().item() for g in expected.values()) + 1e-6
        )
    again, found = gradients(model, [Collator()(items)])  # padded batches still work
    assert again == pytest.approx(loss, rel=1e-5)
    assert largest_difference(found, expected) < 1e-5


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "mistral"])
def test_long_sequences_attend_only_within_the_window(family):
    if family == "mistral":
        model = tiny_window()
    else:
        model = tiny_model(family)
        model.config.sliding_window = 4
        model.config.layer_types = ["sliding_attention", "full_attention"]
        reference = type(model)(model.config).eval()
        reference.load_state_dict(model.state_dict())
        model = reference
    ids = torch.arange(20)[None] % 40
    lengths = (13, 7)
    alone = [model(part[None]).logits[0] for part in ids[0].split(lengths)]
    wide = model(ids[:, :13], attention_mask=None).logits
    model.config.sliding_window = 4
    pack_attention(model)
    batch = {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "sequence_lengths": lengths,
    }
    found = model(**model_inputs(batch), use_cache=False).logits[0]
    for logits, expected in zip(found.split(lengths), alone, strict=True):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(ids[:, :13]).logits, wide, rtol=1e-4, atol=1e-5)


def test_generation_still_works():
    model = tiny_model()
    prompt = torch.tensor([[0, 3, 4, 5], [1, 2, 3, 4]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    before = model.generate(prompt, attention_mask=mask, **options)
    pack_attention(model)
    assert torch.equal(model.generate(prompt, attention_mask=mask, **options), before)


def test_one_token_after_cached_ones_needs_no_mask():
    """Generation of rows without padding: transformers leaves the mask out."""
    model = tiny_model()
    ids = torch.tensor([[1, 2, 3, 4, 5]])

    def last_logits():
        past = model(ids[:, :4], use_cache=True).past_key_values
        mask = torch.ones_like(ids)
        return model(ids[:, 4:], attention_mask=mask, past_key_values=past).logits

    with torch.no_grad():
        expected = last_logits()
        pack_attention(model)
        torch.testing.assert_close(last_logits(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layers", [(0, 1), (1,), (17,)], ids=["all", "one of two", "one of 28"])
def test_a_layer_that_ignores_the_boundaries_is_detected(layers, dtype):
    import transformers as t

    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 90, "head_dim": 16}
    config = t.Qwen3Config(
        **size,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=28 if layers == (17,) else 2,
    )
    model = t.Qwen3ForCausalLM(config).to(dtype)
    pack_attention(model)
    check_packing(model, "sdpa")
    for number in layers:
        layer = model.model.layers[number].self_attn
        forward = layer.forward

        def deaf(*args, forward=forward, **kwargs):
            kwargs.pop("sequence_lengths", None)
            return forward(*args, **kwargs)

        layer.forward = deaf
    with pytest.raises(
        ModelError, match=r"in a pack its hidden states differ by .* cannot be packed"
    ):
        check_packing(model, "sdpa")


def test_packs_are_checked_beyond_the_window(monkeypatch):
    """An error that only packs longer than the window show."""
    model = tiny_window()
    model.config.sliding_window = 14
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 14
    pack_attention(model)
    check_packing(model, "sdpa")
    monkeypatch.setattr(attention, "_band", lambda query, window: None)
    check_packing(model, "sdpa", longest=14)
    with pytest.raises(ModelError, match="cannot be packed"):
        check_packing(model, "sdpa")


def test_packs_are_checked_under_autocast():
    model = tiny_model()
    pack_attention(model)
    with torch.autocast("cpu", torch.bfloat16):
        check_packing(model, "sdpa")


@pytest.mark.parametrize("path", ["varlen", "flash_attention_2", "flash_attention_3"])
def test_attention_that_needs_a_gpu_is_refused_on_a_cpu(path):
    with pytest.raises(
        ConfigError, match=f"attention: found '{path}'; it needs CUDA and a 16-bit dtype"
    ):
        pack_attention(tiny_model(), path)
    with pytest.raises(ConfigError, match="found 'fast'; expected one of auto"):
        pack_attention(tiny_model(), "fast")


def test_a_varlen_without_a_window_is_not_used(monkeypatch):
    import torch.nn.attention.varlen as varlen

    device, dtype = torch.device("cuda"), torch.bfloat16
    assert attention._unavailable("varlen", device, dtype) == ""
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, is_causal=False: None)
    assert "no varlen_attn with a window" in attention._unavailable("varlen", device, dtype)


@pytest.mark.parametrize("window", [None, 4])
def test_varlen_calls_torch_with_the_same_attention(monkeypatch, window):
    """A dense replacement checks the call; torch's kernel needs a GPU."""

    def dense(q, k, v, ends_q, ends_k, longest_q, longest_k, *, scale, window_size):
        assert torch.equal(ends_q, ends_k) and longest_q == longest_k == 9
        assert ends_q.dtype == torch.int32 and window_size[1] == 0
        parts = torch.bucketize(torch.arange(len(q)), ends_q[1:].long(), right=True)
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        seen = (parts[:, None] == parts) & (distance >= 0)
        if window_size[0] >= 0:
            seen &= distance <= window_size[0]
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)

    import torch.nn.attention.varlen as varlen

    monkeypatch.setattr(varlen, "varlen_attn", dense)
    from lopd.models.packing import pack_kwargs, sdpa_attention

    class Module:
        num_key_value_groups = 2
        is_causal = True

    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 14, 8), torch.randn(1, 2, 14, 8), torch.randn(1, 2, 14, 8)
    options = {"scaling": 0.3, "sliding_window": window, **pack_kwargs((5, 9), "cpu")}
    found, _ = varlen_attention(Module(), query, key, value, None, **options)
    expected, _ = sdpa_attention(Module(), query, key, value, None, **options)
    torch.testing.assert_close(found, expected)
    with torch.autocast("cpu", torch.bfloat16):  # float32 norms around 16-bit layers
        found, _ = varlen_attention(Module(), query, key, value.bfloat16(), None, **options)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


def test_noise_does_not_raise_the_bound_without_end(monkeypatch):
    """A model that depends on its neighbours does so in padded batches too."""
    model = tiny_model()
    pack_attention(model)
    forward = model.model.forward

    def leaky(input_ids=None, **kwargs):
        outputs = forward(input_ids=input_ids, **kwargs)
        together = len(input_ids) > 1 or "sequence_lengths" in kwargs
        outputs.last_hidden_state = outputs.last_hidden_state * (1.5 if together else 1.0)
        return outputs

    monkeypatch.setattr(model.model, "forward", leaky)
    with pytest.raises(ModelError, match=r"differ by 0\.5 .*expected at most 0\.0003"):
        check_packing(model, "sdpa")


def test_a_pack_that_the_model_cannot_take_is_refused_with_a_sentence():
    model = family_model("deepseek_v32")
    pack_attention(model)
    with pytest.raises(ModelError, match=r"fails on a pack \(TypeError: .*cannot be packed, omit"):
        check_packing(model, "sdpa")


def test_attention_with_sinks_is_not_replaced():
    with pytest.raises(ModelError, match="GptOssForCausalLM: its attention is its own"):
        pack_attention(family_model("gpt_oss"))


def test_soft_caps_hold_in_packs():
    model = family_model("gemma2")
    model.set_attn_implementation("eager")
    ids = torch.arange(20)[None] % 40
    alone = [model(part[None]).logits[0] for part in ids[0].split((13, 7))]
    pack_attention(model)
    batch = {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(n) for n in (13, 7)])[None],
        "sequence_lengths": (13, 7),
    }
    found = model(**model_inputs(batch), use_cache=False).logits[0]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-5)
