"""The model that a training run ends with: that of the last step or of the best checkpoint."""

from pathlib import Path
from typing import Any

from lopd.errors import ShardError
from lopd.models.load import load_model
from lopd.models.lora import add_lora
from lopd.training.checkpoints import is_whole


def result_model(config: Any, trainer: Any, model_path: str, state: dict[str, Any] | None) -> Any:
    """The result of a run, with its adapters if it has any.

    A model other than the trainer's is on the CPU, because the trainer's and its optimizer are
    still on the GPU.

    Args:
        config: settings of the stage.
        trainer: after training.
        model_path: folder of the model that training started from.
        state: unsharded weights of the last step if the trainer's model is sharded, else None.

    Raises:
        ShardError: the checkpoint with the best held-out KL is missing or torn.
    """
    if trainer.holdout is not None and trainer.holdout.keep_best:
        return _best_model(config, trainer, model_path)
    if state is None:
        return trainer.model
    model = load_model(model_path, dtype=config.dtype, device="cpu")
    if config.lora_rank:
        model = add_lora(model, config)
    model.load_state_dict(state)
    return model


def _best_model(config: Any, trainer: Any, model_path: str) -> Any:
    folder = Path(config.out) / f"checkpoint-{trainer.state.best_global_step}"
    if not is_whole(folder):
        raise ShardError(
            f"{folder}: the checkpoint with the best held-out KL is missing or torn; restore it "
            "and rerun the same command, or remove the run's folder to start again"
        )
    if not config.lora_rank:
        return load_model(str(folder), dtype=config.dtype, device="cpu")
    from peft import PeftModel

    model = load_model(model_path, dtype=config.dtype, device="cpu")
    return PeftModel.from_pretrained(model, folder)
