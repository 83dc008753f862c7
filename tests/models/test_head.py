"""Losses run inside a model, compared with losses on the model's logits."""

import pytest
import torch
from helpers_heads import batch, dense_logits, grads
from helpers_training import SIZE, VOCAB, tiny_model, weights
from torch import nn

from lopd.errors import ModelError
from lopd.models.head import HeadOptions, check_head, check_trainable, head_options, run_with_loss

FAMILIES = ("qwen3", "qwen3-tied", "gemma2", "gemma3", "cohere", "granite", "phi", "opt")


@pytest.mark.parametrize("family", FAMILIES)
def test_value_and_every_gradient_equal_those_of_the_models_logits(family):
    model, inputs = tiny_model(family, spread=5.0), batch()
    labels = inputs["input_ids"].flatten()

    def nll(logits):
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels)

    expected = nll(model(**inputs).logits)
    found = run_with_loss(model, inputs, lambda *head: nll(dense_logits(*head)))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    expected_grads, found_grads = grads(model, expected), grads(model, found)
    assert expected_grads.keys() == found_grads.keys() == weights(model).keys()
    for name, value in expected_grads.items():
        assert torch.allclose(found_grads[name], value, rtol=1e-4, atol=1e-6), name
    check_head(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_rounding_is_not_refused(family, dtype):
    check_head(tiny_model(family, spread=3.0).to(dtype))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen3", HeadOptions()),
        ("gemma2", HeadOptions(softcap=3.0)),
        ("gemma3", HeadOptions(softcap=2.0)),
        ("cohere", HeadOptions(logit_scale=0.3)),
        ("granite", HeadOptions(logit_scale=0.25)),
    ],
)
def test_head_options_come_from_the_config(family, expected):
    assert head_options(tiny_model(family)) == expected


@pytest.mark.parametrize("value", [0, -1.0])
def test_a_scale_that_is_not_positive_is_refused(value):
    model = tiny_model("granite")
    model.config.logits_scaling = value
    with pytest.raises(ModelError, match="logits_scaling"):
        head_options(model)


def patch_logits(monkeypatch, model, change):
    forward = model.forward

    def changed(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    monkeypatch.setattr(model, "forward", changed)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits * 1.001,
        lambda logits: logits + torch.linspace(0, 1, VOCAB),
        lambda logits: 40 * torch.tanh(logits / 40),
        lambda logits: logits[..., :-1],
    ],
    ids=["scale", "bias", "softcap that small logits hide", "narrower"],
)
def test_a_head_with_an_unknown_transform_is_refused(monkeypatch, change):
    model = tiny_model("qwen3", spread=1e-3)
    patch_logits(monkeypatch, model, change)
    with pytest.raises(ModelError, match="Qwen3ForCausalLM"):
        check_head(model)


def test_a_config_that_hides_the_scale_is_refused():
    model = tiny_model("granite")
    model.config.get_text_config().model_type = "hyperclovax"  # its logits_scaling multiplies
    with pytest.raises(ModelError, match="does something"):
        check_head(model)


def test_check_head_does_not_change_mode_forwards_or_gradients():
    model = tiny_model().train()
    check_head(model)
    assert model.training
    assert "forward" not in vars(model) and "forward" not in vars(model.lm_head)
    assert all(p.grad is None for p in model.parameters())


def test_swaps_are_undone_when_the_loss_raises():
    model, inputs = tiny_model(), batch()
    before = model(**inputs).logits

    def instance_forward(hidden):
        return nn.functional.linear(hidden, model.lm_head.weight)

    model.lm_head.forward = instance_forward

    def broken(*head):
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        run_with_loss(model, inputs, broken)
    assert "forward" not in vars(model)
    assert vars(model.lm_head)["forward"] is instance_forward
    assert torch.equal(model(**inputs).logits, before)


def test_root_hooks_see_inputs_and_loss_and_the_backbone_has_no_cache():
    model, inputs, seen = tiny_model(), batch(), {}

    def root_hook(module, args, kwargs, output):
        seen["inputs"], seen["output"] = kwargs, output

    def backbone_hook(module, args, kwargs):
        seen["use_cache"] = kwargs["use_cache"]

    model.register_forward_hook(root_hook, with_kwargs=True)
    model.base_model.register_forward_pre_hook(backbone_hook, with_kwargs=True)
    loss = run_with_loss(model, inputs, lambda hidden, *rest: hidden.sum())
    assert seen["output"] is loss
    assert seen["inputs"].keys() == inputs.keys()
    assert seen["use_cache"] is False


