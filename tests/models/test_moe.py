"""The auxiliary loss of a mixture of experts equals that of the model, or is refused."""

import pytest
import torch
from helpers_heads import batch, dense_logits, grads
from helpers_training import tiny_model, tiny_moe, weights
from torch import nn

from lopd.errors import ModelError
from lopd.models.head import check_head, check_trainable, run_with_loss_and_router


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_the_routers_loss_equals_that_of_the_model(family):
    model, inputs = tiny_moe(family), batch()
    inputs["attention_mask"][0, -2:] = 0
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    settings = {"labels": labels, "output_router_logits": True}
    expected = model(**inputs, **settings).loss

    def nll(*head):
        logits = dense_logits(*head)[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())

    loss, router = run_with_loss_and_router(model, inputs, nll)
    assert router.item() > 0.1
    assert (loss + router).item() == pytest.approx(expected.item(), rel=1e-6)
    expected_grads, found_grads = grads(model, expected), grads(model, loss + router)
    assert expected_grads.keys() == found_grads.keys() == weights(model).keys()
    for name, value in expected_grads.items():
        assert torch.allclose(found_grads[name], value, rtol=1e-4, atol=1e-6), name
    check_head(model)
    check_trainable(model)


def test_no_routers_loss_if_the_config_asks_for_none():
    for model in (tiny_model(), tiny_moe("mixtral", router_aux_loss_coef=0.0)):
        assert run_with_loss_and_router(model, batch(), lambda h, *_: h.sum())[1] is None


def test_unsupported_router_losses_are_refused():
    model = tiny_moe("qwen3_moe")
    model.config.router_z_loss_coef = 0.001
    with pytest.raises(ModelError, match="router_z_loss_coef is 0.001"):
        check_trainable(model)
    model.config.router_z_loss_coef = 0.0
    check_trainable(model)
    dense = tiny_model()
    dense.config.router_aux_loss_coef = 0.1
    with pytest.raises(ModelError, match="router_aux_loss_coef is 0.1"):
        check_trainable(dense)


def test_a_backbone_that_returns_no_router_logits_is_refused(monkeypatch):
    model = tiny_moe("mixtral")
    forward = model.base_model.forward

    def silent(**kwargs):
        outputs = forward(**kwargs)
        outputs.router_logits = None
        return outputs

    monkeypatch.setattr(model.base_model, "forward", silent)
    with pytest.raises(ModelError, match="no router logits"):
        run_with_loss_and_router(model, batch(), lambda hidden, *_: hidden.sum())
