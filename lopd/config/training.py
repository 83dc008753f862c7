"""Settings of a training run, shared by the stages that train."""

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lopd.config.device import check_device, resolve_device
from lopd.config.fields import Settings, parse_bytes, setting, setting_of
from lopd.config.model_code import CodeOptions
from lopd.config.objective import Objective
from lopd.errors import ConfigError

ALL_LINEAR = "all-linear"
ATTENTION = ("auto", "flash_attention_3", "flash_attention_2", "varlen", "sdpa")
PATIENCE_S = 3 * 3600  # how long processes wait while the first writes a checkpoint or the result
DEFAULT_OPTIM = "adamw_torch_fused"
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_min_lr"]
_lora = partial(setting, group="LoRA")
_memory = partial(setting, group="Memory")
_optimizer = partial(setting, group="Optimizer")
_logging = partial(setting, group="Logging and checkpoints", identity=False)
_monitoring = partial(setting, group="Hold-out and staleness")
_NAMED_ALIKE = (  # in transformers.TrainingArguments
    *("max_steps", "gradient_accumulation_steps", "learning_rate", "warmup_steps", "adam_beta1"),
    *("adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm", "gradient_checkpointing"),
    *("optim", "fsdp", "seed", "save_total_limit", "report_to"),
)


def refuse_unused(config: Any, names: tuple[str, ...], why: str) -> None:
    """Refuse settings that differ from their defaults and have no effect.

    Raises:
        ConfigError: one does; ends with `why`.
    """
    for item in fields(config):
        if item.name in names and (value := getattr(config, item.name)) != item.default:
            raise ConfigError(f"{item.name}: found {value!r}, which has no effect: {why}")


