"""Estimated peak memory of a training run (`lopd plan`), and settings that need less.

    weights, gradients   from the model on the meta device: shapes and dtypes without memory
    optimizer            its state after a step on meta parameters
    loss                 from the memory model of `lopd_kernels.workspace`
    activations          what a forward on the meta device saves for the backward

Their sum is the peak with gradient accumulation, and an upper bound without. All tokens are
assumed to have loss and all sequences to be `sequence_length` long. The CUDA context, temporaries
of single operators and fragmentation are not counted; a share of the memory, `reserve`, is left
free for them.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from lopd.config.objective import SAMPLED
from lopd.config.training import MemoryOptions, MemorySettings
from lopd.errors import ConfigError, LopdError
from lopd.models.head import lm_head
from lopd.training.batch import lengths_of
from lopd.training.dry_run import (
    activation_bytes,
    dry_inputs,
    meta_model,
    optimizer_bytes,
    storage_bytes,
)
from lopd_kernels.workspace import WorkspaceError, workspace_needed

LOG = logging.getLogger(__name__)

SMALLEST_WORKSPACE = 128 << 20


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each part."""

    weights: int
    gradients: int
    optimizer: int
    loss: int
    activations: int

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return self.weights + self.gradients + self.optimizer + self.loss + self.activations


class MemoryPlanner:
    """Estimates the memory of one model with different settings, with each dry run made once.

    Args:
        model: from `lopd.training.dry_run.meta_model`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._optimizers: dict[str, int] = {}
        self._activations: dict[tuple[Any, ...], int] = {}

    @property
    def can_checkpoint(self) -> bool:
        """Whether the model supports gradient checkpointing."""
        return bool(self.model.supports_gradient_checkpointing)

    def estimate(self, config: MemorySettings) -> MemoryEstimate:
        """Estimated peak memory of a run with these settings.

        Raises:
            ConfigError: no schedule of the loss fits in `workspace_bytes`.
            ModelError: the model cannot run on the meta device.
        """
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
        return MemoryEstimate(
            storage_bytes([*self.model.parameters(), *self.model.buffers()]),
            trained,
            self._optimizers[config.optim],
            loss_bytes(self.model, config),
            self._activations[key],
        )

    def fits(self, config: MemorySettings, memory: int) -> bool:
        """Whether a run fits in `memory` bytes, with a schedule of the loss in its workspace."""
        try:
            return self.estimate(config).total <= memory
        except ConfigError:
            return False


def loss_bytes(model: Any, config: MemorySettings) -> int:
    """Bytes that the loss allocates on a GPU beyond its inputs and outputs.

    Raises:
        ConfigError: no schedule of the loss fits in `workspace_bytes`.
    """
    head, rows = lm_head(model), config.rows[0] * config.rows[1]
    weight = head.weight
    # A list and the sampled id, or only the sampled id.
    width = 1 if config.objective in SAMPLED else config.k + 1
    try:
        return workspace_needed(
            rows,
            weight.shape[0],
            weight.shape[1],
            width,
            dtype=weight.dtype,
            hidden_grad=True,
            weight_grad=weight.requires_grad,
            bias_grad=head.bias is not None and head.bias.requires_grad,
            dense_share=config.dense_share,
            tolerance=config.tolerance or 0.0,
            workspace_bytes=config.workspace,
        )
    except WorkspaceError as error:
        raise ConfigError(str(error)) from error


def proposals(
    planner: MemoryPlanner, config: MemorySettings, memory: int
) -> Iterator[MemorySettings]:
    """Settings that need less and less memory, up to the first that fits.

    Each changes one setting of the one before, in this order: gradient checkpointing, a smaller
    workspace for the loss, the largest micro-batches that fit, and optimizers with less state,
    again with the largest micro-batches.

    Args:
        planner: of the model.
        config: settings that do not fit.
        memory: available bytes.
    """
    for candidate in _reductions(planner, config, memory):
        yield candidate
        if planner.fits(candidate, memory):
            return


def _reductions(
    planner: MemoryPlanner, config: MemorySettings, memory: int
) -> Iterator[MemorySettings]:
    """`proposals` without the end."""
    if not config.gradient_checkpointing and planner.can_checkpoint:
        config = replace(config, gradient_checkpointing=True)
        yield config
    if (smaller := smaller_workspace(planner, config, memory)) is not None:
        config = smaller
        yield config
    for optim in (config.optim, "adafactor", "adamw_8bit"):
        less = replace(config, optim=optim)
        if optim != config.optim:
            if planner.estimate(less).optimizer >= planner.estimate(config).optimizer:
                continue
            config = less
            yield config
        if (fitting := largest_batch(planner, config, memory)) is not None:
            yield fitting


def smaller_workspace(
    planner: MemoryPlanner, config: MemorySettings, memory: int
) -> MemorySettings | None:
    """Halve the workspace of the loss until the run fits or no schedule does.

    Returns:
        The settings with the last workspace that has a schedule; None if half is too small.
    """
    smaller, bound = None, planner.estimate(config).loss // 2
    while bound >= SMALLEST_WORKSPACE:
        candidate = replace(config, workspace_bytes=bound >> 20 << 20)
        try:
            estimate = planner.estimate(candidate)
        except ConfigError:
            break
        smaller = candidate
        if estimate.total <= memory:
            break
        bound //= 2
    return smaller


def largest_batch(
    planner: MemoryPlanner, config: MemorySettings, memory: int
) -> MemorySettings | None:
    """The settings with the largest smaller micro-batch that fits; None if there is none."""
    name, low, high = "batch_size", 1, config.batch_size
    if (packed := config.max_tokens_per_batch) is not None:
        name, low, high = "max_tokens_per_batch", config.sequence_length, packed

    def candidate(size: int) -> MemorySettings:
        change: dict[str, Any] = {name: size}
        return replace(config, **change)

    if low == high or not planner.fits(candidate(low), memory):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        fits = planner.fits(candidate(middle), memory)
        low, high = (middle, high) if fits else (low, middle)
    return candidate(low)


def planned_peak(config: Any, trainer: Any, model_path: str, k: int) -> int | None:
    """Bytes that `lopd plan` predicts for a run; None if it cannot, with a message why.

    Args:
        config: settings of the stage.
        trainer: has the `train_dataset` and `objective` of the run.
        model_path: folder of the model.
        k: tokens in a teacher's list.
    """
    if config.fsdp or config.mixed_precision != "none":
        return None
    objective = trainer.objective.name
    if objective == "cross_entropy":
        objective = "policy_gradient"  # also one id per row
    shared: dict[str, Any] = {
        item.name: getattr(config, item.name) for item in fields(MemoryOptions)
    }
    try:
        settings = MemorySettings(
            sequence_length=max(lengths_of(trainer.train_dataset)),
            objective=objective,
            k=max(k, 1),
            dense_share=trainer.objective.dense_share,
            tolerance=trainer.objective.tolerance,
            **shared,
        )
        planner = MemoryPlanner(meta_model(model_path, config.dtype, config))
        return planner.estimate(settings).total
    except LopdError as error:
        LOG.warning(f"the peak memory cannot be estimated ({error})")
        return None
