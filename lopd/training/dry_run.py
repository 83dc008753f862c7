"""Memory of activations and optimizer state, from dry runs on the meta device.

Tensors there have shapes, dtypes and a graph, but no memory, so counting what a forward saves for
the backward takes seconds for a model of any size.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from lopd.config.training import LoraOptions, optimizer_class
from lopd.errors import ConfigError, LopdError, ModelError
from lopd.models.head import HeadOptions, LossFn, run_with_loss
from lopd.models.load import attention_for, check_model_folder, resolve_dtype
from lopd.models.lora import add_lora
from lopd.provenance.remote_code import loading_code

ATTENTION = "lopd_dry"
BLOCK = 256  # elements that share a scale in bitsandbytes' 8-bit states
UNQUANTISED = 4096  # tensors with fewer elements keep 32-bit states there
EIGHT_BIT = ("adamw_8bit", "adamw_bnb_8bit")


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages of tensors, each storage counted once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def meta_model(path: str, dtype: str, lora: LoraOptions | None = None) -> Any:
    """The model of a folder, in training mode on the meta device.

    Args:
        path: the model folder; its config.json is enough.
        dtype: of the weights.
        lora: adapters to add, if its rank is not 0.

    Raises:
        ModelError: its config is not that of a causal LM.
    """
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, fused_attention)
    AttentionMaskInterface.register(ATTENTION, _mask_of_batch)
    folder = check_model_folder(path)
    problem = "transformers builds no causal language model whose memory can be planned from it"
    with loading_code(folder, problem) as options, torch.device("meta"):
        settings = AutoConfig.from_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_config(
            settings,
            dtype=resolve_dtype(dtype),
            attn_implementation=ATTENTION if attention_for(settings) == "sdpa" else "eager",
            trust_remote_code=options["trust_remote_code"],
        )
    if lora is not None and lora.lora_rank:
        with torch.device("meta"):
            model = add_lora(model, lora)
    return model.train()


def cache_bytes(model: Any, tokens: int) -> int:
    """Bytes of the cache of one sequence of this length, from a forward on the meta device."""
    from transformers import DynamicCache

    name = "cache_params" if "cache_params" in signature(model.forward).parameters else ""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(
            input_ids=torch.zeros((1, tokens), dtype=torch.int64, device="meta"),
            use_cache=True,
            **{name or "past_key_values": cache},
        )
    held: list[Any] = []
    for layer in cache.layers:
        for value in vars(layer).values():
            held += value.values() if isinstance(value, dict) else [value]
    return storage_bytes([value for value in held if isinstance(value, torch.Tensor)])


def _mask_of_batch(batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> Any:
    """The mask [B, 1, T, T] of a padded batch; None for a single sequence and for a pack."""
    if batch_size == 1:
        return None
    shape = (batch_size, 1, q_length, kv_length)
    return torch.ones(shape, dtype=torch.bool, device=kwargs.get("device", "meta"))


def fused_attention(
    module: nn.Module,
    query: Tensor,  # [B, H, T, d]
    key: Tensor,  # [B, H_kv, T, d]
    value: Tensor,
    attention_mask: Tensor | None,  # [B, 1, T, T]
    dropout: float = 0.0,
    scaling: float | None = None,
    sequence_lengths: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # [B, T, H, d]
    """Attention that saves what fused kernels save for the backward.

    These are q, k, v, the mask as floats, the output, and one number per row and head. On the meta
    device torch itself would choose the kernel that saves [T, T] scores.
    """
    from transformers.integrations.sdpa_attention import repeat_kv

    groups = query.shape[1] // key.shape[1]
    bias = None if len(query) == 1 else attention_mask  # a single sequence has no padding
    if groups > 1 and (bias is not None or sequence_lengths is not None):
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(~bias, -torch.inf)
    width = value.shape[-1]
    if width < query.shape[-1]:  # the kernel's shapes on the meta device need equal widths
        value = nn.functional.pad(value, (0, query.shape[-1] - width))
    out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout, bias is None, attn_mask=bias, scale=scaling
    )
    return out[..., :width].transpose(1, 2).contiguous(), None


def dry_inputs(batch: int, length: int, *, packed: bool, device: str = "meta") -> dict[str, Any]:
    """Inputs of a dry run: ids and mask [B, T]; a pack has `sequence_lengths` too."""
    ids = torch.zeros(batch, length, dtype=torch.int64, device=device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if packed:
        inputs["sequence_lengths"] = (length,)
    return inputs


def optimizer_bytes(model: nn.Module, optim: str) -> int:
    """Bytes of an optimizer's state after one step.

    The 8-bit AdamW of bitsandbytes runs only on a GPU, so its state is computed from its layout:
    two bytes per element and two fp32 scales for every BLOCK elements.

    Raises:
        ConfigError: the optimizer is unknown or not installed, or cannot run on the meta device.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if optim in EIGHT_BIT:
        return sum(
            2 * p.numel() + 8 * -(-p.numel() // BLOCK)
            if p.numel() >= UNQUANTISED
            else 8 * p.numel()
            for p in trained
        )
    kind, options = optimizer_class(optim)
    if options.pop("fused", False):
        options["foreach"] = False
    stand_ins = [nn.Parameter(torch.empty_like(p, device="meta")) for p in trained]
    for stand_in in stand_ins:
        stand_in.grad = torch.empty_like(stand_in)
    try:
        optimizer = kind(stand_ins, **options)
        optimizer.step()
    except RuntimeError as error:
        raise ConfigError(f"optim: {optim} cannot run on the meta device; use another") from error
    return state_bytes(optimizer)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in an optimizer's state."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    return storage_bytes([value for value in states if isinstance(value, Tensor)])


def activation_bytes(model: Any, inputs: dict[str, Any], checkpointing: bool) -> int:
    """Bytes that a forward saves for the backward, without parameters.

    With checkpointing these are the checkpoints and the largest layer between two of them.

    Raises:
        ModelError: the model cannot run on the meta device, or has no layers to checkpoint.
    """
    total, largest_layer = saved_bytes(model, inputs)
    if not checkpointing:
        return total
    if largest_layer is None or not model.supports_gradient_checkpointing:
        raise ModelError(
            f"{type(model).__name__}: does not support gradient checkpointing; omit "
            "--gradient-checkpointing"
        )
    model.gradient_checkpointing_enable()
    try:
        return saved_bytes(model, inputs)[0] + largest_layer
    finally:
        model.gradient_checkpointing_disable()


class _Saved:
    """Storages that autograd saves, without parameters.

    It holds references to them, so that no address is used twice.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        self.storages: dict[int, Any] = {}
        self.largest_layer: int | None = None  # None until a layer has run
        self._before_layer: set[int] = set()

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.parameters:
            self.storages[storage._cdata] = storage
        return tensor

    def bytes(self, exclude: set[int]) -> int:
        return sum(s.nbytes() for key, s in self.storages.items() if key not in exclude)

    def enter_layer(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        self._before_layer = {x.untyped_storage()._cdata for x in inputs} | set(self.storages)

    def leave_layer(self, module: nn.Module, args: Any, output: Any) -> None:
        self.largest_layer = max(self.largest_layer or 0, self.bytes(self._before_layer))


@contextmanager
def _without_a_device() -> Iterator[None]:
    """Let fused experts, and adapters on them, run on the meta device.

    torch's grouped product has meta shapes for bf16 only; transformers' own fallback saves the
    same tensors. peft switches the device's autocast off, and the meta device has none.
    """
    from transformers.integrations import moe

    previous = getattr(moe, "_can_use_grouped_mm", None)
    if previous is not None:
        moe._can_use_grouped_mm = lambda *args, **kwargs: False
    autocast = torch.autocast

    def autocast_of_a_device(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type == "meta" else autocast(device_type, *args, **kwargs)

    torch.autocast = autocast_of_a_device  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch.autocast = autocast  # type: ignore[misc]
        if previous is not None:
            moe._can_use_grouped_mm = previous


def saved_bytes(model: Any, inputs: dict[str, Any]) -> tuple[int, int | None]:
    """Bytes that one forward saves, including the rows for the loss.

    Returns:
        The bytes of the whole forward, and of the layer that saves most besides its inputs; None
        if the model has no layers that can be checkpointed.

    Raises:
        ModelError: the model cannot run on the meta device, for example because shapes depend on
            values.
    """

    def loss_fn(hidden: Tensor, weight: Tensor, bias: Any, options: HeadOptions) -> Tensor:
        index = torch.arange(hidden.shape[0] * hidden.shape[1], device=hidden.device)
        return nn.functional.linear(hidden.flatten(0, 1)[index], weight[:1]).sum()

    try:
        return _saved_in_a_forward(model, inputs, loss_fn)
    except LopdError:
        raise
    except Exception as error:
        first = error
    try:  # layers of recurrent states read the values of a mask [B, T]
        batch, length = inputs["input_ids"].shape
        whole = torch.ones(batch, 1, length, length, dtype=torch.bool, device="meta")
        return _saved_in_a_forward(model, {**inputs, "attention_mask": whole}, loss_fn)
    except LopdError:
        raise
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__}: its memory cannot be planned, since its forward does not run "
            f"without values ({' '.join(str(first).split())[:200]}); measure a short run instead"
        ) from error


def _saved_in_a_forward(
    model: Any, inputs: dict[str, Any], loss_fn: LossFn[Tensor]
) -> tuple[int, int | None]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    saved = _Saved(model)
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    hooks = [m.register_forward_pre_hook(saved.enter_layer, with_kwargs=True) for m in layers]
    hooks += [m.register_forward_hook(saved.leave_layer) for m in layers]
    try:
        with (
            torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor),
            _without_a_device(),
        ):
            loss = run_with_loss(model, inputs, loss_fn)
    finally:
        for hook in hooks:
            hook.remove()
    total = saved.bytes(exclude=set())
    del loss
    return total, saved.largest_layer
