"""Settings of a training run, shared by the stages that train."""

import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from lopd.errors import ConfigError
from lopd.models.load import resolve_device, resolve_dtype
from lopd.models.lora import LoraOptions
from lopd.models.packing import PATHS
from lopd.training.batch import LOSS_AGGREGATIONS

# name: (lowest, highest, in words)
_LARGEST = sys.float_info.max
_POSITIVE = (math.ulp(0.0), _LARGEST, "a positive number")
_NOT_NEGATIVE = (0, _LARGEST, "0 or a positive number")
_AT_LEAST_ONE = (1, sys.maxsize, "at least 1")
_BELOW_ONE = (0, math.nextafter(1.0, 0.0), "a number in [0, 1)")
RANGES: dict[str, tuple[float, float, str]] = {
    "batch_size": _AT_LEAST_ONE,
    "gradient_accumulation_steps": _AT_LEAST_ONE,
    "log_every": _AT_LEAST_ONE,
    "save_total_limit": _AT_LEAST_ONE,
    "num_epochs": _POSITIVE,
    "learning_rate": _POSITIVE,
    "adam_epsilon": _POSITIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "save_every": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "adam_beta1": _BELOW_ONE,
    "adam_beta2": _BELOW_ONE,
    "min_lr_ratio": (0, 1, "a number in [0, 1]"),
    "seed": (0, 2**32 - 1, "an integer in [0, 2**32)"),
}
WATCH_RANGES: dict[str, tuple[float, float, str]] = {
    "stale_ess": _BELOW_ONE,
    "stale_every": _AT_LEAST_ONE,
    "eval_steps": _AT_LEAST_ONE,
    "patience": _NOT_NEGATIVE,
}
PATIENCE_S = 3 * 3600  # of processes that wait while the first writes a checkpoint or the result
DEFAULT_OPTIM = "adamw_torch_fused"
MIXED_PRECISIONS = ("none", "bf16")
_UNITS = {"": 1, "b": 1} | {
    letter + unit: base**power
    for power, letter in enumerate("kmgt", 1)
    for unit, base in (("b", 1000), ("ib", 1024))
}


