"""Ids that count as one token in a divergence, against logits in which they are one."""

import pytest
import torch
from torch import Tensor

from lopd.config.objective import SPARSE, Objective
from lopd.errors import ConfigError
from lopd.training.row_losses import loss_of_rows
from lopd_kernels import reference

N, D, V, K = 6, 5, 12, 4
CLASS = (3, 9)


def problem(seed=0):
    """Rows, a head, and lists that hold the class: of 4 ids of the teacher and, once, the class."""
    generator = torch.Generator().manual_seed(seed)
    rows, weight = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)
    teacher = torch.log_softmax(2 * torch.randn(N, V, generator=generator), -1)
    outside = teacher.index_fill(1, torch.tensor(CLASS), -torch.inf)
    ids = torch.cat([outside.topk(K).indices, torch.tensor(CLASS).expand(N, -1)], 1)
    return rows.double(), weight.double(), teacher.double(), ids


def dense(rows: Tensor, weight: Tensor, teacher: Tensor, ids: Tensor, objective, options) -> Tensor:
    """The loss on the vocabulary in which the class is one more id, by its definition."""

    def merge(logits: Tensor) -> Tensor:
        kept = [i for i in range(V) if i not in CLASS]
        return torch.cat([logits[:, kept], logits[:, CLASS].logsumexp(1, keepdim=True)], 1)

    places = [i for i in range(V) if i not in CLASS]
    merged_ids = torch.tensor([[*map(places.index, row[:K]), V - 2] for row in ids.tolist()])
    logits = options["logit_scale"] * (rows @ weight.T + options["bias"])
    logits = options["softcap"] * torch.tanh(logits / options["softcap"]) / options["temperature"]
    listed = merge(teacher).gather(1, merged_ids)
    return reference.sparse_divergence(
        merge(logits),
        merged_ids,
        listed,
        tail_logprobs=torch.log1p(-listed.exp().sum(1)),
        divergence=objective.name,
        tail=objective.tail,
        **({} if objective.beta is None else {"beta": objective.beta}),
        reduction="sum",
    )


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "truncate"])
def test_value_and_gradient_are_those_of_one_token(name, tail):
    rows, weight, teacher, ids = problem()
    objective = Objective(name, tail=tail, eos_class=CLASS)
    bias = torch.linspace(-1, 1, V, dtype=torch.float64)
    options = {"bias": bias, "logit_scale": 0.7, "softcap": 5.0, "temperature": 1.3}
    ours = [rows.float().requires_grad_(), weight.float().requires_grad_()]
    theirs = [rows.requires_grad_(), weight.requires_grad_()]
    listed = teacher.gather(1, ids)
    batch = {
        "topk_ids": ids,
        "topk_logprobs": listed.float(),
        "tail_logprobs": torch.log1p(-listed.exp().sum(1)).float(),
        "row_weights": torch.ones(N),
        "labels": ids[:, 0],
    }
    loss, _ = loss_of_rows(*ours, batch, objective, {**options, "bias": bias.float()})
    expected = dense(*theirs, teacher, ids, objective, options)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    for mine, right in zip(ours, theirs, strict=True):
        assert (mine.grad.double() - right.grad).norm() < 1e-5 * right.grad.norm()
    apart = Objective(name, tail=tail)  # the test can fail
    loss, _ = loss_of_rows(*ours, batch, apart, {**options, "bias": bias.float()})
    assert (loss - expected).abs() > 1e-2


def test_only_divergences_merge_ids():
    with pytest.raises(ConfigError, match="policy_gradient has no lists to merge ids in"):
        Objective("policy_gradient", eos_class=CLASS)
