"""Run a loss inside a causal LM, in place of its output head.

The losses of `lopd_kernels` take the last hidden states and the head's weight instead of the
logits. `run_with_loss` replaces two forwards during one call:

    model(**inputs)                   hooks of DDP, FSDP2, PEFT and compile see an ordinary call
      -> backbone(**inputs)           last hidden states [B, T, D]
      -> head(hidden)                 runs loss_fn, which reads weight and bias inside the head's
                                      forward, as the head itself does

The config says what a model does to `H W^T + b` afterwards (scale, soft cap). `check_head`
compares the result with the model's own logits and refuses a model that does anything else.
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
from lopd.models.architecture import logit_scale_of, logit_softcap_of, router_coefficient_of
from lopd.models.moe import check_router, load_balancing_loss

Result = TypeVar("Result")


@dataclass(frozen=True)
class HeadOptions:
    """Operations after the matrix product: `softcap(logit_scale * (H W^T + b))`."""

    logit_scale: float = 1.0
    softcap: float | None = None

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments for the `lopd_kernels.linear_*` functions."""
        return asdict(self)


LossFn = Callable[[Tensor, Tensor, Tensor | None, HeadOptions], Result]


def head_options(model: Any) -> HeadOptions:
    """Scale and soft cap of the model's final logits, from its config.

    Raises:
        ModelError: the config has a scale or soft cap that is not a positive number.
    """
    config = plain_model(model).config
    return HeadOptions(logit_scale_of(config), logit_softcap_of(config))


def run_with_loss(model: Any, inputs: dict[str, Any], loss_fn: LossFn[Result]) -> Result:
    """Call `loss_fn(hidden, weight, bias, head_options)` inside the model's own forward.

    Args:
        model: a transformers causal LM, optionally with PEFT adapters, sharded in place by FSDP2,
            or wrapped in DistributedDataParallel.
        inputs: input_ids [B, T] and further arguments of the backbone, such as attention_mask or
            position_ids; `use_cache=False` is added.
        loss_fn: called with hidden [B, T, D], weight [V, D], bias [V] or None, and the head's
            options. With a LoRA on the head the weight is `W + scaling * B A`, rounded to W's
            dtype as in merging. Under autocast, weight and bias are cast to the dtype of the
            hidden states.

    Returns:
        What `loss_fn` returns.

    Raises:
        ModelError: the model has another wrapper or an unsupported kind of adapters, or its head
            is not a plain linear layer.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> from lopd_kernels import linear_logprobs
    >>> sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    >>> model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    >>> ids = torch.tensor([[3, 1, 4, 1]])
    >>> def next_token_logprobs(hidden, weight, bias, options):
    ...     rows, labels = hidden[0, :-1], ids[0, 1:, None]
    ...     return linear_logprobs(rows, weight, labels, bias=bias, **options.kwargs())
    >>> run_with_loss(model, {"input_ids": ids}, next_token_logprobs).shape
    torch.Size([3, 1])
    """
    return _run(model, inputs, loss_fn, 0.0)


def run_with_loss_and_router(
    model: Any, inputs: dict[str, Any], loss_fn: LossFn[Result]
) -> tuple[Result, Tensor | None]:
    """Like `run_with_loss`, but also return the router's loss of a mixture of experts.

    Returns:
        What `loss_fn` returns, and `coefficient * load_balancing_loss_func(...)` of the model's
        family, a mean over the tokens of these inputs; None if the config asks for none.

    Raises:
        ModelError: as `run_with_loss`, or the backbone returned no router logits.
    """
    coefficient = router_coefficient_of(plain_model(model))
    result: Any = _run(model, inputs, loss_fn, coefficient)
    return result if coefficient else (result, None)


def _run(model: Any, inputs: dict[str, Any], loss_fn: LossFn[Any], coefficient: float) -> Any:
    """The result of `loss_fn`; if coefficient is not 0, a pair with the router's loss."""
    plain = plain_model(model)
    head, options = _head_module(plain), head_options(plain)
    extra = {"output_router_logits": True} if coefficient else {}

    def head_forward(hidden: Tensor) -> Any:
        weight, bias = _effective(head, hidden)
        # Hooks that move states between devices of a split model are replaced with the forward.
        return loss_fn(hidden.to(weight.device), weight, bias, options)

    def root_forward(**kwargs: Any) -> Any:
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        outputs = backbone_of(plain)(**kwargs, **extra, use_cache=False)
        with _swapped_forward(head, head_forward):
            result = head(outputs[0])
        if not coefficient:
            return result
        mask = kwargs.get("attention_mask")
        return result, coefficient * load_balancing_loss(plain, outputs, mask)

    with _swapped_forward(plain, root_forward):
        return model(**inputs)


