"""The plain training loop: its batches and its schedule."""

import pytest
import torch
from helpers_training import options, scored, tiny_model

from lopd.config.objective import Objective
from lopd.errors import ConfigError, DataError
from lopd.training.batch import Collator
from lopd.training.loop import train_loop


def test_the_loop_needs_a_number_of_steps_and_enough_batches():
    batches = [[Collator()(scored(2))]]
    with pytest.raises(ConfigError, match="max_steps"):
        train_loop(tiny_model(), batches, Objective("reverse_kl"), options(max_steps=-1))
    with pytest.raises(DataError, match="after 1 of max_steps=6"):
        train_loop(tiny_model(), batches, Objective("reverse_kl"), options())


def test_batches_may_be_generated_by_the_model_in_training():
    model, seen, modes = tiny_model().train(), [], []

    def online():
        while True:
            seen.append((model.training, model.lm_head.weight.detach().clone()))
            yield [Collator()(scored(2))]

    model.model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    train_loop(model, online(), Objective("reverse_kl"), options(max_steps=3, warmup_steps=0))
    assert [training for training, _ in seen] == [False] * 3
    assert modes[-3:] == [True] * 3
    assert not torch.equal(seen[1][1], seen[2][1])


def test_the_schedule_warms_up_and_ends_at_the_minimum():
    log = train_loop(
        tiny_model(),
        [[Collator()(scored(2))]] * 10,
        Objective("reverse_kl"),
        options(max_steps=10, warmup_steps=2, min_lr_ratio=0.1, learning_rate=1e-3),
    )
    rates = [entry["learning_rate"] for entry in log]
    assert rates[:3] == pytest.approx([0.0, 5e-4, 1e-3])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 1e-4 < rates[-1] < 1.5e-4