@dataclass(kw_only=True)
class TrainOptions(LoraOptions):
    """Settings of a training run, shared by `lopd sft` and `lopd distill`."""

    max_steps: int = field(
        default=-1, metadata={"help": "Optimizer steps; -1 leaves it to num_epochs."}
    )
    num_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    batch_size: int = field(default=8, metadata={"help": "Sequences in a micro-batch."})
    gradient_accumulation_steps: int = field(
        default=1,
        metadata={"help": "An optimizer step has so many times batch_size sequences a process."},
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={"help": "Pack a step's sequences into rows of so many tokens; None: pad."},
    )
    attention: str = field(
        default="auto",
        metadata={"help": "Of packs: auto, flash_attention_3, flash_attention_2, varlen, sdpa."},
    )
    learning_rate: float = field(default=1e-5, metadata={"help": "Peak of the schedule (AdamW)."})
    lr_scheduler_type: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_min_lr"
    ] = field(default="cosine", metadata={"help": "Schedule, by its name in transformers."})
    min_lr_ratio: float = field(
        default=0.0, metadata={"help": "End of cosine_with_min_lr, as a share of the peak."}
    )
    warmup_steps: int = field(default=0, metadata={"help": "Linear warm-up from 0."})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's beta1."})
    adam_beta2: float = field(default=0.98, metadata={"help": "AdamW's beta2."})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "AdamW's epsilon."})
    weight_decay: float = field(
        default=0.0, metadata={"help": "Decoupled decay of matrices; norms and biases have none."}
    )
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "Gradients are scaled down to this norm; 0 leaves them."}
    )
    loss_aggregation: Literal["token_mean", "sequence_mean"] = field(
        default="token_mean",
        metadata={"help": "Mean over the step's tokens, or over its sequences' means."},
    )
    drop_truncated: bool = field(
        default=False, metadata={"help": "Leave out sequences cut off at their length limit."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations in the backward pass."}
    )
    optim: str = field(
        default=DEFAULT_OPTIM,
        metadata={"help": "Optimizer, by its name in transformers; such as adafactor."},
    )
    workspace_bytes: int | str | None = field(
        default=None,
        metadata={"help": "Bound on what the loss allocates: 2GiB, 500MB, bytes; None: its own."},
    )
    mixed_precision: Literal["none", "bf16"] = field(
        default="none", metadata={"help": "bf16: float32 weights, bfloat16 matrix products."}
    )
    fsdp: bool = field(
        default=False,
        metadata={"help": "Shard weights, gradients and optimizer over the processes (FSDP2)."},
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Of weights, gradients and optimizer: float32 or bfloat16."},
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda."})
    seed: int = field(default=0, metadata={"help": "Seed of the shuffling and of dropout."})
    save_every: int = field(default=500, metadata={"help": "Steps between checkpoints; 0: none."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints kept."})
    log_every: int = field(default=10, metadata={"help": "Steps between log lines."})
    report_to: str = field(default="none", metadata={"help": "none, tensorboard, wandb, ..."})

    def __post_init__(self) -> None:
        _check_ranges(self, RANGES)
        self.check_lora()
        if self.max_steps != -1 and self.max_steps < 1:
            raise ConfigError(f"max_steps: found {self.max_steps}; expected at least 1, or -1")
        if self.max_steps != -1 and self.warmup_steps > self.max_steps:
            raise ConfigError(
                f"warmup_steps: found {self.warmup_steps}; the run ends at max_steps="
                f"{self.max_steps}, before the peak is reached; expected no more than that"
            )
        if self.loss_aggregation not in LOSS_AGGREGATIONS:
            raise ConfigError(
                f"loss_aggregation: found '{self.loss_aggregation}'; expected one of "
                f"{', '.join(LOSS_AGGREGATIONS)}"
            )
        if resolve_dtype(self.dtype) == torch.float16:
            raise ConfigError(
                "dtype: float16 weights cannot be trained without loss scaling; use float32 or "
                "bfloat16"
            )
        if resolve_device(self.device).type not in ("cpu", "cuda"):
            raise ConfigError(f"device: found '{self.device}'; training runs on auto, cpu or cuda")
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < 1:
            raise ConfigError(
                f"max_tokens_per_batch: found {self.max_tokens_per_batch}; expected at least 1"
            )
        if self.attention not in PATHS:
            raise ConfigError(
                f"attention: found '{self.attention}'; expected one of {', '.join(PATHS)}"
            )
        if self.attention != "auto" and self.max_tokens_per_batch is None:
            raise ConfigError("attention: only packs use it; give --max_tokens_per_batch")
        self.schedule()
        self._check_memory()
        _check_report_to(self.report_to)

    def _check_memory(self) -> None:
        if self.mixed_precision not in MIXED_PRECISIONS:
            raise ConfigError(
                f"mixed_precision: found '{self.mixed_precision}'; expected one of "
                f"{', '.join(MIXED_PRECISIONS)}"
            )
        if self.mixed_precision != "none" and self.dtype != "float32":
            raise ConfigError(
                f"mixed_precision: found {self.mixed_precision} with dtype {self.dtype}; it is for "
                "float32 weights"
            )
        if self.workspace_bytes is not None:
            parse_bytes("workspace_bytes", self.workspace_bytes)
        if self.optim != DEFAULT_OPTIM:
            optimizer_class(self.optim)

    @property
    def workspace(self) -> int | None:
        """`workspace_bytes` as a number."""
        if self.workspace_bytes is None:
            return None
        return parse_bytes("workspace_bytes", self.workspace_bytes)

    def schedule(self) -> tuple[str, dict[str, float]]:
        """Name and extra arguments for `transformers.get_scheduler`."""
        kind = self.lr_scheduler_type
        if kind == "cosine_with_min_lr":
            if not 0 < self.min_lr_ratio <= 1:
                raise ConfigError(
                    f"min_lr_ratio: found {self.min_lr_ratio}; {kind} expects a number in (0, 1]; "
                    "for 0 use cosine"
                )
            return kind, {"min_lr_rate": self.min_lr_ratio}
        if self.min_lr_ratio:
            raise ConfigError(f"min_lr_ratio: {kind} does not use it; choose cosine_with_min_lr")
        if kind == "constant" and self.warmup_steps:
            raise ConfigError("warmup_steps: constant has none; choose constant_with_warmup")
        return kind, {}

    def training_arguments(self, out: str | Path) -> Any:
        """The same as `transformers.TrainingArguments`, with checkpoints under `out`."""
        from transformers import TrainingArguments

        device = resolve_device(self.device)
        if device.index:
            raise ConfigError(
                f"device: found '{self.device}'; choose a GPU for training by CUDA_VISIBLE_DEVICES"
            )
        kind, schedule = self.schedule()
        args = TrainingArguments(
            output_dir=str(out),
            max_steps=self.max_steps,
            num_train_epochs=self.num_epochs,
            per_device_train_batch_size=self.batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            learning_rate=self.learning_rate,
            lr_scheduler_type=kind,
            lr_scheduler_kwargs=schedule,
            warmup_steps=self.warmup_steps,
            adam_beta1=self.adam_beta1,
            adam_beta2=self.adam_beta2,
            adam_epsilon=self.adam_epsilon,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            gradient_checkpointing=self.gradient_checkpointing,
            optim=self.optim,
            bf16=self.mixed_precision == "bf16",
            fsdp=self.fsdp,
            fsdp_config={"state_dict_type": "FULL_STATE_DICT"} if self.fsdp else None,
            use_cpu=device.type == "cpu",
            seed=self.seed,
            save_strategy="steps" if self.save_every else "no",
            save_steps=self.save_every or 1,
            save_total_limit=self.save_total_limit,
            logging_steps=self.log_every,
            logging_nan_inf_filter=False,
            report_to=self.report_to,
            disable_tqdm=True,
            remove_unused_columns=False,
            ddp_timeout=PATIENCE_S,
        )
        assert args.device.type == device.type
        args._n_gpu = min(args.n_gpu, 1)  # several visible GPUs would mean DataParallel
        return args


@dataclass(kw_only=True)
class WatchOptions(TrainOptions):
    """Settings of a training run that watches its drift and sequences kept out of it."""

    stale_ess: float = field(
        default=0.5,
        metadata={"help": "Warn where a step's effective share of tokens is below this; 0: never."},
    )
    stale_every: int = field(
        default=100, metadata={"help": "Least number of steps between two such warnings."}
    )
    holdout: float = field(
        default=0.0,
        metadata={"help": "Sequences kept out of training: a share below 1, or a number; 0: none."},
    )
    eval_steps: int = field(
        default=100, metadata={"help": "Steps between evaluations of the held-out sequences."}
    )
    keep_best: bool = field(
        default=False,
        metadata={"help": "The result is the checkpoint that is best on the held-out sequences."},
    )
    patience: int = field(
        default=0,
        metadata={"help": "Stop after so many evaluations without improvement; 0: never."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ranges(self, WATCH_RANGES)
        if not (0 <= self.holdout < 1 or (1 <= self.holdout < math.inf and self.holdout % 1 == 0)):
            raise ConfigError(
                f"holdout: found {self.holdout}; expected a share in [0, 1) or a whole number"
            )
        for name in ("keep_best", "patience"):
            if getattr(self, name) and not self.holdout:
                raise ConfigError(
                    f"{name}: nothing is held out to judge by; give --holdout, a share or a number "
                    "of sequences"
                )


def parse_bytes(name: str, value: int | str) -> int:
    """Bytes of `24GiB`, `80GB`, `24000MiB` or a number of bytes.

    Raises:
        ConfigError: it is not such a size, or not positive.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(value).lower())
    if found is None or found[2] not in _UNITS or not (size := float(found[1]) * _UNITS[found[2]]):
        raise ConfigError(f"{name}: found '{value}'; expected a size such as 24GiB, 80GB or bytes")
    return int(size)


def optimizer_class(optim: str) -> tuple[Any, dict[str, Any]]:
    """Class and keyword arguments that Trainer takes for a name.

    Raises:
        ConfigError: the name is unknown, its package is not installed, or it wants settings that
            there are none of here.
    """
    from transformers import Trainer, TrainingArguments
    from transformers.training_args import OptimizerNames

    known = [item.value for item in OptimizerNames]
    if optim not in known:
        raise ConfigError(f"optim: found '{optim}'; expected one of {', '.join(known)}")
    args = TrainingArguments(output_dir="unused", optim=optim, use_cpu=True)
    try:
        return Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"optim: '{optim}' cannot be used here ({error})") from error


def _check_ranges(options: Any, ranges: dict[str, tuple[float, float, str]]) -> None:
    for name, (low, high, expected) in ranges.items():
        value = getattr(options, name)
        if not low <= value <= high:  # which NaN fails too
            raise ConfigError(f"{name}: found {value}; expected {expected}")


def _check_report_to(name: str) -> None:
    """Refuse a tracker that transformers does not know or that is not installed."""
    if name == "none":
        return
    from transformers.integrations import integration_utils

    if name not in integration_utils.INTEGRATION_TO_CALLBACK:
        known = ", ".join(["none", *sorted(integration_utils.INTEGRATION_TO_CALLBACK)])
        raise ConfigError(f"report_to: found '{name}'; expected one of {known}")
    if name not in integration_utils.get_available_reporting_integrations():
        raise ConfigError(f"report_to: '{name}' is not installed; install it, or use none")
