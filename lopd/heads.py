"""Running a loss inside a causal LM: the one place that knows model internals.

The losses of `lopd_kernels` want the last hidden states and the LM head's weight, never
the logits. `run_with_loss` gets them by swapping two forwards for the length of one call:

    root(**inputs)                    forward hooks, compile, checkpointing see one ordinary call
      -> backbone(**inputs)           last hidden states [B, T, D]
      -> head(hidden)                 head's forward is loss_fn: weight and bias are read where the
                                      head itself would read them

What a model does to `H W^T + b` afterwards (scale, soft cap) is read from its config by
`head_options`; `check_head` compares the outcome with the model's own logits and refuses
a model that does anything else.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lopd.errors import ModelError

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
    config = model.config.get_text_config()
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


def run_with_loss(model: Any, inputs: dict[str, Tensor], loss_fn: LossFn[Result]) -> Result:
    """Call `loss_fn(hidden, weight, bias, head_options)` inside the model's own forward.

    Args:
        model: a transformers causal LM, not wrapped.
        inputs: input_ids and attention_mask, both [B, T]; the backbone gets them with
            `use_cache=False`.
        loss_fn: called with hidden [B, T, D], weight [V, D], bias [V] or None, and the head's
            options; what it returns is returned.

    Raises:
        ModelError: the model is wrapped, is a PEFT model, or its head is not a plain linear layer.
    """
    head, backbone, options = lm_head(model), model.base_model, head_options(model)

    def head_forward(hidden: Tensor) -> Result:
        # A model spread over devices moves states by hooks, which the swapped forward replaces.
        return loss_fn(hidden.to(head.weight.device), head.weight, head.bias, options)

    def root_forward(**kwargs: Tensor) -> Result:
        hidden = backbone(**kwargs, use_cache=False)[0]
        with _swapped_forward(head, head_forward):
            return head(hidden)

    with _swapped_forward(model, root_forward):
        return model(**inputs)


def lm_head(model: Any) -> nn.Linear:
    """The model's output projection, or ModelError where a loss could not be run inside it."""
    from transformers import PreTrainedModel

    found = type(model).__name__
    if hasattr(model, "get_base_model"):
        raise ModelError(
            f"{found}: adapters are not supported; merge them first (model.merge_and_unload())"
        )
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"{found}: expected a transformers causal LM that is not wrapped; pass the model itself"
        )
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or model.base_model is model:
        raise ModelError(
            f"{found}: its output head is {type(head).__name__}; expected a causal LM whose head "
            "is a torch.nn.Linear after the backbone"
        )
    return head


def check_trainable(model: Any) -> None:
    """Refuse a model that cannot be trained by a loss on its hidden states.

    Raises:
        ModelError: as `lm_head`, or the config asks for a mixture-of-experts router's auxiliary
            loss, which would be lost.
    """
    lm_head(model)
    config = model.config.get_text_config()
    for name in (
        "router_aux_loss_coef",
        "aux_loss_coef",
        "router_z_loss_coef",
        "output_router_logits",
    ):
        if value := getattr(config, name, None):
            raise ModelError(
                f"{type(model).__name__}: config.{name} is {value}; the router's auxiliary loss is "
                f"not supported in training; train a dense model, or set {name} to "
                f"{'false' if value is True else 0} in config.json to train without it"
            )


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
    head = lm_head(model)
    if input_ids is None:
        spread = torch.linspace(0, head.weight.shape[0] - 1, 16, device=head.weight.device)
        input_ids = spread.long().view(2, 8)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    with _eval_mode(model):
        raw = run_with_loss(model, inputs, lambda h, w, b, _: nn.functional.linear(h, w, b))
        _compare_logits(model, raw, model(**inputs, use_cache=False).logits)
        amplified = raw * (100.0 / raw.abs().max().clamp(min=torch.finfo(raw.dtype).tiny))
        with _swapped_forward(head, lambda hidden: amplified):
            _compare_logits(model, amplified, model(**inputs, use_cache=False).logits)


def _compare_logits(model: Any, raw: Tensor, logits: Tensor) -> None:
    name, options = type(model).__name__, head_options(model)
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
