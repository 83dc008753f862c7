"""What a run ends with: its model, the export of it, and a rehearsal of that before training."""

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from lopd.errors import ModelError, ShardError
from lopd.models.load import load_model
from lopd.models.lora import add_lora, merged
from lopd.provenance.folder_receipt import RECEIPT_NAME, files_below, seal
from lopd.provenance.io import TEMP_SUFFIX
from lopd.training.checkpoints import checkpoints, saving, unusable
from lopd.training.dry_run import storage_bytes

ADAPTER_NAME = "adapter"  # a LoRA run's adapters, next to the merged model
EXPORT = f".result{TEMP_SUFFIX}"  # folder in which the result is written
REHEARSAL = f".rehearsal{TEMP_SUFFIX}"


def result_model(config: Any, trainer: Any, model_path: str, state: dict[str, Any] | None) -> Any:
    """The result of a run, with its adapters if it has any: the last or the best checkpoint's.

    A model other than the trainer's is on the CPU, because the trainer's and its optimizer are
    still on the GPU.

    Args:
        config: settings of the stage.
        trainer: after training.
        model_path: folder of the model that training started from.
        state: unsharded weights of the last step if the trainer's model is sharded, else None.

    Raises:
        ShardError: the checkpoint with the best held-out KL is cannot be used.
    """
    load = partial(load_model, dtype=config.dtype, device="cpu")
    if trainer.holdout is not None and trainer.holdout.keep_best:
        best = Path(config.out) / f"checkpoint-{trainer.state.best_global_step}"
        if why := unusable(best):
            raise ShardError(
                f"{best}: the checkpoint with the best held-out KL cannot be used ({why}); rerun "
                "the same command to train again from one that can"
            )
        if not config.lora_rank:
            return load(best)
        from peft import PeftModel

        return PeftModel.from_pretrained(load(model_path), best)
    if state is None:
        # Without the autocast that accelerate puts around the forward of a trained model.
        return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model = load(model_path)
    if config.lora_rank:
        model = add_lora(model, config)
    model.load_state_dict(state)
    return model


def export(out: Path, model: Any, tokenizer: Any, *, adapters: bool) -> None:
    """Write the result of a run into its folder, and last a receipt of its files.

    Files are written elsewhere and moved, so none of them is ever half written.

    Args:
        out: folder of the run.
        model: the result; adapters are saved, then merged in place.
        tokenizer: saved with it.
        adapters: whether the model has adapters.

    Raises:
        ModelError: the adapters cannot be merged.
        ShardError: the disk is full or fails.
    """
    staging = out / EXPORT
    with saving(out):
        if adapters:
            model.save_pretrained(staging / ADAPTER_NAME)
    if adapters:
        model = merged(model)
    with saving(out):
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        names = files_below(staging)
        (out / RECEIPT_NAME).unlink(missing_ok=True)
        for name in names:
            (out / name).parent.mkdir(exist_ok=True)
            os.replace(staging / name, out / name)
        seal(out, names)
        shutil.rmtree(staging)


def rehearse(out: Path, model: Any, tokenizer: Any) -> None:
    """Try before training what saving needs: configs and tokenizer are written, and removed.

    Weights are not written; `check_disk` compares their size with the free space.

    Raises:
        ModelError: a config or the tokenizer can be loaded, but not saved.
        ShardError: the disk is full or fails.
    """
    folder = out / REHEARSAL
    parts = {"model": partial(model.save_pretrained, state_dict={})}
    parts["tokenizer"] = tokenizer.save_pretrained
    for name, save in parts.items():
        try:
            with saving(out):
                save(folder)
        except (ValueError, TypeError, AttributeError) as error:
            why = " ".join(str(error).split())
            remedy = "correct its files before training"
            if "`do_sample`" in why:
                remedy = "set do_sample to true in its generation_config.json"
            raise ModelError(
                f"the {name} can be loaded, but not saved again, which a checkpoint and the result "
                f"need ({why[:300]}); {remedy}"
            ) from error
    with saving(out):
        shutil.rmtree(folder)


def check_disk(config: Any, trainer: Any) -> None:
    """Refuse a run whose checkpoints and result certainly exceed the free space of its disk.

    Raises:
        ShardError: they do; names the sizes.
    """
    out, model = Path(config.out), trainer.model
    trained = storage_bytes([p for p in model.parameters() if p.requires_grad])
    # AdamW keeps two averages of each weight; of other optimizers only the weights are counted.
    each = 3 * trained if config.optim.startswith("adamw_torch") else trained
    result = storage_bytes([*model.parameters()])
    keep_best = trainer.holdout is not None and trainer.holdout.keep_best
    per_step = config.batch_size * config.gradient_accumulation_steps * trainer.args.world_size
    steps = int(config.num_epochs * len(trainer.train_dataset) / per_step)
    steps = steps if config.max_steps == -1 else config.max_steps
    saves = max(1, steps // config.save_every) if config.save_every else 0  # one at the end
    # The oldest is removed after the newest is written, and the best is kept beside the others.
    count = min(saves, config.save_total_limit + 1) if saves else int(keep_best)
    present = sum(
        file.stat().st_size
        for folder in checkpoints(out)
        for file in folder.rglob("*")
        if file.is_file()
    )
    needed, free = count * each + result, shutil.disk_usage(out).free + present
    if free < needed:
        raise ShardError(
            f"{out}: found {free / 2**30:.3g} GiB of free space; expected at least "
            f"{needed / 2**30:.3g} GiB for {count} checkpoints of {each / 2**30:.3g} GiB and the "
            "result; make room, or lower --save-total-limit"
        )
