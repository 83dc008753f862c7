"""Attributes of a model's config that lopd reads; no other module reads them.

Model families use different names for the same quantity and leave out what they do not have.
Every function takes the config of a causal LM or of a multimodal model around one.
"""

import re
from typing import Any

from lopd.errors import ModelError

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
SWITCHES = (
    *("sliding_window", "attention_window_size", "window_size", "attention_chunk_size"),
    *("chunk_size", "mamba_chunk_size", "index_topk", "indexer_budget"),
)
EXPERTS_PER_TOKEN = ("num_experts_per_tok",)
ROUTER_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
ROUTER_LOSS = re.compile(r"(router|aux|balanc|moe|expert).*loss|z_loss|(router|aux).*coef")
# Families whose `logits_scaling` multiplies the logits; in all others it divides them.
MULTIPLIED_LOGITS_SCALING = {"hyperclovax"}


def context_of_config(config: Any, engine: str = "transformers") -> int | None:
    """Tokens up to which a sequence's outputs depend on the sequence alone; None for no limit.

    This is the number of positions, or less in two kinds of model. With "longrope" rotations, one
    row of a batch beyond `original_max_position_embeddings` changes the rotations of all rows, and
    those of a cache that was filled before. Sparse attention that selects `index_topk` keys is
    that of the model in vLLM, but in transformers it sees later tokens and padding once there are
    more keys than that.
    """
    config = config.get_text_config()
    limits = [getattr(config, "max_position_embeddings", None)]
    limits += [
        rope.get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        for rope in _ropes_of(config)
        if rope.get("rope_type") == "longrope"
    ]
    if engine == "transformers":
        limits.append(getattr(config, "index_topk", None))
    return min((limit for limit in limits if limit), default=None)


def _ropes_of(config: Any) -> list[dict[str, Any]]:
    """The rotations of a model: one for all layers, or one per kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in rope.values() if isinstance(part, dict)]
    return parts or [rope]


def switches_of(config: Any) -> list[int]:
    """Numbers of tokens beyond which some layer changes what it does, such as a window."""
    values = [getattr(config.get_text_config(), name, None) for name in SWITCHES]
    return sorted({value for value in values if isinstance(value, int) and value > 0})


def attention_softcap_of(config: Any) -> float | None:
    """Soft cap of the attention scores; None if the model has none."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None)


def sliding_window_of(config: Any) -> int | None:
    """Tokens that sliding-window attention sees; None if the config has no window."""
    return getattr(config.get_text_config(), "sliding_window", None)


def layer_windows_of(config: Any) -> list[int | None]:
    """The sliding window of each layer; None for layers with full attention."""
    window, config = sliding_window_of(config), config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in layer_types]


def attention_width_of(config: Any) -> int | None:
    """Query heads times head dimension; None without attention, or if layers differ in it."""
    config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return None
    try:
        width = getattr(config, "head_dim", None)
    except RuntimeError:  # transformers' error for a setting that each layer has for itself
        return None
    return heads * (width or config.hidden_size // heads)


def experts_of(model: Any) -> tuple[int | None, int | None]:
    """Number of experts and number of experts per token of a mixture of experts.

    Args:
        model: a transformers model; some families set these on the model too.

    Returns:
        Both numbers; None for one that has no known name or is 0.
    """
    return _first(model, EXPERTS), _first(model, EXPERTS_PER_TOKEN)


def router_coefficient_of(model: Any) -> float:
    """Weight of the router's auxiliary loss in training; 0 if the model has none.

    Args:
        model: a transformers model; some families set the coefficient on the model only.
    """
    config = model.config.get_text_config()
    for name in ROUTER_COEFFICIENTS:
        if value := getattr(config, name, getattr(model, name, None)):
            return float(value)
    return 0.0


def router_losses_of(config: Any) -> dict[str, float]:
    """Every setting other than 0 that looks like the weight of a router's loss, by name."""
    return {
        name: value
        for name, value in config.get_text_config().to_dict().items()
        if ROUTER_LOSS.search(name) and isinstance(value, int | float) and value
    }


def logit_scale_of(config: Any) -> float:
    """Factor by which the model multiplies the logits of its output head.

    Raises:
        ModelError: the config has a scale that is not a positive number.
    """
    config, scale = config.get_text_config(), 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= _positive(config, name) or 1.0
    scaling = _positive(config, "logits_scaling") or 1.0
    return scale * (scaling if config.model_type in MULTIPLIED_LOGITS_SCALING else 1.0 / scaling)


def logit_softcap_of(config: Any) -> float | None:
    """Soft cap of the final logits; None if the model has none.

    Raises:
        ModelError: the config has a soft cap that is not a positive number.
    """
    return _positive(config.get_text_config(), "final_logit_softcapping")


def head_rows_of(model: Any) -> int:
    """Rows V of the output head's weight [V, D], padding rows included."""
    return model.get_output_embeddings().weight.shape[0]


def embedding_rows_of(model: Any) -> int:
    """Rows of the input embedding, padding rows included."""
    return model.get_input_embeddings().weight.shape[0]


def _first(model: Any, names: tuple[str, ...]) -> Any:
    """The first value other than None and 0, of the model or its config."""
    places = (model, model.config.get_text_config())
    values = (getattr(place, name, None) for place in places for name in names)
    return next((value for value in values if value), None)


def _positive(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    if value is None:
        return None
    if not value > 0:
        raise ModelError(
            f"config.{name} of {config.model_type}: found {value!r}; expected a positive number"
        )
    return float(value)
