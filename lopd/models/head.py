"""Running a loss inside a causal LM: the one place that knows model internals.

The losses of `lopd_kernels` want the last hidden states and the LM head's weight, never
the logits. `run_with_loss` gets them by swapping two forwards for the length of one call:

    model(**inputs)                   hooks of DDP, FSDP2, PEFT and compile see one ordinary call
      -> backbone(**inputs)           last hidden states [B, T, D]
      -> head(hidden)                 head's forward is loss_fn: weight and bias are read where the
                                      head itself would read them

What a model does to `H W^T + b` afterwards (scale, soft cap) is read from its config by
`head_options`; `check_head` compares the outcome with the model's own logits and refuses
a model that does anything else.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lopd.errors import ModelError
from lopd.models.moe import balance, check_router, router_coefficient

Result = TypeVar("Result")

# Configs that multiply logits under a name which other families use as a divisor.
MULTIPLIED_LOGITS_SCALING = {"hyperclovax"}


@dataclass(frozen=True)
class HeadOptions:
    """What follows the matrix product: `softcap(logit_scale * (H W^T + b))`."""

    logit_scale: float = 1.0
    softcap: float | None = None

    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments that every `lopd_kernels.linear_*` function takes."""
        return asdict(self)


LossFn = Callable[[Tensor, Tensor, Tensor | None, HeadOptions], Result]


def head_options(model: Any) -> HeadOptions:
    """Scale and soft cap of the model's final logits, from the names that configs give them.

    Raises:
        ModelError: the config holds a scale that is not a positive number.
    """
    config = plain_model(model).config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        if (value := getattr(config, name, None)) is not None:
            scale *= _positive(config, name, value)
    if (value := getattr(config, "logits_scaling", None)) is not None:
        factor = _positive(config, "logits_scaling", value)
        scale *= factor if config.model_type in MULTIPLIED_LOGITS_SCALING else 1.0 / factor
    cap = getattr(config, "final_logit_softcapping", None)
    return HeadOptions(
        scale, None if cap is None else _positive(config, "final_logit_softcapping", cap)
    )


def run_with_loss(model: Any, inputs: dict[str, Any], loss_fn: LossFn[Result]) -> Result:
    """Call `loss_fn(hidden, weight, bias, head_options)` inside the model's own forward.

    Args:
        model: a transformers causal LM, as it is or sharded in place by FSDP2, with PEFT adapters
            or without, and with DistributedDataParallel around it or not.
        inputs: input_ids [B, T] and what else the backbone takes, such as attention_mask or
            position_ids; it gets them with `use_cache=False`.
        loss_fn: called with hidden [B, T, D], weight [V, D], bias [V] or None, and the head's
            options; what it returns is returned. With a LoRA on the head the weight is
            `W + scaling * B A`, rounded to W's dtype as merging would. Under autocast, hidden
            states of its dtype get weight and bias of that dtype.

    Raises:
        ModelError: the model is wrapped in anything else, its adapters are not of a kind that
            this can follow, or its head is not a plain linear layer.
    """
    return _run(model, inputs, loss_fn, 0.0)


def run_with_loss_and_router(
    model: Any, inputs: dict[str, Any], loss_fn: LossFn[Result]
) -> tuple[Result, Tensor | None]:
    """As `run_with_loss`, and the loss that balances a mixture of experts.

    That is `coefficient * load_balancing_loss_func(...)` of the model's family, a mean over the
    tokens of these inputs; None where the config asks for none.
    """
    coefficient = router_coefficient(plain_model(model))
    result: Any = _run(model, inputs, loss_fn, coefficient)
    return result if coefficient else (result, None)


def _run(model: Any, inputs: dict[str, Any], loss_fn: LossFn[Any], coefficient: float) -> Any:
    """The loss, or with a coefficient other than 0 the pair of it and the router's."""
    plain = plain_model(model)
    head, options = _head_module(plain), head_options(plain)
    extra = {"output_router_logits": True} if coefficient else {}

    def head_forward(hidden: Tensor) -> Any:
        weight, bias = _effective(head, hidden)
        # A model spread over devices moves states by hooks, which the swapped forward replaces.
        return loss_fn(hidden.to(weight.device), weight, bias, options)

    def root_forward(**kwargs: Any) -> Any:
        given = {name: value for name, value in kwargs.items() if value is not None}
        outputs = plain.base_model(**given, **extra, use_cache=False)
        with _swapped_forward(head, head_forward):
            result = head(outputs[0])
        if not coefficient:
            return result
        return result, coefficient * balance(plain, outputs, given.get("attention_mask"))

    with _swapped_forward(plain, root_forward):
        return model(**inputs)


def plain_model(model: Any) -> Any:
    """The transformers model inside DistributedDataParallel and PEFT adapters.

    Raises:
        ModelError: there is none, or anything else lies around it.
    """
    from torch.nn.parallel import DistributedDataParallel
    from transformers import PreTrainedModel

    inner = model
    while True:
        if isinstance(inner, DistributedDataParallel):
            inner = inner.module
        elif _is_peft(inner):
            kind = inner.active_peft_config
            if kind.is_prompt_learning or inner.base_model is inner.get_base_model():
                raise ModelError(
                    f"{type(inner).__name__}: found {kind.peft_type} adapters, which change the "
                    "sequence; expected ones that change weights, such as a LoRA"
                )
            inner = inner.get_base_model()
        else:
            break
    if not isinstance(inner, PreTrainedModel):
        raise ModelError(
            f"{type(inner).__name__}: expected a transformers causal LM, not wrapped or wrapped in "
            "DistributedDataParallel, fully_shard (FSDP2) or PEFT only; pass the model itself"
        )
    return inner


