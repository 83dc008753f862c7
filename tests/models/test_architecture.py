"""What is read from configs: names that differ between model families, and defaults."""

from types import SimpleNamespace

import pytest

from lopd.errors import ModelError
from lopd.models.architecture import (
    attention_width_of,
    context_of_config,
    experts_of,
    layer_windows_of,
    logit_scale_of,
    logit_softcap_of,
    router_coefficient_of,
    router_losses_of,
    sliding_window_of,
)


def config(**settings):
    made = SimpleNamespace(model_type="made", to_dict=lambda: settings, **settings)
    made.get_text_config = lambda: made
    return made


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts", "n_routed_experts"])
def test_experts_have_several_names_and_may_be_set_on_the_model(name):
    both = {name: 8, "num_experts_per_tok": 2}
    assert experts_of(SimpleNamespace(config=config(**both))) == (8, 2)
    assert experts_of(SimpleNamespace(config=config(), **both)) == (8, 2)
    assert experts_of(SimpleNamespace(config=config(**{name: 0}))) == (None, None)


def test_router_coefficients_have_two_names_and_other_losses_are_listed():
    settings = {"router_aux_loss_coef": 0.0, "aux_loss_coef": 0.1, "router_z_loss_coef": 0.2}
    model = SimpleNamespace(config=config(**settings))
    assert router_coefficient_of(model) == 0.1
    assert router_losses_of(model.config) == {"aux_loss_coef": 0.1, "router_z_loss_coef": 0.2}
    assert router_coefficient_of(SimpleNamespace(config=config())) == 0.0


def test_windows_belong_to_the_layers_that_slide():
    kinds = ["sliding_attention", "full_attention"]
    assert layer_windows_of(config(sliding_window=4, layer_types=kinds)) == [4, None]
    assert layer_windows_of(config(sliding_window=4, num_hidden_layers=2)) == [4, 4]
    assert layer_windows_of(config(num_hidden_layers=2)) == [None, None]
    assert sliding_window_of(config()) is None


def test_sizes_are_read_from_the_text_config():
    text = config(num_attention_heads=4, hidden_size=64, max_position_embeddings=128)
    whole = SimpleNamespace(get_text_config=lambda: text, max_position_embeddings=7)
    assert (attention_width_of(whole), context_of_config(whole)) == (64, 128)
    assert attention_width_of(config(num_attention_heads=4, head_dim=32)) == 128
    assert context_of_config(config()) is None


def test_logit_scales_multiply_and_must_be_positive():
    scaled = config(logit_scale=0.5, lm_head_multiplier=3.0, logits_scaling=2.0)
    assert logit_scale_of(scaled) == 0.75
    scaled.model_type = "hyperclovax"  # its logits_scaling multiplies
    assert logit_scale_of(scaled) == 3.0
    assert logit_scale_of(config()) == 1.0 and logit_softcap_of(config()) is None
    assert logit_softcap_of(config(final_logit_softcapping=30)) == 30.0
    for name, read in (
        ("logit_scale", logit_scale_of),
        ("final_logit_softcapping", logit_softcap_of),
    ):
        with pytest.raises(ModelError, match=f"config.{name} of made: found -1; expected"):
            read(config(**{name: -1}))
