"""Tiny random models of every causal-LM family in transformers, from their default configs."""

import re
from typing import Any

import torch
from torch import nn

VOCAB = 96
_WIDTH = (
    *("hidden_size", "d_model", "n_embd", "emb_dim", "dim", "embedding_size", "embedding_dim"),
    *("word_embed_proj_dim", "lru_width", "attention_hidden_size", "backbone_hidden_size"),
    *("input_embedding_size", "output_embedding_size", "projection_dim"),
)
_INNER = (
    *("intermediate_size", "intermediate_size_mlp", "ffn_dim", "d_ff", "d_inner", "dff", "dim_ff"),
    *("n_inner", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim", "feed_forward_size"),
    *("shared_intermediate_size", "shared_expert_intermediate_size"),
    "moe_shared_expert_intermediate_size",
)
_LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
    *("encoder_layers", "num_encoder_layers", "num_decoder_layers", "depth"),
)
_HEADS = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
    *("decoder_attention_heads", "encoder_attention_heads", "num_encoder_attention_heads"),
    "num_decoder_attention_heads",
)
_HEAD_DIM = (
    *("head_dim", "attention_head_dim", "dim_head", "d_head", "kv_channels", "global_head_dim"),
    *("index_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
)
_CONTEXT = (
    *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"),
    *("max_source_positions", "max_target_positions"),
)
_EXPERT = ("moe_intermediate_size", "expert_ffn_hidden_size", "router_hidden_size")
_SWITCHES = (  # tokens at which a layer changes what it does
    *("sliding_window", "attention_window_size", "attention_chunk_size", "chunk_size"),
    *("mamba_chunk_size", "window_size"),
)
SMALL = (
    dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB)
    | dict.fromkeys(_WIDTH, 32)
    | dict.fromkeys(_INNER, 48)
    | dict.fromkeys(_LAYERS, 2)
    | dict.fromkeys(_HEADS, 4)
    | dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads"), 2)
    | dict.fromkeys(_HEAD_DIM, 8)
    | dict.fromkeys(_CONTEXT, 128)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4)
    | dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2)
    | dict.fromkeys((*_EXPERT, "q_lora_rank", "kv_lora_rank"), 16)
    | dict.fromkeys(("n_group", "topk_group"), 1)
    | dict.fromkeys(_SWITCHES, 8)
    | dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8)
    | dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "index_n_heads"), 2)
    | dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16)
    | {"index_topk": 64, "rotary_dim": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    | {"decoder_start_token_id": 1}
)
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_HYBRID = {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2}
# What a family needs besides: lists with an entry per layer, and sizes that must fit each other.
BESIDES: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA2, "num_hidden_layers": 4, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 64},
    "falcon_mamba": {"time_step_rank": 4},
    "gemma3n_text": {
        "num_hidden_layers": 3,
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "intermediate_size": 48,
        "activation_sparsity_pattern": [0.0] * 3,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**_MAMBA2, "layer_types": ["mamba", "attention"], "num_local_experts": 4},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_dt_rank": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "kimi_linear": {**_LINEAR, "linear_head_dim": 16, "linear_num_heads": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba": {"time_step_rank": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "qwen4_exp_text": _LINEAR,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 9,
        "shape_embed_dim": 8,
        "shape_vocab_size": 9,
    },
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {
        **_HYBRID,
        "n_mamba_heads": 2,
        "mamba_dt_rank": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        **_HYBRID,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_mem_blocks": 1,
        "mamba_ngroups": 1,
        "adapter_rank": 4,
        "num_key_value_heads": 4,
        "num_query_groups": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def families() -> list[str]:
    """Model types of `AutoModelForCausalLM` in the installed transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(kind: str, **changes: Any) -> Any:
    """A small config of this model type; its sub-configs are small too."""
    from transformers import CONFIG_MAPPING

    config_class: Any = CONFIG_MAPPING[kind]
    return config_class(**(_small(config_class) | changes))


def _small(config_class: Any) -> dict[str, Any]:
    base = config_class()
    defaults = base.to_dict()
    small: dict[str, Any] = {
        name: size
        for name, size in SMALL.items()
        if type(defaults.get(name)) is int or (name in defaults and name.endswith("_token_id"))
    }
    if "kv_lora_rank" in small and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    small |= {
        name: 1.0 if name == "attn_logit_softcapping" else 0.0  # a cap that small scores reach
        for name, value in defaults.items()
        if isinstance(value, float) and re.search("drop|jitter|attn_logit_softcapping", name)
    }
    for name in config_class.sub_configs:
        if (part := getattr(base, name, None)) is not None:
            small[name] = _small(type(part)) | {"model_type": part.model_type}
    return small | BESIDES.get(base.model_type, {})


def tiny_model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A random model in float32, in eval mode.

    Matrices are drawn with variance 1 / inputs: with transformers' own small initial values,
    attention is nearly uniform and errors in masks stay hidden.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, **changes), dtype=torch.float32)
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.dim() >= 2 and not isinstance(module, nn.Conv1d):
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()
