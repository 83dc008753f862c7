"""What the training stages share: one output folder is one run of one recipe.

A run's folder holds `recipe.json` from the start, `checkpoint-N` while it trains, then the
model, its tokenizer and `train_log.jsonl`, and at last `manifest.json`, which marks it as
finished. Calling a stage again continues the run from its last whole checkpoint; a
checkpoint of another recipe, or a finished run, is refused.
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lopd.data import Collator, SequenceDataset, Source
from lopd.errors import ConfigError
from lopd.files import TEMP_SUFFIX, pretty_json, write_atomic
from lopd.models import load_model, load_tokenizer
from lopd.provenance import MANIFEST_NAME
from lopd.step import Objective

logger = logging.getLogger(__name__)

RECIPE_NAME = "recipe.json"
# How a run is carried out and where things are; inputs count by their digests.
NOT_RECIPE = frozenset(
    {
        "out",
        "model",
        "data",
        "student",
        "cache",
        "device",
        "log_every",
        "save_every",
        "save_total_limit",
        "report_to",
        "verify",
    }
)


def begin(config: Any, *, base: dict[str, Any], **inputs: str) -> Path | None:
    """Claim `config.out` for this recipe; returns the checkpoint to continue from, if any.

    Args:
        base: description of the model that training starts from.
        inputs: digests of what else the run reads.

    Raises:
        ConfigError: the folder holds a finished run, a checkpoint of another recipe, or
            something else.
    """
    out = Path(config.out)
    settings = {key: value for key, value in asdict(config).items() if key not in NOT_RECIPE}
    identity = {key: base[key] for key in ("weights", "config", "tokenizer")}
    recipe = json.loads(json.dumps({**settings, **inputs, "base": identity}))
    checkpoint, file = last_checkpoint(out), out / RECIPE_NAME
    if (out / MANIFEST_NAME).exists():
        raise ConfigError(f"{out}: holds a finished run; choose another --out, or remove it")
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        changed = sorted(k for k in found.keys() | recipe.keys() if found.get(k) != recipe.get(k))
        if changed and checkpoint is not None:
            key = changed[0]
            raise ConfigError(
                f"{out}: holds {checkpoint.name} of another recipe ({key} was {found.get(key)!r}, "
                f"is {recipe.get(key)!r}); choose another --out, or remove the folder"
            )
    elif out.is_dir() and any(item.suffix != TEMP_SUFFIX for item in out.iterdir()):
        raise ConfigError(f"{out}: is not empty and holds no {RECIPE_NAME}; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(file, pretty_json(recipe))
    return checkpoint


def last_checkpoint(out: Path) -> Path | None:
    """The latest `checkpoint-N` that was written to its end."""
    whole = [state.parent for state in out.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda folder: int(folder.name.removeprefix("checkpoint-")), default=None)


def train(
    config: Any, source: Source, objective: Objective, *, model_path: str, checkpoint: Path | None
) -> dict[str, Any]:
    """Train the model at `model_path`, save it with its tokenizer to `config.out`.

    Returns what the manifest says of the data: sequences trained on, share dropped.
    """
    from lopd.trainer import LopdTrainer

    model = load_model(model_path, dtype=config.dtype, device=config.device)
    tokenizer = load_tokenizer(model_path)
    dataset = SequenceDataset(
        source,
        context=getattr(model.config.get_text_config(), "max_position_embeddings", None),
        vocab_size=model.get_input_embeddings().weight.shape[0],
        drop_truncated=config.drop_truncated,
    )
    trainer = LopdTrainer(
        model,
        config.training_arguments(config.out),
        objective,
        dataset,
        Collator(config.loss_aggregation, pad_token_id=tokenizer.pad_token_id or 0),
    )
    if checkpoint is not None:
        logger.info("%s: continues from %s", config.out, checkpoint.name)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.model.save_pretrained(config.out)
    tokenizer.save_pretrained(config.out)
    return {"sequences": len(dataset), "dropped_share": dataset.dropped_share}