def plain_model(model: Any) -> Any:
    """The transformers model inside DistributedDataParallel and PEFT adapters.

    Raises:
        ModelError: there is none, or it has another wrapper.
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
                    "sequence; expected adapters that change weights, such as a LoRA"
                )
            inner = inner.get_base_model()
        else:
            break
    if not isinstance(inner, PreTrainedModel):
        remedy = "pass the model itself"
        if hasattr(inner, "_orig_mod"):  # torch.compile would trace another forward every time
            remedy += ", without torch_compile, and compile its layers (layer.compile())"
        raise ModelError(
            f"{type(inner).__name__}: expected a transformers causal LM, not wrapped or wrapped in "
            f"DistributedDataParallel, fully_shard (FSDP2) or PEFT only; {remedy}"
        )
    return inner


def _is_peft(model: Any) -> bool:
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def lm_head(model: Any) -> nn.Linear:
    """The model's output projection; with a LoRA on it, the frozen layer below.

    A sharded weight is complete only inside the head's forward: read it in `run_with_loss`.

    Raises:
        ModelError: a loss cannot be run inside this head.
    """
    head = _head_module(plain_model(model))
    return head if isinstance(head, nn.Linear) else head.base_layer


def _head_module(plain: Any) -> Any:
    head, name = plain.get_output_embeddings(), type(plain).__name__
    backbone_of(plain)
    if isinstance(head, nn.Linear):
        return head
    if hasattr(head, "lora_A"):
        _check_lora(head, name)
        return head
    copied = hasattr(head, "modules_to_save")
    raise ModelError(
        f"{name}: its output head is {type(head).__name__}; expected a torch.nn.Linear, or a LoRA "
        f"on one; {'leave it out of modules_to_save' if copied else 'use a causal LM'}"
    )


def backbone_of(plain: Any) -> Any:
    """The part of a transformers model before its output head.

    Raises:
        ModelError: the model is the backbone itself, or does not say which part it is.
    """
    backbone = plain.base_model  # by the name that the family gives to it
    if backbone is plain:
        backbone = getattr(plain, "model", None)
    if backbone is None:
        raise ModelError(
            f"{type(plain).__name__}: has no backbone apart from an output head; use a causal LM"
        )
    return backbone


def _check_lora(head: Any, name: str) -> None:
    """Refuse a LoRA on the head that is not `W + scaling * B A` with W frozen."""
    problem = None
    dropouts = [drop.p for drop in head.lora_dropout.values() if isinstance(drop, nn.Dropout)]
    if type(head.base_layer) is not nn.Linear:
        problem = f"lies on {type(head.base_layer).__name__}; expected a torch.nn.Linear"
    elif head.lora_variant:
        problem = "is a variant (such as DoRA); expected a plain one"
    elif any(head.lora_bias.values()):
        problem = "has a bias; train with lora_bias=False"
    elif any(dropouts):
        problem = f"has dropout {max(dropouts)}, which would not be applied; set it to 0"
    elif head.base_layer.weight.requires_grad:
        problem = "lies on a weight that is trained too; freeze one of them"
    if problem is not None:
        raise ModelError(f"{name}: the LoRA on its output head {problem}")


def _effective(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the head; call this inside its forward."""
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
    """Refuse a model that cannot be trained with a loss on its hidden states.

    On the meta device the router's outputs are not tried, since some models cannot run there.

    Raises:
        ModelError: as in `lm_head` and `lopd.models.moe.check_router`, or the backbone does not
            return the router logits that its auxiliary loss needs.
    """
    weight = lm_head(model).weight
    check_router(plain_model(model))
    if router_coefficient_of(plain_model(model)) and not weight.is_meta:
        inputs = probe_inputs(weight)
        with torch.no_grad(), eval_mode(model):
            run_with_loss_and_router(model, inputs, lambda hidden, *_: hidden)


def probe_inputs(weight: Tensor) -> dict[str, Tensor]:
    """2 x 8 ids spread over the vocabulary."""
    ids = torch.linspace(0, weight.shape[0] - 1, 16, device=weight.device).long().view(2, 8)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def check_finite(model: Any, values: Tensor) -> None:
    """Refuse a model whose outputs are NaN or infinite, naming the weights if they are the cause.

    Raises:
        ModelError: a value is not finite.
    """
    if torch.isfinite(values).all():
        return
    bad = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if bad:
        raise ModelError(
            f"{type(plain_model(model)).__name__}: NaN or infinite values in {len(bad)} weights, "
            f"such as {bad[0]}; restore the folder from an intact copy"
        )
    raise ModelError(
        f"{type(plain_model(model)).__name__}: its outputs are NaN or infinite in {values.dtype}, "
        "although its weights are finite; use a wider --dtype"
    )


@torch.no_grad()
def check_head(model: Any, input_ids: Tensor | None = None) -> None:
    """Compare `softcap(logit_scale * (H W^T + b))` with the model's own logits on a few tokens.

    The second comparison scales the head's output so that the largest logit is about 100, which
    reveals a soft cap that small logits would hide.

    Args:
        input_ids: [B, T] int64; None for 2 x 8 ids spread over the vocabulary.

    Raises:
        ModelError: they are not finite, or differ by more than rounding in the model's dtype: the
            model transforms its logits in a way that `head_options` does not know.
    """
    inputs = probe_inputs(lm_head(model).weight)
    if input_ids is not None:
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    with eval_mode(model):
        raw = run_with_loss(model, inputs, lambda h, w, b, _: nn.functional.linear(h, w, b))
        check_finite(model, raw)
        _compare_logits(model, raw, model(**inputs, use_cache=False).logits)
        amplified = raw / raw.abs().max().clamp(min=torch.finfo(raw.dtype).tiny) * 100.0
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
    ours = raw.float() * options.logit_scale
    if options.softcap is not None:
        ours = options.softcap * torch.tanh(ours / options.softcap)
    error, size = (ours - logits.to(ours)).abs().max().item(), ours.abs().max().item()
    tolerance = 8 * torch.finfo(raw.dtype).eps * size
    if not error <= tolerance:
        raise ModelError(
            f"{name}: its logits differ from softcap(scale * (H W^T + b)) by {error:.3g} "
            f"(tolerance {tolerance:.1g}, {options}); its head does something that lopd does not "
            "support, so no loss can be computed on it"
        )


@contextmanager
def _swapped_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    instance = vars(module)
    previous = instance.get("forward")  # set if a hook has replaced the class's forward
    instance["forward"] = forward
    try:
        yield
    finally:
        if previous is None:
            del instance["forward"]
        else:
            instance["forward"] = previous


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Put the model into evaluation mode, and restore its mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
