"""Losses from full logits, for comparison with losses run inside a model."""

import torch
from helpers_training import VOCAB
from torch import nn


def batch(rows=2, length=5):
    ids = torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def dense_logits(hidden, weight, bias, head):
    z = nn.functional.linear(hidden, weight, bias) * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def grads(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
