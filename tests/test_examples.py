"""The examples under docs/examples run, and their gradients are those of dense logits."""

import importlib.util
from pathlib import Path

import pytest
import torch

from lopd.errors import ModelError

EXAMPLES = Path(__file__).parents[1] / "docs/examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dense_loss(student, teacher, input_ids, attention_mask, predicted, k):
    """Mean of KL(student || teacher) over k + 1 buckets, from both models' logits, in fp64."""
    p, q = (
        model(input_ids=input_ids, attention_mask=attention_mask)
        .logits[:, :-1][predicted]
        .double()
        .log_softmax(-1)
        for model in (student, teacher)
    )
    top = q.topk(k).indices

    def buckets(x):
        listed = x.gather(1, top)
        return torch.cat([listed, (-listed.exp().sum(1, keepdim=True)).log1p()], 1)

    p, q = buckets(p), buckets(q).detach()
    return (p.exp() * (p - q)).sum(1).mean()


def assert_gradients(model, expected):
    """Compare with the dense gradients, to 1e-5 of the largest entry of each parameter."""
    fused = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    expected.backward()
    for name, parameter in model.named_parameters():
        size = parameter.grad.abs().max()
        assert size > 1e-6, name
        assert (fused[name] - parameter.grad).abs().max() <= 1e-5 * size, name


def test_the_plain_loop_reduces_its_loss(capsys):
    losses = load("plain_loop").main()
    assert losses[-1] < 0.5 * losses[0]
    assert capsys.readouterr().out.count("nat/token") == len(losses)


def test_the_plain_loop_has_the_gradients_of_dense_logits():
    example = load("plain_loop")
    student, teacher = example.tiny_model(0, width=32), example.tiny_model(1, width=64)
    batch = example.roll_out(student, 256)
    lengths = batch["loss_mask"].sum(1)
    assert lengths.min() < lengths.max()  # some stopped early
    rows = zip(batch["input_ids"].tolist(), lengths.tolist(), strict=True)
    for ids, length in rows:
        assert example.EOS in ids[: example.PROMPT]  # as in ChatML prompts
        answer = ids[example.PROMPT :]
        stop = answer.index(example.EOS) + 1 if example.EOS in answer else example.ANSWER
        assert length == stop
    loss = example.distillation_loss(student, batch, example.score(teacher, batch))
    loss.backward()
    predicted = batch["loss_mask"][:, 1:]
    expected = dense_loss(
        student, teacher, batch["input_ids"], batch["attention_mask"], predicted, example.K
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients(student, expected)


def test_the_plain_loop_refuses_a_row_without_a_loss_token():
    example = load("plain_loop")
    student = example.tiny_model(0, width=32)
    batch = example.roll_out(student, 2)
    batch["loss_mask"][1] = False
    with pytest.raises(ValueError, match="no token to train on"):
        example.score(student, batch)


@pytest.fixture(scope="module")
def trl_example():
    pytest.importorskip("trl")  # part of the test extra
    return load("trl_trainer")


@pytest.fixture
def trainer(trl_example, tmp_path):
    """32 answers in one optimizer step of four micro-batches, with learning rate 0."""
    return trl_example.tiny_run(
        tmp_path,
        max_steps=1,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        learning_rate=0.0,
        max_grad_norm=0.0,
        save_strategy="no",
    )


def batch_of(trainer):
    return next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))


def expected_loss(trainer, batch):
    predicted = batch["labels"][:, 1:] != -100
    inputs = batch["input_ids"], batch["attention_mask"]
    return dense_loss(trainer.model, trainer.teacher, *inputs, predicted, trainer.k)


def test_the_trainer_reduces_its_loss(trl_example):
    losses = trl_example.main()
    assert len(losses) == 6 and losses[-1] < 0.5 * losses[0]


def test_a_step_has_the_gradients_of_dense_logits(trainer):
    from transformers import TrainerCallback

    gradients = {}

    class SaveGradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients.update({name: p.grad.clone() for name, p in model.named_parameters()})

    trainer.add_callback(SaveGradients())
    trainer.train()
    trainer.args.per_device_eval_batch_size = 32
    batch = batch_of(trainer)
    lengths = (batch["labels"] != -100).sum(1)
    assert len(batch["labels"]) == 32 and lengths.min() < lengths.max()
    for name, parameter in trainer.model.named_parameters():
        parameter.grad = gradients[name]
    assert_gradients(trainer.model, expected_loss(trainer, batch))


def test_the_loss_without_a_count_is_the_mean_over_tokens(trainer):
    batch = batch_of(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(expected_loss(trainer, batch).item(), rel=1e-4)


def test_the_loss_is_scaled_for_gradients_averaged_over_processes(trainer, monkeypatch):
    batch, count = batch_of(trainer), torch.tensor(7)
    alone = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    together = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
    assert together.item() == pytest.approx(2 * alone.item())


def test_mixed_precision_reaches_the_backbone(trl_example, tmp_path):
    trainer = trl_example.tiny_run(tmp_path, bf16=True, save_strategy="no")
    seen = []
    projection = trainer.model.model.layers[0].self_attn.q_proj
    projection.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    loss = trainer.compute_loss(trainer.model, batch_of(trainer))
    assert seen == [torch.bfloat16] and torch.isfinite(loss)


def test_long_rows_stay_whole(trl_example, tmp_path):
    rows = [{"input_ids": [5] * n, "labels": [-100] * 900 + [5] * (n - 900)} for n in (1200, 4096)]
    trainer = trl_example.tiny_run(tmp_path, rows=rows, save_strategy="no")
    assert [len(row["input_ids"]) for row in trainer.train_dataset] == [1200, 4096]
    assert [sum(x != -100 for x in row["labels"]) for row in trainer.train_dataset] == [300, 3196]


def test_a_batch_without_a_label_is_refused(trainer):
    batch = batch_of(trainer)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.raises(ValueError, match="no token has a label"):
        trainer.compute_loss(trainer.model, batch)


def test_logits_are_refused(trainer):
    with pytest.raises(ValueError, match="no logits are made"):
        trainer.compute_loss(trainer.model, {}, return_outputs=True)


def test_a_wrapped_model_is_refused(trainer):
    with pytest.raises(ModelError, match="not wrapped"):
        trainer.compute_loss(torch.nn.DataParallel(trainer.model), batch_of(trainer))
