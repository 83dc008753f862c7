"""Peak memory of a training run, part by part, before there is one (`lopd plan`).

    weights, gradients   the model on the meta device: shapes and dtypes without memory
    optimizer            its state after a real step on meta parameters
    loss                 the memory model of `lopd_kernels.workspace`, with its choice of schedule
    activations          what a forward on the meta device saves for the backward

Their sum is the peak where gradients are accumulated, and a bound of it where they are not.
Every token bears loss and every sequence is as long as `sequence_length`. Not counted are the
CUDA context, what single operators hold for a moment, and what the allocator leaves unused:
for these a share of the memory, `reserve`, is kept free.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from torch import nn

from lopd.config.fields import setting
from lopd.errors import ConfigError
from lopd.models.head import lm_head
from lopd.training.dry_run import activation_bytes, dry_inputs, held_bytes, optimizer_bytes
from lopd.training.options import MemoryOptions, TrainOptions
from lopd_kernels.workspace import workspace_needed

SMALLEST_WORKSPACE = 128 << 20
SHARED = tuple(item.name for item in fields(MemoryOptions))  # settings of a run and of a plan


@dataclass(kw_only=True)
class MemorySettings(MemoryOptions):
    """Settings of a training run that decide how much memory it needs."""

    sequence_length: int = setting(
        4096, within="[1, inf)", group="Memory", help="Tokens per sequence, prompt included."
    )
    objective: Literal["reverse_kl", "forward_kl", "jsd", "policy_gradient"] = setting(
        "reverse_kl", group="Objective", help="Loss that is minimised at every response token."
    )
    k: int = setting(
        64, within="[1, inf)", group="Cache", help="Teacher tokens per position in the cache."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_tokens_per_batch is not None and (
            self.max_tokens_per_batch < self.sequence_length
        ):
            raise ConfigError(
                f"max_tokens_per_batch: found {self.max_tokens_per_batch}; expected at least "
                f"sequence_length, {self.sequence_length}"
            )

    @property
    def rows(self) -> tuple[int, int]:
        """Shape [B, T] of the ids of a micro-batch."""
        if self.max_tokens_per_batch is not None:
            return 1, self.max_tokens_per_batch
        return self.batch_size, self.sequence_length


def memory_settings_of_run(
    config: TrainOptions, objective: str, *, k: int, longest: int
) -> MemorySettings:
    """Memory settings of a run with sequences of up to `longest` tokens."""
    shared = {name: getattr(config, name) for name in SHARED}
    known = objective if objective != "cross_entropy" else "policy_gradient"  # a label a token too
    return MemorySettings(
        sequence_length=longest,
        objective=known,  # type: ignore[arg-type]
        k=max(k, 1),
        **shared,
    )


@dataclass(frozen=True)
class Parts:
    """Bytes."""

    weights: int
    gradients: int
    optimizer: int
    loss: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.loss + self.activations


class Planner:
    """Parts of any settings for one model, each dry run made once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._optimizers: dict[str, int] = {}
        self._activations: dict[tuple[Any, ...], int] = {}

    def parts(self, config: MemorySettings) -> Parts:
        """Raises ConfigError for a workspace that no schedule fits in."""
        if config.optim not in self._optimizers:
            self._optimizers[config.optim] = optimizer_bytes(self.model, config.optim)
        packed = config.max_tokens_per_batch is not None
        key = (*config.rows, packed, config.gradient_checkpointing)
        if key not in self._activations:
            inputs = dry_inputs(*config.rows, packed=packed)
            self._activations[key] = activation_bytes(
                self.model, inputs, config.gradient_checkpointing
            )
        trained = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        return Parts(
            held_bytes([*self.model.parameters(), *self.model.buffers()]),
            trained,
            self._optimizers[config.optim],
            loss_bytes(self.model, config),
            self._activations[key],
        )


def loss_bytes(model: Any, config: MemorySettings) -> int:
    """What the loss allocates on a GPU beyond inputs and outputs, as its schedule has it.

    Raises:
        ConfigError: no schedule fits in `workspace_bytes`.
    """
    head, rows = lm_head(model), config.rows[0] * config.rows[1]
    weight = head.weight
    width = 1 if config.objective == "policy_gradient" else config.k + 1  # and the sampled token
    try:
        return workspace_needed(
            rows,
            weight.shape[0],
            weight.shape[1],
            width,
            dtype=weight.dtype,
            weight_grad=weight.requires_grad,
            bias_grad=head.bias is not None and head.bias.requires_grad,
            workspace_bytes=config.workspace,
        )
    except ValueError as error:
        raise ConfigError(f"workspace_bytes: {error}") from error


def proposals(planner: Planner, config: MemorySettings, memory: int) -> Iterator[MemorySettings]:
    """Settings that need less, each on top of the one before, the last of them fitting if any.

    In order: gradient checkpointing, a smaller workspace for the loss, smaller micro-batches
    (the largest that fit), and optimizers with less state, again with the largest micro-batches.
    """

    def fits(candidate: MemorySettings) -> bool:
        return planner.parts(candidate).total <= memory

    if not config.gradient_checkpointing:
        config = replace(config, gradient_checkpointing=True)
        yield config
        if fits(config):
            return
    if (smaller := smaller_workspace(planner, config, memory)) is not None:
        config = smaller
        yield config
        if fits(config):
            return
    for optim in (None, "adafactor", "adamw_8bit"):
        if optim is not None:
            less = replace(config, optim=optim)
            if planner.parts(less).optimizer >= planner.parts(config).optimizer:
                continue
            config = less
            yield config
            if fits(config):
                return
        if (fitting := largest_batch(planner, config, memory)) is not None:
            yield fitting
            return


def smaller_workspace(
    planner: Planner, config: MemorySettings, memory: int
) -> MemorySettings | None:
    """Half the loss's workspace, and half again until it fits or no schedule does."""
    found, bound = None, planner.parts(config).loss // 2
    while bound >= SMALLEST_WORKSPACE:
        candidate = replace(config, workspace_bytes=bound >> 20 << 20)
        try:
            parts = planner.parts(candidate)
        except ConfigError:
            break
        found = candidate
        if parts.total <= memory:
            break
        bound //= 2
    return found


def largest_batch(planner: Planner, config: MemorySettings, memory: int) -> MemorySettings | None:
    """The largest micro-batch below the config's that fits; None where the smallest does not."""
    packed = config.max_tokens_per_batch
    low, high = (1, config.batch_size) if packed is None else (config.sequence_length, packed)

    def candidate(size: int) -> MemorySettings:
        if packed is None:
            return replace(config, batch_size=size)
        return replace(config, max_tokens_per_batch=size)

    def fits(size: int) -> bool:
        try:
            return planner.parts(candidate(size)).total <= memory
        except ConfigError:  # more rows than a workspace can hold
            return False

    if low == high or not fits(low):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return candidate(low)
