"""The auxiliary loss of a mixture of experts, which balances the use of its experts.

Transformers models add it to the loss that they compute. A loss on hidden states has to add it too.
"""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lopd.errors import ModelError
from lopd.models.architecture import (
    ROUTER_COEFFICIENTS,
    experts_of,
    router_coefficient_of,
    router_losses_of,
)


def load_balancing_loss(plain: Any, outputs: Any, attention_mask: Tensor | None) -> Tensor:
    """The model family's own auxiliary loss over all layers, without its coefficient.

    Args:
        plain: the transformers model.
        outputs: what its backbone returned with `output_router_logits=True`.
        attention_mask: [B, T], 0 on padding; None if there is none.

    Raises:
        ModelError: the backbone returned no router logits.
    """
    logits = getattr(outputs, "router_logits", None)
    if not logits:
        raise ModelError(
            f"{type(plain).__name__}: its backbone returned no router logits, so its auxiliary "
            "loss cannot be computed; set its coefficient to 0 in config.json to train without it"
        )
    loss: Any = _balancing_function(plain)
    return loss(logits, *experts_of(plain), attention_mask)


def _balancing_function(plain: Any) -> Callable[..., Tensor] | None:
    modules = (sys.modules[cls.__module__] for cls in type(plain).__mro__)
    functions = (getattr(module, "load_balancing_loss_func", None) for module in modules)
    return next((function for function in functions if function is not None), None)


def check_router(plain: Any) -> None:
    """Refuse a model whose config asks for a router loss that training would leave out.

    Only the family's `load_balancing_loss_func` is supported.

    Raises:
        ModelError: the config has a weight for another loss, or the function is missing.
    """
    name = type(plain).__name__
    supported = _balancing_function(plain) is not None and None not in experts_of(plain)
    for key, value in router_losses_of(plain.config).items():
        if not (supported and key in ROUTER_COEFFICIENTS):
            raise ModelError(
                f"{name}: config.{key} is {value}; this router's loss is not supported in "
                f"training; train a dense model, or set {key} to 0 in config.json to train "
                "without it"
            )
    if (coefficient := router_coefficient_of(plain)) and not supported:
        raise ModelError(
            f"{name}: has a router's loss (coefficient {coefficient}) but no "
            "load_balancing_loss_func; train a dense model"
        )
