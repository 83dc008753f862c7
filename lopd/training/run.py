"""What the training stages share: one output folder is one run of one recipe.

A run's folder holds `recipe.json` from the start, `checkpoint-N` while it trains, then the
model, its tokenizer and `train_log.jsonl`, and at last `manifest.json`, which marks it as
finished. Calling a stage again continues the run from its last whole checkpoint, putting
torn ones aside; a checkpoint of another recipe, or a finished run, is refused.

Started by torchrun, each process trains on its part of every step; the first one alone claims,
writes and finishes the folder.
"""

import json
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lopd.errors import ConfigError, DataError, LopdError, ShardError
from lopd.models.load import context_of, load_model, load_tokenizer, resolve_device, resolve_dtype
from lopd.models.lora import add_lora, merged
from lopd.provenance import MANIFEST_NAME
from lopd.provenance.identity import training_recipe_of
from lopd.provenance.io import TEMP_SUFFIX, pretty_json, write_atomic
from lopd.store.locks import LOCK_NAME, FolderLock
from lopd.store.workers import Worker, this_worker
from lopd.training.batch import Collator, Part, SequenceDataset, Source, lengths_of, split_holdout
from lopd.training.checkpoints import is_whole, last_checkpoint, put_torn_aside
from lopd.training.objective import Objective
from lopd.training.options import PATIENCE_S, WatchOptions

SMALLEST_RATE = 1e-4  # weights of 0.02 have neighbours 1e-4 away in bfloat16
RECIPE_NAME = "recipe.json"
ADAPTER_NAME = "adapter"  # of a LoRA run, beside the model that it was merged into


def begin(config: Any, *, base: dict[str, Any], **inputs: str) -> Path | None:
    """Claim `config.out` for this recipe; returns the checkpoint to continue from, if any.

    Args:
        base: description of the model that training starts from.
        inputs: digests of what else the run reads.

    Raises:
        ConfigError: the folder holds a finished run, a checkpoint of another recipe, or
            something else, or is a file.
        DataError: `recipe.json` is torn.
        ShardError: another process trains there, or the folder cannot be written.
    """
    worker = this_worker(None)
    if worker.alone and config.fsdp:
        raise ConfigError("fsdp: found one process; expected several, by torchrun, to shard over")
    if worker.alone:
        return _claim(config, base, inputs, worker)
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    on_cpu = resolve_device(config.device).type == "cpu"
    state = PartialState(cpu=on_cpu, timeout=timedelta(seconds=PATIENCE_S))
    claimed = [_claim(config, base, inputs, worker) if state.is_main_process else None]
    return broadcast_object_list(claimed)[0]


def is_first() -> bool:
    """Whether this process writes the run's folder."""
    return this_worker(None).index == 0


def _claim(
    config: Any, base: dict[str, Any], inputs: dict[str, str], worker: Worker
) -> Path | None:
    out = Path(config.out)
    settings = training_recipe_of(config)
    identity = {key: base[key] for key in ("weights", "config", "tokenizer")}
    processes = {} if worker.alone else {"processes": worker.count}
    recipe = json.loads(json.dumps({**settings, **inputs, **processes, "base": identity}))
    file = out / RECIPE_NAME
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; choose another --out, a folder")
    checkpoint = last_checkpoint(out)
    if (out / MANIFEST_NAME).exists():
        raise ConfigError(f"{out}: holds a finished run; choose another --out, or remove it")
    if file.exists():
        found = _read_recipe(file)
        changed = sorted(k for k in found.keys() | recipe.keys() if found.get(k) != recipe.get(k))
        if changed and checkpoint is not None:
            key = changed[0]
            raise ConfigError(
                f"{out}: holds {checkpoint.name} of another recipe ({key} was {found.get(key)!r}, "
                f"is {recipe.get(key)!r}); choose another --out, or remove the folder"
            )
    elif out.is_dir() and any(
        item.suffix != TEMP_SUFFIX and item.name != LOCK_NAME for item in out.iterdir()
    ):
        raise ConfigError(f"{out}: is not empty and holds no {RECIPE_NAME}; choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(out)
        try:
            write_atomic(file, pretty_json(recipe))
        finally:
            lock.release()
    except LopdError:
        raise
    except OSError as error:
        raise ShardError(
            f"{out}: cannot be made or written ({error.strerror or error}); choose another --out"
        ) from error
    return checkpoint


def _read_recipe(file: Path) -> dict[str, Any]:
    try:
        recipe = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file}: torn or altered ({error}); restore it, or remove the folder to begin again"
        ) from error
    if not isinstance(recipe, dict):
        raise DataError(f"{file}: holds no settings; restore it, or remove the folder")
    return recipe


