"""A training loop without a framework: AdamW, gradient clipping and a schedule.

It gives the same weights as `lopd.training.trainer.LopdTrainer` on the same batches, and each is
tested against the other. It takes batches from any iterator: an online run generates them from the
model in training.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import get_scheduler

from lopd.config.objective import Objective
from lopd.config.training import TrainOptions
from lopd.errors import ConfigError, DataError
from lopd.models.admission import check_model
from lopd.training.batch import Batch, to_device
from lopd.training.metrics import MetricsAccumulator
from lopd.training.step import check_finite, step


def train_loop(
    model: Any, batches: Iterable[Sequence[Batch]], objective: Objective, options: TrainOptions
) -> list[dict[str, float]]:
    """Train a model in place for `options.max_steps` optimizer steps, without saving it.

    Args:
        model: as in `lopd.models.head.run_with_loss`; it stays on its device. It is in eval mode
            while the next element of `batches` is generated.
        batches: the micro-batches of each optimizer step, from `lopd.training.batch.Collator`.
        objective: what to minimise.
        options: the settings of the optimizer (AdamW), the schedule and the clipping,
            `gradient_checkpointing`, `max_steps` and `log_every` are used.

    Returns:
        The log: the metrics of every `log_every` steps.

    Raises:
        ConfigError: max_steps is not set.
        DataError: the loss or the gradient is not finite, or `batches` ends too early.
        ModelError: the model cannot be trained with a loss on its hidden states.

    >>> import numpy as np
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from lopd.data.demonstrations import Demonstration
    >>> from lopd.training.batch import Collator
    >>> sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    >>> model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    >>> tokens, loss_mask = np.arange(6, dtype=np.int32), np.arange(6) >= 2
    >>> batch = Collator()([Demonstration("prompt", 0, tokens, 2, "stop", loss_mask)])
    >>> options = TrainOptions(max_steps=3, learning_rate=1e-2, log_every=1, device="cpu")
    >>> log = train_loop(model, [[batch]] * 3, Objective("cross_entropy"), options)
    >>> [entry["step"] for entry in log], log[2]["loss"] < log[0]["loss"]
    ([1, 2, 3], True)
    """
    if options.max_steps < 1:
        raise ConfigError("max_steps: train_loop cannot count epochs; set the number of steps")
    check_model(model, trained=True)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = adamw(model, options)
    kind, schedule = options.schedule()
    scheduler = get_scheduler(
        kind,
        optimizer=optimizer,
        num_warmup_steps=options.warmup_steps,
        num_training_steps=options.max_steps,
        scheduler_specific_kwargs=schedule,
    )
    model.eval()
    log: list[dict[str, float]] = []
    metrics = MetricsAccumulator()
    number = 0
    for number, micro_batches in enumerate(itertools.islice(batches, options.max_steps), 1):
        metrics.begin_step()
        model.train()
        optimizer.zero_grad()
        norm = _accumulate(model, micro_batches, objective, options, number, metrics)
        rate = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        model.eval()  # `batches` may generate
        if number % options.log_every == 0 or number == options.max_steps:
            entry = {"step": number, "learning_rate": rate, "grad_norm": norm.item()}
            log.append({**entry, **metrics.pop()})
    if number < options.max_steps:
        raise DataError(
            f"batches: ended after {number} of max_steps={options.max_steps}; the schedule needs "
            "all of them"
        )
    return log


def adamw(model: Any, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and none on vectors (norms, biases)."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        fused=True,
    )


def _accumulate(
    model: Any,
    micro_batches: Sequence[Batch],
    objective: Objective,
    options: TrainOptions,
    number: int,
    metrics: MetricsAccumulator,
) -> torch.Tensor:
    """Gradients of one optimizer step, clipped; returns their norm before clipping."""
    device = next(model.parameters()).device
    num_items = sum(batch["row_weights"].sum().item() for batch in micro_batches)
    for batch in micro_batches:
        moved = to_device(batch, device)
        loss, stats = step(model, moved, objective, num_items)
        check_finite("loss", loss, [moved], number)
        loss.backward()
        metrics.add({"loss": loss.detach(), **stats}, len(moved["labels"]))
    limit = options.max_grad_norm or torch.inf
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
    check_finite("norm of the gradient", norm, micro_batches, number)
    return norm