@dataclass(kw_only=True)
class LoraOptions(Settings):
    """Settings of a LoRA: `W + (lora_alpha / lora_rank) * B A`, with W frozen."""

    lora_rank: int = _lora(
        0, within="[0, inf)", help="Rank of the LoRA adapters; 0 trains the whole model."
    )
    lora_alpha: float = _lora(
        32.0, within="(0, inf)", help="Adapter output is scaled by lora_alpha / lora_rank."
    )
    lora_dropout: float = _lora(
        0.0,
        within="[0, 1)",
        help="Dropout on the adapters' inputs; must be 0 if the output head is a target.",
    )
    lora_targets: str = _lora(
        ALL_LINEAR,
        help="all-linear (every linear layer except the output head), or layer names separated by "
        "commas, such as q_proj,v_proj.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.target_names):
            raise ConfigError(
                f"lora_targets: found '{self.lora_targets}'; expected {ALL_LINEAR} or layer names "
                "separated by commas, such as q_proj,v_proj"
            )
        if not self.lora_rank:
            names = ("lora_alpha", "lora_dropout", "lora_targets")
            refuse_unused(self, names, "lora_rank is 0, so there are no adapters; set lora_rank")

    @property
    def target_names(self) -> list[str]:
        """The names in `lora_targets`."""
        return [name.strip() for name in self.lora_targets.split(",")]


@dataclass(kw_only=True)
class MemoryOptions(LoraOptions, CodeOptions):
    """Settings that decide how much memory training takes; `lopd plan` has them too."""

    dtype: str = _memory(
        "float32",
        choices=("float32", "bfloat16"),
        remedy="; float16 is not supported, since it needs loss scaling",
        help="Dtype of weights, gradients and optimizer state.",
    )
    batch_size: int = _memory(
        8,
        within="[1, inf)",
        identity=False,  # only its product with gradient_accumulation_steps does
        help="Sequences per micro-batch, per process.",
    )
    max_tokens_per_batch: int | None = _memory(
        None,
        within="[1, inf)",
        identity=False,
        help="Pack the sequences of a step into rows of at most this many tokens, instead of "
        "padded batches.",
    )
    gradient_checkpointing: bool = _memory(
        False, identity=False, help="Recompute activations in the backward pass."
    )
    optim: str = _optimizer(
        DEFAULT_OPTIM, help="Optimizer, by its name in transformers, such as adafactor."
    )
    workspace_bytes: int | str | None = _memory(
        None,
        identity=False,
        help="Limit on the memory that the loss allocates: 2GiB, 500MB or a number of bytes. By "
        "default the loss chooses.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.workspace

    @property
    def workspace(self) -> int | None:
        """`workspace_bytes` as a number."""
        if self.workspace_bytes is None:
            return None
        return parse_bytes("workspace_bytes", self.workspace_bytes)


@dataclass(kw_only=True)
class MemorySettings(MemoryOptions):
    """Settings of a training run that decide how much memory it needs."""

    sequence_length: int = setting(
        4096, within="[1, inf)", group="Memory", help="Tokens per sequence, prompt included."
    )
    objective: Literal["reverse_kl", "forward_kl", "jsd", "policy_gradient", "log_ratio"] = setting(
        "reverse_kl", group="Objective", help="Loss that is minimised at every response token."
    )
    dense_share: float | None = setting_of(Objective, "dense_share")
    tolerance: float | None = setting_of(Objective, "tolerance")
    k: int = setting(
        64, within="[1, inf)", group="Cache", help="Teacher tokens per position in the cache."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        Objective(self.objective, dense_share=self.dense_share, tolerance=self.tolerance)
        if self.max_tokens_per_batch is not None and (
            self.max_tokens_per_batch < self.sequence_length
        ):
            raise ConfigError(
                f"max_tokens_per_batch: found {self.max_tokens_per_batch}; expected at least "
                f"sequence_length, {self.sequence_length}"
            )

    @property
    def rows(self) -> tuple[int, int]:
        """Shape [B, T] of a micro-batch."""
        if self.max_tokens_per_batch is not None:
            return 1, self.max_tokens_per_batch
        return self.batch_size, self.sequence_length


@dataclass(kw_only=True)
class TrainOptions(MemoryOptions):
    """Settings of a training run, shared by `lopd sft` and `lopd distill`."""

    max_steps: int = _optimizer(
        -1, within="[1, inf) or -1", help="Number of optimizer steps; -1 trains for num_epochs."
    )
    num_epochs: float = _optimizer(
        1.0, within="(0, 1000000]", help="Number of passes over the data, unless max_steps is set."
    )
    gradient_accumulation_steps: int = _memory(
        1, within="[1, inf)", identity=False, help="Micro-batches per optimizer step, per process."
    )
    attention: str = _memory(
        "auto",
        choices=ATTENTION,
        identity=False,
        help="Attention implementation for packed sequences (max_tokens_per_batch).",
    )
    learning_rate: float = _optimizer(
        1e-5, within="(0, inf)", help="Peak learning rate of the schedule."
    )
    lr_scheduler_type: Schedule = setting(
        "cosine", group="Optimizer", help="Learning rate schedule, by its name in transformers."
    )
    min_lr_ratio: float = _optimizer(
        0.0,
        within="[0, 1]",
        help="Final learning rate of cosine_with_min_lr, as a share of the peak.",
    )
    warmup_steps: int = _optimizer(0, within="[0, inf)", help="Steps of linear warm-up from 0.")
    adam_beta1: float = _optimizer(0.9, within="[0, 1)", help="AdamW's beta1.")
    adam_beta2: float = _optimizer(0.98, within="[0, 1)", help="AdamW's beta2.")
    adam_epsilon: float = _optimizer(1e-8, within="(0, inf)", help="AdamW's epsilon.")
    weight_decay: float = _optimizer(
        0.0, within="[0, inf)", help="Decoupled weight decay; norms and biases are not decayed."
    )
    max_grad_norm: float = _optimizer(
        1.0, within="[0, inf)", help="Clip gradients to this norm; 0 disables clipping."
    )
    loss_aggregation: Literal["token_mean", "sequence_mean"] = setting(
        "token_mean",
        group="Objective",
        help="Average the loss over the tokens of a step, or over the means of its sequences.",
    )
    drop_truncated: bool = setting(
        False,
        group="Model and data",
        help="Leave out sequences that were cut off at their length limit.",
    )
    mixed_precision: Literal["none", "bf16"] = _memory(
        "none", help="bf16: float32 weights with bfloat16 matrix products."
    )
    fsdp: bool = setting(
        False,
        group="Devices and processes",
        help="Shard weights, gradients and optimizer state across processes (FSDP2).",
    )
    device: str = setting(
        "auto", group="Devices and processes", identity=False, help="auto, cpu or cuda."
    )
    seed: int = _optimizer(
        0, within="[0, 4294967296)", help="Seed of the data order and of dropout."
    )
    save_every: int = _logging(
        500, within="[0, inf)", help="Save a checkpoint every N steps; 0 saves none."
    )
    save_total_limit: int = _logging(2, within="[1, inf)", help="Number of checkpoints to keep.")
    log_every: int = _logging(10, within="[1, inf)", help="Log every N steps.")
    report_to: str = _logging(
        "none", help="Experiment tracker of transformers, such as tensorboard or wandb."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_steps != -1:
            refuse_unused(self, ("num_epochs",), "max_steps ends the run; set one of the two")
        if self.max_steps != -1 and self.warmup_steps > self.max_steps:
            raise ConfigError(
                f"warmup_steps: found {self.warmup_steps}; the run ends at max_steps="
                f"{self.max_steps}, before the warm-up does; expected at most max_steps"
            )
        check_device(self.device)
        if self.attention != "auto" and self.max_tokens_per_batch is None:
            raise ConfigError(
                "attention: applies to packed sequences only; set max_tokens_per_batch"
            )
        if self.mixed_precision != "none" and self.dtype != "float32":
            raise ConfigError(
                f"mixed_precision: found {self.mixed_precision} with dtype {self.dtype}; it is for "
                "float32 weights"
            )
        self.schedule()
        if not self.save_every:
            names = ("save_total_limit",)
            refuse_unused(self, names, "save_every is 0, so no checkpoint is saved; set save_every")
        if self.optim != DEFAULT_OPTIM:
            self._check_optimizer()
        _check_report_to(self.report_to)

    def _check_optimizer(self) -> None:
        """Refuse an optimizer that is not there, and settings of Adam that it does not take."""
        _, arguments = optimizer_class(self.optim)
        for argument, names in (
            ("betas", ("adam_beta1", "adam_beta2")),
            ("eps", ("adam_epsilon",)),
        ):
            if argument not in arguments:
                refuse_unused(self, names, f"{self.optim} does not take it; leave it out")

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
            raise ConfigError("warmup_steps: constant has no warm-up; choose constant_with_warmup")
        return kind, {}

    def training_arguments(self, out: str | Path) -> Any:
        """These settings as `transformers.TrainingArguments`, with checkpoints under `out`."""
        from transformers import TrainingArguments

        device = resolve_device(self.device)
        if device.index:
            raise ConfigError(
                f"device: found '{self.device}'; choose the GPU with CUDA_VISIBLE_DEVICES, and set "
                "device to cuda"
            )
        kind, schedule = self.schedule()
        same = {name: getattr(self, name) for name in _NAMED_ALIKE}
        args = TrainingArguments(
            output_dir=str(out),
            num_train_epochs=self.num_epochs,
            per_device_train_batch_size=self.batch_size,
            lr_scheduler_type=kind,
            lr_scheduler_kwargs=schedule,
            bf16=self.mixed_precision == "bf16",
            fsdp_config={"state_dict_type": "FULL_STATE_DICT"} if self.fsdp else None,
            use_cpu=device.type == "cpu",
            save_strategy="steps" if self.save_every else "no",
            save_steps=self.save_every or 1,
            logging_steps=self.log_every,
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            run_name="/".join(Path(out).resolve().parts[-2:]),  # for trackers
            remove_unused_columns=False,
            ddp_timeout=PATIENCE_S,
            **same,
        )
        assert args.device.type == device.type
        args._n_gpu = min(args.n_gpu, 1)  # with several visible GPUs Trainer would use DataParallel
        return args


@dataclass(kw_only=True)
class MonitoringOptions(TrainOptions):
    """TrainOptions, and settings for staleness warnings and held-out sequences."""

    stale_ess: float = _monitoring(
        0.5,
        within="[0, 1)",
        identity=False,
        help="Warn when the token-level effective sample size, in the median of the last 20 steps, "
        "falls below this share; 0 disables.",
    )
    stale_every: int = _monitoring(
        100,
        within="[1, inf)",
        identity=False,
        help="Minimum number of steps between two such warnings.",
    )
    holdout: float = _monitoring(
        0.0,
        within="[0, inf)",
        help="Sequences to hold out from training, by whole prompts: a share below 1, or a number; "
        "0 holds out none.",
    )
    eval_steps: int = _monitoring(
        100, within="[1, inf)", help="Evaluate the held-out sequences every N steps."
    )
    keep_best: bool = _monitoring(
        False, help="Save the weights that are best on the held-out sequences as the result."
    )
    patience: int = _monitoring(
        0,
        within="[0, inf)",
        help="Stop after N evaluations without improvement; 0 never stops early.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.holdout > 1 and self.holdout % 1:
            raise ConfigError(
                f"holdout: found {self.holdout}; expected a share in [0, 1) or a whole number"
            )
        if not self.holdout:
            names = ("keep_best", "patience", "eval_steps")
            why = (
                "nothing is held out to evaluate on; set holdout, a share or a number of sequences"
            )
            refuse_unused(self, names, why)
        if not self.stale_ess:
            refuse_unused(self, ("stale_every",), "stale_ess is 0, which disables the warning")


def optimizer_class(optim: str) -> tuple[Any, dict[str, Any]]:
    """Class and keyword arguments of an optimizer, by its name in transformers.

    Raises:
        ConfigError: the name is unknown, its package is not installed, or it needs settings that
            TrainOptions does not have.
    """
    from transformers import Trainer, TrainingArguments
    from transformers.training_args import OptimizerNames

    known = [item.value for item in OptimizerNames]
    if optim not in known:
        raise ConfigError(f"optim: found '{optim}'; expected one of {', '.join(known)}")
    args = TrainingArguments(output_dir="unused", optim=optim, use_cpu=True)
    try:
        kind, arguments = Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"optim: '{optim}' cannot be used here ({error})") from error
    return kind, arguments


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
