"""LoRA with peft: adding adapters to a model, and merging them."""

from collections import Counter
from typing import Any

import torch
from torch import nn

from lopd.config.training import ALL_LINEAR, LoraOptions
from lopd.errors import ConfigError, ModelError
from lopd.models.admission import attempt, hidden_of
from lopd.models.head import lm_head, plain_model, probe_inputs


def add_lora(model: Any, options: LoraOptions) -> Any:
    """Add new adapters to a model and freeze its weights.

    Returns:
        A PeftModel with the same outputs as before.

    Raises:
        ConfigError: peft is not installed, a setting is out of range, or a target is not a layer
            of the model.
        ModelError: peft refuses the model, or an adapter on a target could not be merged.
    """
    if options.lora_rank == 0:
        raise ConfigError("lora_rank: found 0, which means no adapters; expected at least 1")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ConfigError(
            'lora_rank: needs peft; pip install "lopd[peft]", or set it to 0'
        ) from None
    names = options.target_names
    if names != [ALL_LINEAR]:
        _check_targets(model, names)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=ALL_LINEAR if names == [ALL_LINEAR] else names,
    )
    try:
        adapted = get_peft_model(model, config)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ModelError(
            f"{type(model).__name__}: peft refuses adapters on {options.lora_targets} "
            f"({' '.join(str(error).split())}); name layers in lora_targets, such as "
            f"{','.join(_attention_layers(model)) or 'q_proj,v_proj'}"
        ) from error
    lm_head(adapted)  # refuses dropout on the head
    # Checkpointed layers are recomputed only if their input requires a gradient.
    adapted.enable_input_require_grads()
    _check_adapters(adapted)
    return adapted


def _attention_layers(model: Any) -> list[str]:
    """Names of the model's linear layers that are usual targets, in the order of the model."""
    usual = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    of_mamba = {"in_proj", "x_proj"}
    paths = (path for path, module in model.named_modules() if type(module) is nn.Linear)
    names = dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths)
    found = [name for name in names if name in usual]
    return found or [name for name in names if name in of_mamba]


def _check_adapters(adapted: Any) -> None:
    """Refuse adapters that would not be what merging makes of them.

    A layer whose weight is shared with another, or is read without calling the layer, has an
    adapter that counts in the merged model only.

    Raises:
        ModelError: one of these, or the adapted model fails on a few tokens.
    """
    plain = plain_model(adapted)
    modules = dict(plain.named_modules())
    layers = {path: m for path, m in modules.items() if hasattr(m, "lora_A")}
    owners = Counter(
        id(parameter)
        for module in modules.values()
        for parameter in module.parameters(recurse=False)
    )
    reason = "shares its weight with another layer"
    bad = next(
        (
            path
            for path, module in layers.items()
            if any(owners[id(p)] > 1 for p in module.base_layer.parameters(recurse=False))
        ),
        None,
    )
    if bad is None and not lm_head(adapted).weight.is_meta:
        called: set[str] = set()
        hooks = [
            module.register_forward_hook(lambda *_, path=path: called.add(path))
            for path, module in modules.items()
        ]
        try:
            inputs = probe_inputs(lm_head(adapted).weight)
            with torch.enable_grad():
                remedy = "name other layers in lora_targets, or train without --lora-rank"
                attempt(plain, "these adapters", lambda: hidden_of(adapted, inputs), remedy)
        finally:
            for hook in hooks:
                hook.remove()
        head = plain.get_output_embeddings()
        reason = "is read without calling the layer"
        bad = next(
            (
                path
                for path, module in layers.items()
                if path not in called
                and path.rpartition(".")[0] in called  # not an expert that got no token
                and module is not head
            ),
            None,
        )
    if bad is not None:
        raise ModelError(
            f"{type(plain).__name__}: the weight of {bad} {reason}, so an adapter on it cannot be "
            "merged; leave it out of lora_targets by naming others, such as "
            f"{','.join(_attention_layers(plain)) or 'q_proj,v_proj'}"
        )


def _check_targets(model: Any, names: list[str]) -> None:
    layers = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    ]
    for name in names:
        targets = [module for path, module in layers if f".{path}".endswith(f".{name}")]
        if not targets:
            known = sorted({path.rsplit(".", 1)[-1] for path, _ in layers})
            raise ConfigError(
                f"lora_targets: {type(model).__name__} has no layer '{name}'; expected "
                f"{ALL_LINEAR} or some of {', '.join(known)}"
            )
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        tied = head is not None and head.weight is embedding.weight
        if tied and any(module in (head, embedding) for module in targets):
            raise ModelError(
                f"{type(model).__name__}: '{name}' shares its weight with the embedding or output "
                "head, so an adapter on it cannot be merged; leave it out of lora_targets"
            )


@torch.no_grad()
def merged(model: Any) -> Any:
    """Merge the adapters into the weights, in place, and return the plain model.

    Save the adapters first. There is no copy: a copy of a large model would not fit in memory
    next to an optimizer's state.

    Raises:
        ModelError: the logits change by more than a thousandth of the largest plus 16 roundings
            in the weights' dtype.
    """
    head = lm_head(model)
    spread = torch.linspace(0, head.weight.shape[0] - 1, 16, device=head.weight.device)
    ids = spread.long().view(2, 8)
    model.eval()
    expected = model(input_ids=ids, use_cache=False).logits.float()
    plain = model.merge_and_unload()
    plain.disable_input_require_grads()
    logits = plain(input_ids=ids, use_cache=False).logits.float()
    error, size = (logits - expected).abs().max().item(), expected.abs().max().item()
    tolerance = (1e-3 + 16 * torch.finfo(head.weight.dtype).eps) * size
    if not error <= tolerance:
        raise ModelError(
            f"{type(plain_model(plain)).__name__}: merging changes its logits by {error:.3g} "
            f"(tolerance {tolerance:.1g}); use the base model with the unmerged adapters that "
            "save_pretrained wrote"
        )
    return plain
