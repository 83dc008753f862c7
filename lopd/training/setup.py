"""The trainer of a run, built from its settings."""

import logging
from functools import partial
from typing import Any

import torch

from lopd.config.objective import Objective
from lopd.config.prompts import PromptOptions
from lopd.config.training import MonitoringOptions
from lopd.models.architecture import embedding_rows_of
from lopd.models.load import context_of, load_model, load_tokenizer, resolve_dtype
from lopd.models.lora import add_lora
from lopd.store.workers import this_worker
from lopd.training.batch import Collator, SequenceDataset, Source, Subset, split_holdout
from lopd.training.holdout import Holdout
from lopd.training.staleness import StalenessMonitor
from lopd.training.trainer import LopdTrainer

LOG = logging.getLogger(__name__)

# Below this learning rate AdamW's updates of weights near 0.02 are lost to rounding in bfloat16,
# where numbers of that size are 1e-4 apart.
SMALLEST_RATE = 1e-4


def build_trainer(
    config: Any,
    source: Source,
    objective: Objective,
    model_path: str,
    refresh: Any,
    run_id: str,
) -> tuple[LopdTrainer, Any, float]:
    """Load the model and build its trainer.

    Args:
        config: settings of the stage.
        source: the sequences to train on.
        objective: what to minimise.
        model_path: folder of the model to start from.
        refresh: a `Refresh`, for rollouts that are refreshed during training; otherwise None.
        run_id: as in `LopdTrainer`.

    Returns:
        The trainer, the tokenizer, and the share of the sequences that was dropped.

    Raises:
        ConfigError: holding out sequences leaves nothing to train on or to evaluate.
        DataError, ModelError: the data or the model cannot be used.
    """
    model, vocab_size = _load(config, model_path)
    tokenizer = load_tokenizer(model_path)
    dataset = SequenceDataset(
        source,
        context=context_of(model_path),
        vocab_size=vocab_size,
        drop_truncated=config.drop_truncated,
        skip_bad=config.skip_bad_records if isinstance(config, PromptOptions) else None,
    )
    if dataset.truncated and not config.drop_truncated and this_worker(None).index == 0:
        LOG.warning(
            f"training data: {dataset.truncated} of {len(source)} answers "
            f"({dataset.truncated / len(source):.0%}) were cut off at their length limit; "
            "--drop-truncated leaves them out"
        )
    if (share := dataset.weight_share).given and this_worker(None).index == 0:
        LOG.info(
            f"training data: weighted as its rollouts say; effective share of tokens "
            f"{share.value:.1%}"
        )
    training_set: SequenceDataset | Subset = dataset
    holdout, monitored = None, isinstance(config, MonitoringOptions)
    if monitored and config.holdout:
        training_set, held_out = split_holdout(dataset, config.holdout)
        holdout = Holdout(
            held_out, objective.held_out, config.eval_steps, config.keep_best, config.patience
        )
    kind: Any = LopdTrainer
    if refresh is not None:
        from lopd.training.refresh import RefreshTrainer

        kind = partial(RefreshTrainer, refresh=refresh, tokenizer=tokenizer, dtype=config.dtype)
    trainer = kind(
        model,
        config.training_arguments(config.out),
        objective,
        training_set,
        Collator(config.loss_aggregation, pad_token_id=tokenizer.pad_token_id or 0),
        holdout,
        max_tokens_per_batch=config.max_tokens_per_batch,
        attention=config.attention,
        run_id=run_id,
    )
    if monitored and config.stale_ess:
        monitor = StalenessMonitor(trainer.metrics, config.stale_ess, config.stale_every)
        trainer.add_callback(monitor)
    return trainer, tokenizer, dataset.dropped_share


def _load(config: Any, model_path: str) -> tuple[Any, int]:
    """The model, with new adapters if the settings ask for them, and its vocabulary size."""
    device = "cpu" if config.fsdp else config.device  # one GPU may not hold the whole model
    local_rank = this_worker(None).local_rank
    model = load_model(model_path, dtype=config.dtype, device=device, local_rank=local_rank)
    vocab_size = embedding_rows_of(model)
    if config.lora_rank:
        torch.manual_seed(config.seed)  # for the adapters' initial values
        model = add_lora(model, config)
    return model, vocab_size


def warn_of_rounding(config: Any) -> None:
    """Print a warning if most updates are too small for the dtype of the weights."""
    if (
        resolve_dtype(config.dtype) == torch.bfloat16
        and not config.lora_rank
        and config.learning_rate < SMALLEST_RATE
    ):
        LOG.warning(
            f"dtype {config.dtype} with learning_rate {config.learning_rate:g}: most updates this "
            "small are lost to rounding; --mixed-precision bf16 uses float32 weights, and "
            "--lora-rank trains float32 adapters"
        )