def train(
    config: Any,
    source: Source,
    objective: Objective,
    *,
    model_path: str,
    checkpoint: Path | None,
    k: int = 0,
    refresh: Any = None,
) -> dict[str, Any]:
    """Train the model at `model_path`; the first process saves it and its tokenizer.

    Args:
        k: tokens in a teacher's list.

    Returns what the manifest says, once the result is there: `training`, the sequences trained on
    and the share dropped; where `config` has WatchOptions also `stale` and, if sequences were held
    out, `holdout`.

    Raises:
        ConfigError: the share to hold out leaves nothing on one side.
        ShardError: another process trains there, the disk is full, and the like; the best
            checkpoint is gone or torn.
    """
    from lopd.training.holdout import holdout_summary
    from lopd.training.logging import saving
    from lopd.training.staleness import stale_summary

    first = is_first()
    lock = FolderLock(Path(config.out)) if first else None
    try:
        trainer, tokenizer, dropped = _trainer(config, source, objective, model_path, refresh)
        if first:
            with saving(config.out):
                put_torn_aside(Path(config.out), checkpoint)
            if trainer.args.device.type == "cuda" and refresh is None:
                trainer.meter.planned = planned_peak(config, trainer, model_path, k)
        trainer.accelerator.wait_for_everyone()
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        whole = trainer.whole_state() if config.fsdp else None
        if first:
            model = _result(config, trainer, model_path, whole)
            with saving(config.out):
                if config.lora_rank:
                    model.save_pretrained(Path(config.out) / ADAPTER_NAME)
                    model = merged(model)
                model.save_pretrained(config.out)
                tokenizer.save_pretrained(config.out)
        trainer.accelerator.wait_for_everyone()
    finally:
        if lock is not None:
            lock.release()
    sequences, history = len(trainer.train_dataset), trainer.state.log_history
    told: dict[str, Any] = {"training": {"sequences": sequences, "dropped_share": dropped}}
    if isinstance(config, WatchOptions):
        told["stale"] = stale_summary(config.stale_ess, history)
    if trainer.holdout is not None:
        last = trainer.state.global_step
        told["holdout"] = holdout_summary(trainer.holdout, history, last)
    if refresh is not None:
        from lopd.training.refresh import refresh_summary

        told |= refresh_summary(refresh, history)
    return told


def planned_peak(config: Any, trainer: Any, model_path: str, k: int) -> int | None:
    """Bytes that `lopd plan` says the run takes; None, and said so, where it cannot."""
    from lopd.training.dry_run import meta_model
    from lopd.training.memory import Planner, memory_settings_of_run

    if config.fsdp or config.mixed_precision != "none":
        return None
    longest, objective = max(lengths_of(trainer.train_dataset)), trainer.objective.name
    try:
        plan = memory_settings_of_run(config, objective, k=k, longest=longest)
        return Planner(meta_model(model_path, config.dtype, config)).parts(plan).total
    except LopdError as error:
        print(f"no plan of the peak memory ({error})", file=sys.stderr)
        return None


def _result(config: Any, trainer: Any, model_path: str, whole: Any) -> Any:
    """The model that the run ends with, with its adapters if it has any.

    Another than the trainer's is on the CPU: the GPU still holds that one and its optimizer.

    Args:
        whole: weights of the last step, where `trainer.model` has a share of each alone.
    """
    if trainer.holdout is not None and trainer.holdout.keep_best:
        return _best_model(config, trainer, model_path)
    if whole is None:
        return trainer.model
    model = load_model(model_path, dtype=config.dtype, device="cpu")
    if config.lora_rank:
        model = add_lora(model, config)
    model.load_state_dict(whole)
    return model


def _best_model(config: Any, trainer: Any, model_path: str) -> Any:
    """The model of the checkpoint with the best held-out KL, with its adapters if it has any."""
    folder = Path(config.out) / f"checkpoint-{trainer.state.best_global_step}"
    if not is_whole(folder):
        raise ShardError(
            f"{folder}: the checkpoint with the best held-out KL is gone or torn; restore it and "
            "run the same command again, or remove the run's folder to begin again"
        )
    if not config.lora_rank:
        return load_model(str(folder), dtype=config.dtype, device="cpu")
    from peft import PeftModel

    model = load_model(model_path, dtype=config.dtype, device="cpu")
    return PeftModel.from_pretrained(model, folder)


def warn_of_rounding(config: Any) -> None:
    """Say so where most updates are too small for the weights' dtype to hold."""
    if (
        resolve_dtype(config.dtype) == torch.bfloat16
        and not config.lora_rank
        and config.learning_rate < SMALLEST_RATE
    ):
        print(
            f"dtype {config.dtype} with learning_rate {config.learning_rate:g}: most of such small "
            "updates are lost in rounding; --mixed_precision bf16 keeps float32 weights, and "
            "--lora_rank trains float32 adapters",
            file=sys.stderr,
        )


def _trainer(
    config: Any, source: Source, objective: Objective, model_path: str, refresh: Any
) -> tuple[Any, Any, float]:
    """The trainer of the model at `model_path`, its tokenizer, and the share of data dropped."""
    from lopd.training.holdout import Holdout
    from lopd.training.staleness import StaleWatch
    from lopd.training.trainer import LopdTrainer

    if is_first():
        warn_of_rounding(config)
    local_rank = this_worker(None).local_rank
    device = "cpu" if config.fsdp else config.device  # the whole may not fit on one GPU
    model = load_model(model_path, dtype=config.dtype, device=device, local_rank=local_rank)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    if config.lora_rank:
        torch.manual_seed(config.seed)  # of the adapters' initial values
        model = add_lora(model, config)
    tokenizer = load_tokenizer(model_path)
    dataset = SequenceDataset(
        source,
        context=context_of(model_path),
        vocab_size=vocab_size,
        drop_truncated=config.drop_truncated,
    )
    kept: SequenceDataset | Part = dataset
    holdout, watch = None, isinstance(config, WatchOptions)
    if watch and config.holdout:
        kept, held_out = split_holdout(dataset, config.holdout)
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
        kept,
        Collator(config.loss_aggregation, pad_token_id=tokenizer.pad_token_id or 0),
        holdout,
        max_tokens_per_batch=config.max_tokens_per_batch,
        attention=config.attention,
    )
    if watch and config.stale_ess:
        trainer.add_callback(StaleWatch(trainer.window, config.stale_ess, config.stale_every))
    return trainer, tokenizer, dataset.dropped_share
