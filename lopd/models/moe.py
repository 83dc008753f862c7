"""The auxiliary loss by which a mixture of experts keeps its experts in use.

A transformers model adds it to its own loss only, so a loss on hidden states must.
"""

import re
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lopd.errors import ModelError

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
ROUTER_LOSS = re.compile(r"(router|aux|balanc|moe|expert).*loss|z_loss|(router|aux).*coef")


def router_coefficient(plain: Any) -> float:
    """What the router's auxiliary loss counts in training; 0 for a model without one."""
    config = plain.config.get_text_config()
    for name in COEFFICIENTS:
        if value := getattr(config, name, getattr(plain, name, None)):
            return float(value)
    return 0.0


def balance(plain: Any, outputs: Any, attention_mask: Tensor | None) -> Tensor:
    """The family's own auxiliary loss, over all layers at once."""
    logits = getattr(outputs, "router_logits", None)
    if not logits:
        raise ModelError(
            f"{type(plain).__name__}: its backbone returned no router logits, so its auxiliary "
            "loss cannot be computed; set its coefficient to 0 in config.json to train without it"
        )
    loss: Any = _balancing_function(plain)
    return loss(logits, *_experts(plain), attention_mask)


def _balancing_function(plain: Any) -> Callable[..., Tensor] | None:
    modules = (sys.modules[cls.__module__] for cls in type(plain).__mro__)
    found = (getattr(module, "load_balancing_loss_func", None) for module in modules)
    return next((function for function in found if function is not None), None)


def _experts(plain: Any) -> tuple[Any, Any]:
    """Number of experts, and how many a token goes to; None where they go by other names."""
    config = plain.config.get_text_config()

    def find(*names: str) -> Any:
        values = (getattr(place, name, None) for place in (plain, config) for name in names)
        return next((value for value in values if value is not None), None)

    return find("num_experts", "num_local_experts"), find("num_experts_per_tok")


def check_router(plain: Any) -> None:
    """Raise ModelError where the config asks for a router's loss that would be lost.

    That is one other than the family's `load_balancing_loss_func`.
    """
    lost = {
        name: value
        for name, value in plain.config.get_text_config().to_dict().items()
        if ROUTER_LOSS.search(name) and isinstance(value, int | float) and value
    }
    known = _balancing_function(plain) is not None and None not in _experts(plain)
    for name, value in lost.items():
        if not (known and name in COEFFICIENTS):
            raise ModelError(
                f"{type(plain).__name__}: config.{name} is {value}; this router's loss is not "
                f"supported in training; train a dense model, or set {name} to 0 in config.json "
                "to train without it"
            )
    if router_coefficient(plain) and not known:
        raise ModelError(
            f"{type(plain).__name__}: has a router's loss (coefficient {router_coefficient(plain)})"
            " but no load_balancing_loss_func; train a dense model"
        )


EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