def test_wrappers_and_strange_heads_are_refused():
    model = tiny_model()
    with pytest.raises(ModelError, match="Sequential: expected a transformers causal LM"):
        run_with_loss(nn.Sequential(model), batch(), dense_logits)
    with pytest.raises(ModelError, match="no backbone apart from an output head"):
        run_with_loss(model.base_model, batch(), dense_logits)
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ModelError, match="head is Sequential"):
        run_with_loss(model, batch(), dense_logits)
    copied = adapted(tiny_model(), ["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(ModelError, match="leave it out of modules_to_save"):
        run_with_loss(copied, batch(), dense_logits)


def test_layers_may_be_compiled_but_not_the_model_around_them():
    model, inputs = tiny_model(), batch()
    expected = run_with_loss(model, inputs, dense_logits)
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(run_with_loss(model, inputs, dense_logits), expected)
    with pytest.raises(ModelError, match=r"without torch_compile, and compile its layers"):
        run_with_loss(torch.compile(model, backend="eager"), inputs, dense_logits)


def adapted(model, targets, **changes):
    """A model with a LoRA whose B is not zero."""
    import peft

    settings = {"r": 3, "lora_alpha": 6, "target_modules": targets, **changes}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped


@pytest.mark.parametrize("family", ["qwen3", "qwen3-tied", "gemma2", "phi"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
def test_gradients_of_adapters_equal_those_from_the_models_logits(family, targets):
    model = adapted(tiny_model(family, spread=5.0), targets)
    inputs = batch()
    labels = inputs["input_ids"].flatten()

    def nll(logits):
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels)

    expected = nll(model(**inputs).logits)
    found = run_with_loss(model, inputs, lambda *head: nll(dense_logits(*head)))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    expected_grads, found_grads = grads(model, expected), grads(model, found)
    assert expected_grads.keys() == found_grads.keys()
    assert all("lora" in name for name in found_grads)
    for name, value in expected_grads.items():
        assert torch.allclose(found_grads[name], value, rtol=1e-4, atol=1e-6), name
    check_head(model)
    check_trainable(model)
    with model.disable_adapter():
        check_head(model)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"lora_dropout": 0.1}, "dropout 0.1"),
        ({"use_dora": True}, "DoRA"),
    ],
)
def test_head_adapters_other_than_plain_lora_are_refused(changes, match):
    model = adapted(tiny_model(), ["lm_head"], **changes)
    with pytest.raises(ModelError, match=match):
        run_with_loss(model, batch(), dense_logits)


def test_adapters_that_change_the_sequence_are_refused():
    import peft

    kind = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ModelError, match="PROMPT_TUNING"):
        check_trainable(peft.get_peft_model(tiny_model(), kind))


def test_autocast_casts_weight_and_bias_to_the_dtype_of_the_hidden_states():
    model = tiny_model("phi")  # its final LayerNorm returns float32; the hook makes it bf16
    model.base_model.final_layernorm.register_forward_hook(lambda *call: call[2].bfloat16())

    def dtypes(hidden, weight, bias, head):
        return hidden.dtype, weight.dtype, bias.dtype

    with torch.autocast("cpu", torch.bfloat16):
        assert run_with_loss(model, batch(), dtypes) == (torch.bfloat16,) * 3
    assert run_with_loss(model, batch(), dtypes)[1:] == (torch.float32,) * 2


BROAD = (
    *("llama", "mistral", "qwen2", "gemma", "olmo2", "starcoder2", "stablelm", "smollm3"),
    *("glm4", "phi3", "gpt_neox", "gpt2", "cohere2", "ministral", "exaone4", "seed_oss"),
)


@pytest.mark.parametrize("kind", BROAD)
def test_other_architectures_have_a_supported_head(kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    size = {**SIZE, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **size, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    check_trainable(model)
    check_head(model)
    loss = run_with_loss(model, batch(), lambda *head: dense_logits(*head).logsumexp(-1).sum())
    assert grads(model, loss).keys() == weights(model).keys()
    assert model.get_output_embeddings().weight.grad.abs().max() > 0
