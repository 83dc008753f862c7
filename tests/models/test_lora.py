"""Adapters: training, merging, and refusals."""

import copy
import sys

import pytest
import torch
from helpers_training import make_rollouts, make_scored, tiny_model, tiny_moe, weights

from benchmarks.tiny_families import tiny_config
from benchmarks.tiny_families import tiny_model as family_model
from lopd.config.objective import Objective
from lopd.config.training import LoraOptions
from lopd.errors import ConfigError, ModelError
from lopd.models.head import check_head, check_trainable
from lopd.models.lora import add_lora, merged
from lopd.training.batch import Collator
from lopd.training.dry_run import meta_model
from lopd.training.step import step


def lora(**changes):
    return LoraOptions(
        **{"lora_rank": 3, "lora_alpha": 6.0, "lora_targets": "q_proj,v_proj", **changes}
    )


def train(model, steps=3):
    batch = Collator()(make_scored(make_rollouts(4)))
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(chosen, lr=1.0)
    losses = []
    for _ in range(steps):
        loss, _ = step(model, batch, Objective("reverse_kl"), float(len(batch["labels"])))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("qwen3", "all-linear"),
        ("qwen3-tied", "q_proj, v_proj"),
        ("qwen3", "q_proj,lm_head"),
        ("gemma2", "all-linear"),
        ("phi", "q_proj,lm_head"),
    ],
)
def test_training_changes_only_the_adapters_and_merging_keeps_the_outputs(family, targets):
    model = tiny_model(family, spread=3.0)
    before = weights(model)
    adapted = add_lora(model, lora(lora_targets=targets))
    check_trainable(adapted)
    check_head(adapted)
    losses = train(adapted)
    assert losses[-1] < losses[0] - 1e-3
    base = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if "lora" not in n}
    assert base.keys() == before.keys()
    assert all(torch.equal(base[name], value) for name, value in before.items())
    adapted.train()
    plain = merged(copy.deepcopy(adapted))
    assert type(plain) is type(tiny_model(family))
    assert weights(plain).keys() == before.keys()
    ids = torch.arange(6)[None]
    adapted.eval()
    assert torch.allclose(plain(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain(ids).logits, tiny_model(family, spread=3.0)(ids).logits)


def test_checkpointing_keeps_the_gradients_of_adapters():
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = add_lora(tiny_model(), lora()).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        train(model, steps=2)
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, value in grads[0].items():
        assert value is not None and grads[1][name] is not None, name
        assert torch.allclose(value, grads[1][name], rtol=1e-4, atol=1e-7), name


def test_a_mixture_of_experts_can_have_adapters_on_its_attention():
    model = add_lora(tiny_moe("qwen3_moe"), lora())
    losses = train(model)
    assert losses[-1] < losses[0]
    merged(model)


def test_a_merge_that_changes_the_model_is_refused(monkeypatch):
    model = add_lora(tiny_model(spread=3.0), lora())
    train(model)
    layer = type(model.get_base_model().base_model.layers[0].self_attn.q_proj)
    monkeypatch.setattr(layer, "get_delta_weight", lambda self, name: 2.0)
    with pytest.raises(ModelError, match="merging changes its logits"):
        merged(model)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"lora_rank": -1}, "lora_rank: found -1"),
        ({"lora_rank": 0}, "lora_rank is 0, so there are no adapters"),
        ({"lora_alpha": 0.0}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"lora_targets": "q_proj,,v_proj"}, "commas"),
        ({"lora_targets": ""}, "found ''; expected text; for none, leave the setting out"),
        ({"lora_targets": "w_qkv"}, "no layer 'w_qkv'; expected all-linear or some of down_proj"),
    ],
)
def test_settings_out_of_range_are_refused(changes, match):
    with pytest.raises(ConfigError, match=match):
        add_lora(tiny_model(), lora(**changes))


def test_adapters_that_cannot_be_merged_are_refused():
    for target in ("lm_head", "embed_tokens"):
        with pytest.raises(ModelError, match="shares its weight"):
            add_lora(tiny_model("qwen3-tied"), lora(lora_targets=target))
    with pytest.raises(ModelError, match="dropout"):
        add_lora(tiny_model(), lora(lora_targets="lm_head", lora_dropout=0.1))


def test_without_peft_the_error_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"lopd\[peft\]"):
        add_lora(tiny_model(), lora())


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("falcon_h1", "peft refuses adapters on all-linear .*such as q_proj,k_proj,v_proj,o_proj"),
        ("mamba", "peft refuses adapters on all-linear .*such as in_proj,x_proj"),
        ("zamba", "shares its weight with another layer, so an adapter on it cannot be merged"),
        ("longcat_flash", "is read without calling the layer, so an adapter on it cannot be"),
        ("phimoe", "fails on these adapters .*name other layers in lora_targets"),
    ],
)
def test_families_whose_adapters_would_be_lost_at_the_end_are_refused(kind, match):
    with pytest.raises(ModelError, match=match):
        add_lora(family_model(kind), lora(lora_targets="all-linear"))


def test_a_plan_refuses_what_peft_refuses(tmp_path):
    tiny_config("falcon_h1").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="peft refuses adapters on all-linear"):
        meta_model(str(tmp_path), "float32", lora(lora_targets="all-linear"))