def _is_peft(model: Any) -> bool:
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def lm_head(model: Any) -> nn.Linear:
    """The model's output projection, or ModelError where a loss could not be run inside it.

    With a LoRA on it, the frozen layer below. A sharded weight is whole only inside the head's
    forward: read it through `run_with_loss`.
    """
    head = _head_module(plain_model(model))
    return head if isinstance(head, nn.Linear) else head.base_layer


def _head_module(plain: Any) -> Any:
    head, found = plain.get_output_embeddings(), type(plain).__name__
    if plain.base_model is not plain:
        if isinstance(head, nn.Linear):
            return head
        if hasattr(head, "lora_A"):
            _check_lora(head, found)
            return head
    raise ModelError(
        f"{found}: its output head is {type(head).__name__}; expected a causal LM whose head "
        "is a torch.nn.Linear, or a LoRA on one, after the backbone"
    )


def _check_lora(head: Any, found: str) -> None:
    """Refuse a LoRA of the head that is not `W + scaling * B A` with W frozen."""
    problem = None
    dropouts = [drop.p for drop in head.lora_dropout.values() if isinstance(drop, nn.Dropout)]
    if type(head.base_layer) is not nn.Linear:
        problem = f"lies on {type(head.base_layer).__name__}; expected a torch.nn.Linear"
    elif head.lora_variant:
        problem = "is a variant (such as DoRA); expected a plain one"
    elif any(head.lora_bias.values()):
        problem = "has a bias; train with lora_bias=False"
    elif any(dropouts):
        problem = (
            f"has dropout {max(dropouts)}; the head never sees its input alone, so set it to 0"
        )
    elif head.base_layer.weight.requires_grad:
        problem = "lies on a weight that is trained too; freeze one of them"
    if problem is not None:
        raise ModelError(f"{found}: the LoRA on its output head {problem}")


def _effective(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the head, to be called inside its forward."""
    base = head if isinstance(head, nn.Linear) else head.base_layer
    weight, bias = base.weight, base.bias
    if isinstance(weight, DTensor):
        raise ModelError(
            "the output head's weight is sharded inside its own forward; expected FSDP2 to gather "
            "it (fully_shard on the head or on a module around it); tensor parallelism is not "
            "supported"
        )
    if base is not head and not head.disable_adapters and not head.merged:
        delta = sum(
            head.scaling[name] * (head.lora_B[name].weight @ head.lora_A[name].weight)
            for name in head.active_adapters
            if name in head.lora_A
        )
        weight = (weight + delta).to(weight.dtype)
    kind = hidden.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if autocast and hidden.dtype == torch.get_autocast_dtype(kind):
        weight = weight.to(hidden.dtype)
        bias = None if bias is None else bias.to(hidden.dtype)
    return weight, bias


def check_trainable(model: Any) -> None:
    """Refuse a model that cannot be trained by a loss on its hidden states.

    Raises:
        ModelError: as `lm_head`, or as `lopd.models.moe.check_router`.
    """
    lm_head(model)
    check_router(plain_model(model))


@torch.no_grad()
def check_head(model: Any, input_ids: Tensor | None = None) -> None:
    """Compare `softcap(logit_scale * (H W^T + b))` with the model's own logits on a few tokens.

    Once as they are, and once with the head's output amplified so that the largest logit is
    about 100: a soft cap that small logits would hide shows itself there.

    Args:
        input_ids: [B, T] int64; 2 x 8 ids spread over the vocabulary when None.

    Raises:
        ModelError: they differ by more than rounding in the model's dtype, so the model does
            something to its logits that `head_options` does not know.
    """
    weight = lm_head(model).weight
    if input_ids is None:
        spread = torch.linspace(0, weight.shape[0] - 1, 16, device=weight.device)
        input_ids = spread.long().view(2, 8)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    with _eval_mode(model):
        raw = run_with_loss(model, inputs, lambda h, w, b, _: nn.functional.linear(h, w, b))
        _compare_logits(model, raw, model(**inputs, use_cache=False).logits)
        amplified = raw * (100.0 / raw.abs().max().clamp(min=torch.finfo(raw.dtype).tiny))
        head = _head_module(plain_model(model))
        with _swapped_forward(head, lambda hidden: amplified):
            _compare_logits(model, amplified, model(**inputs, use_cache=False).logits)


def _compare_logits(model: Any, raw: Tensor, logits: Tensor) -> None:
    name, options = type(plain_model(model)).__name__, head_options(model)
    if raw.shape != logits.shape:
        raise ModelError(
            f"{name}: its logits are {tuple(logits.shape)}, hidden states times head weight "
            f"{tuple(raw.shape)}; this architecture is not supported"
        )
    own = raw.float() * options.logit_scale
    if options.softcap is not None:
        own = options.softcap * torch.tanh(own / options.softcap)
    error, size = (own - logits.to(own)).abs().max().item(), own.abs().max().item()
    tolerance = 8 * torch.finfo(raw.dtype).eps * size
    if not error <= tolerance:
        raise ModelError(
            f"{name}: its logits differ from softcap(scale * (H W^T + b)) by {error:.3g} "
            f"(tolerance {tolerance:.1g}, {options}); its head does something that lopd does not "
            "know, so no loss can be computed on it"
        )


def _positive(config: Any, name: str, value: Any) -> float:
    if not value > 0:
        raise ModelError(
            f"config.{name} of {config.model_type}: found {value!r}; expected a positive number"
        )
    return float(value)


@contextmanager
def _swapped_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    instance = vars(module)
    own = instance.get("forward")  # set where a hook has already replaced the class's forward
    instance["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del instance["forward"]
        else:
            instance["forward"] = own


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
