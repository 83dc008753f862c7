"""The examples under docs/examples run, and their gradients are those of dense logits."""

import importlib.util
from pathlib import Path

import pytest
import torch

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


def test_the_trl_example_reduces_its_loss():
    pytest.importorskip("trl", reason="part of the extra `trl`")
    losses = load("trl_trainer").main()
    assert len(losses) == 6 and losses[-1] < 0.5 * losses[0]
