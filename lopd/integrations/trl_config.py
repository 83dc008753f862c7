"""Settings of the TRL trainer: those of `SFTConfig`, and those of `lopd distill` about the loss."""

from dataclasses import dataclass, field, fields
from typing import Any

from trl import SFTConfig

from lopd.config.distill import DistillConfig
from lopd.config.training import ATTENTION
from lopd.errors import ConfigError

# Settings of `SFTConfig` that would do nothing here, with what does instead.
_TOKENS = "sequences are tokens already"
_NO_LOGITS = "no logits are made"
_UNUSED = {
    "packing": "padding_free puts the sequences of a micro-batch into one row",
    "eval_packing": "padding_free puts the sequences of a micro-batch into one row",
    "packing_strategy": "padding_free puts the sequences of a micro-batch into one row",
    "max_length": "sequences stay whole; roll out with fewer --max-new-tokens",
    "truncation_mode": "sequences stay whole; roll out with fewer --max-new-tokens",
    "completion_only_loss": "the loss mask of a sequence decides",
    "assistant_only_loss": "the loss mask of a sequence decides",
    "dataset_kwargs": _TOKENS,
    "dataset_text_field": _TOKENS,
    "dataset_num_proc": _TOKENS,
    "shuffle_dataset": "each epoch has another order already",
    "pad_token": "padding is masked",
    "pad_to_multiple_of": "micro-batches are as long as their longest sequence",
    "loss_type": "objective is the loss",
    "label_smoothing_factor": "objective is the loss",
    "average_tokens_across_devices": "the loss is a mean over the tokens of all processes",
    "remove_unused_columns": "the data collator reads all columns",
    "prediction_loss_only": _NO_LOGITS,
    "eval_accumulation_steps": _NO_LOGITS,
    "fp16_full_eval": "evaluation has the precision of training",
    "bf16_full_eval": "evaluation has the precision of training",
}


def _of_distill(name: str) -> Any:
    """A field with the default and the help of `lopd distill`'s."""
    found = next(each for each in fields(DistillConfig) if each.name == name)
    return field(default=found.default, metadata={"help": found.metadata["help"]})


@dataclass
class OfflineDistillationConfig(SFTConfig):
    """`trl.SFTConfig`, and the settings of the loss, with the names of `lopd distill`.

    Settings of `SFTConfig` that would have no effect are refused. `learning_rate` has the default
    of `lopd distill`. With `padding_free` a micro-batch is one row of sequences end to end, with
    the attention for packs of `lopd distill`.

    Raises:
        ConfigError: a setting has no effect, is out of range or does not belong to the objective.

    >>> OfflineDistillationConfig("out", objective="jsd", beta=0.3, bf16=False).tail
    'bucket'
    """

    objective: str = _of_distill("objective")
    tail: str = _of_distill("tail")
    beta: float | None = _of_distill("beta")
    advantage_clip: float | None = _of_distill("advantage_clip")
    importance: str = _of_distill("importance")
    importance_cap: float | None = _of_distill("importance_cap")
    clip_range: float | None = _of_distill("clip_range")
    delta: float | None = _of_distill("delta")
    entropy_bonus: float | None = _of_distill("entropy_bonus")
    token_weights: str = _of_distill("token_weights")
    weight_beta: float | None = _of_distill("weight_beta")
    weight_share: float | None = _of_distill("weight_share")
    weight_entropy: float | None = _of_distill("weight_entropy")
    dense_share: float | None = _of_distill("dense_share")
    tolerance: float | None = _of_distill("tolerance")
    temperature: float | None = _of_distill("temperature")
    support: str = _of_distill("support")
    loss_aggregation: str = _of_distill("loss_aggregation")
    drop_truncated: bool = _of_distill("drop_truncated")
    workspace_bytes: str | None = _of_distill("workspace_bytes")
    verify: bool = _of_distill("verify")
    allow_teacher_mismatch: bool = _of_distill("allow_teacher_mismatch")
    allow_student_mismatch: bool = _of_distill("allow_student_mismatch")
    allow_tokenizer_mismatch: bool = _of_distill("allow_tokenizer_mismatch")
    allow_eos_mismatch: bool = _of_distill("allow_eos_mismatch")
    allow_incomplete_cache: bool = _of_distill("allow_incomplete_cache")
    learning_rate: float = _of_distill("learning_rate")
    attention: str = field(
        default="auto", metadata={"help": "Attention implementation for rows without padding."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Not used: sequences stay whole."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Not used: the collator reads all columns."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for each in fields(self):
            if each.name in _UNUSED and getattr(self, each.name) not in (each.default, None):
                raise ConfigError(
                    f"{each.name}: found {getattr(self, each.name)!r}, which has no effect: "
                    f"{_UNUSED[each.name]}; leave it out"
                )
        if self.attention not in ATTENTION:
            known = ", ".join(ATTENTION)
            raise ConfigError(f"attention: found '{self.attention}'; expected one of {known}")
        if self.attention != "auto" and not self.padding_free:
            raise ConfigError("attention: applies to rows without padding only; set padding_free")
        self.distill_config()

    def distill_config(self, student: str = "model", cache: str = "dataset") -> DistillConfig:
        """The settings of the loss as those of `lopd distill` of this student on this cache.

        Raises:
            ConfigError: a setting is out of range or does not belong to the objective.
        """
        ours = {each.name for each in fields(self)} - {each.name for each in fields(SFTConfig)}
        settings = {name: getattr(self, name) for name in ours - {"attention"}}
        return DistillConfig(student=student, cache=cache, out="output_dir", **settings)
