"""The fused loss against dense logits inside the same trainer: same curve, same weights."""

import pytest
import torch
from helpers_artefacts import logged
from helpers_training import (
    SAME_UPDATE,
    make_rollouts,
    make_scored,
    options,
    tiny_model,
    update_error,
)

from lopd.training.batch import SequenceDataset
from lopd.training.step import model_inputs
from lopd.training.trainer import LopdTrainer, Objective

pytestmark = pytest.mark.thorough

STEPS = 10


class DenseTrainer(LopdTrainer):
    """The loss from `model(...).logits`, in plain PyTorch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(**model_inputs(inputs), use_cache=False).logits
        log_p = torch.log_softmax(logits.flatten(0, 1)[inputs["loss_index"]], -1)
        listed = inputs["topk_ids"] >= 0
        student = log_p.gather(1, inputs["topk_ids"].long().clamp(min=0))
        teacher = inputs["topk_logprobs"].masked_fill(~listed, 0.0)
        terms = (student.exp() * (student - teacher)).masked_fill(~listed, 0.0)
        tail = 1.0 - student.exp().masked_fill(~listed, 0.0).sum(1)
        losses = terms.sum(1) + tail * (tail.log() - inputs["tail_logprobs"])
        loss = (inputs["row_weights"] * losses).sum() / num_items_in_batch
        self.metrics.add({"loss": loss.detach()}, len(losses))
        return loss


def trained(kind, out, **changes):
    torch.manual_seed(0)
    model = tiny_model("qwen3-tied", spread=3.0)
    run = options(max_steps=STEPS, batch_size=2, gradient_accumulation_steps=2, **changes)
    data = SequenceDataset(make_scored(make_rollouts(12)))
    trainer = kind(
        model,
        run.training_arguments(out),
        Objective("reverse_kl"),
        data,
        max_tokens_per_batch=run.max_tokens_per_batch,
    )
    trainer.train()
    log = logged(out)
    return [entry["loss"] for entry in log], dict(model.named_parameters())


@pytest.mark.parametrize("changes", [{}, {"max_tokens_per_batch": 26}], ids=["padded", "packed"])
def test_ten_steps_of_the_fused_loss_equal_those_of_dense_logits(tmp_path, changes):
    curve, weights = trained(LopdTrainer, tmp_path / "fused", **changes)
    dense_curve, dense_weights = trained(DenseTrainer, tmp_path / "dense", **changes)
    assert len(curve) == len(dense_curve) == STEPS
    assert curve[-1] < 0.9 * curve[0]
    assert curve == pytest.approx(dense_curve, rel=2e-6)
    start = dict(tiny_model("qwen3-tied", spread=3.0).named_parameters())
    assert update_error(weights, dense_weights, start) < SAME_UPDATE
