"""A tiny, random model of every causal LM type of `transformers`.

The configuration is the type's own default, shrunk by the names of its fields; of its layers one of
every kind is kept, so that a hybrid model stays one. What this cannot guess is in `SPECIAL`.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY, LENGTH, WINDOW = 100, 128, 8
MOST_LAYERS = 6

SMALL: dict[str, Any] = {
    **dict.fromkeys(
        [
            "hidden_size",
            "d_model",
            "n_embd",
            "dim",
            "embedding_size",
            "word_embed_proj_dim",
            "hidden_dim",
            "attention_hidden_size",
            "hidden_size_global",
            "backbone_hidden_size",
        ],
        64,
    ),
    **dict.fromkeys(
        [
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "attention_heads",
            "swa_num_attention_heads",
            "linear_num_heads",
        ],
        4,
    ),
    **dict.fromkeys(["num_key_value_heads", "swa_num_key_value_heads", "kv_n_heads"], 2),
    **dict.fromkeys(
        [
            "intermediate_size",
            "ffn_dim",
            "dff",
            "dim_ff",
            "n_inner",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "d_ff",
            "ffn_hidden_size",
            "intermediate_size_mlp",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "shared_experts_intermediate_size",
            "shared_intermediate_size",
            "dense_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "feed_forward_size",
            "block_ff_dim",
        ],
        64,
    ),
    **dict.fromkeys(
        [
            "head_dim",
            "kv_channels",
            "swa_head_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_head_dim",
            "qk_nope_head_dim",
            "v_head_dim",
            "qk_rope_head_dim",
            "index_head_dim",
            "dim_head",
            "d_kv",
            "d_rel",
            "attention_head_dim",
        ],
        16,
    ),
    "qk_head_dim": 32,
    **dict.fromkeys(
        [
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "encoder_layers",
            "decoder_layers",
        ],
        2,
    ),
    **dict.fromkeys(
        [
            "num_experts",
            "num_local_experts",
            "n_routed_experts",
            "moe_num_experts",
            "num_routed_experts",
            "encoder_hash_byte_group_nb_functions",
        ],
        4,
    ),
    **dict.fromkeys(
        [
            "num_experts_per_tok",
            "num_experts_per_token",
            "moe_topk",
            "moe_k",
            "moe_top_k",
            "experts_per_token",
            "top_k_experts",
        ],
        2,
    ),
    **dict.fromkeys(["n_group", "num_expert_group", "topk_group"], 1),
    **dict.fromkeys(
        ["kv_lora_rank", "q_lora_rank", "o_lora_rank", "laurel_rank", "hc_lowrank"], 16
    ),
    **dict.fromkeys(["linear_num_key_heads", "linear_num_value_heads"], 2),
    "index_n_heads": 64,  # few would give scores of exactly zero, and ties
    "index_topk": 16,
    **dict.fromkeys(
        ["max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "model_max_length"],
        LENGTH,
    ),
    **dict.fromkeys(
        ["vocab_size", "vocab_size_per_layer_input", "audio_vocab_size", "unpadded_vocab_size"],
        VOCABULARY,
    ),
    **dict.fromkeys(
        [
            "sliding_window",
            "window_size",
            "sliding_window_size",
            "attention_chunk_size",
            "keep_window_size",
            "local_attention_window_len",
        ],
        WINDOW,
    ),
    "hidden_size_per_layer_input": 8,
    "type_vocab_size": 2,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_chunk_size": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "state_size": 8,
    "ssm_state_size": 8,
    "chunk_size": 8,
    "time_step_rank": 8,
    "mamba_dt_rank": 8,
    "n_groups": 2,
    "rotary_dim": 8,
    "floor_scale": 4,
    "log_scaling_n_floor": 4,
    "rel_extent": 16,
    "position_bias_max_distance": 16,
    "prompt_length": 4,
}
"""Field -> small value, where the default is a number that is larger."""
RANDOM = (
    "dropout",
    "pdrop",
    "dropout_prob",
    "dropout_p",
    "layerdrop",
    "dropout_rate",
    "jitter_noise",
    "jitter_eps",
)
"""Endings of fields that make training random."""
NAMES_OF_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

_QSA = {
    "indexer_n_heads": 64,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "ple_layer_ids": [1],
    "ple_embed_dim": 32,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 100,
    "eos_token_id": 2,
    "split_ngram_parts": 1,
    "make_ngram_vocab_size_divisible_by": 8,
}
_DOTS3 = {
    "num_key_value_heads": 4,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 32,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
_SHARED = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
}
_ASSISTANT = {
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}
SPECIAL: dict[str, dict[str, Any]] = {
    **{
        key: {"is_decoder": True}
        for key in [
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
            "xmod",
        ]
    },
    "axk2": {"index_n_heads": 64},
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 3},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_out_dim": 64, "adapter_input_size": 64},
    },
    "dots3_note_text": _DOTS3,
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_head": 16},
    "gemma3n_text": {**_SHARED, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]},
    "gemma4_text": _SHARED,
    "gemma4_unified_text": _SHARED,
    "gemma4_assistant": {"text_config": _ASSISTANT, "backbone_hidden_size": 64},
    "gemma4_unified_assistant": {"text_config": _ASSISTANT, "backbone_hidden_size": 64},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"], "num_hidden_layers": 3},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 3},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv"],
        "num_hidden_layers": 3,
        "num_dense_layers": 1,
    },
    "longcat_flash": {"expert_ffn_hidden_size": 32, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16, "sliding_window": WINDOW},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _QSA},
    "qwen4_exp_text": _QSA,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": (32, 32),
        "axial_pos_shape": (8, 16),
        "attention_head_size": 16,
        "attn_layers": ("local", "lsh"),
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "hash_seed": 1,
    },
    "xlm": {"emb_dim": 64, "causal": True},
    "xlstm": {"hidden_size": 128},
    "xmod": {"is_decoder": True, "languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "num_key_value_heads": 4,
        "num_mem_blocks": 1,
    },
}
"""Type -> what its configuration needs besides."""


_LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [6.0] * 8,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "original_max_position_embeddings": 16,
}
_DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "max_position_embeddings": 16,
}
_BOTH_WAYS = {"is_decoder": False}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert, not a decoder": ("bert", _BOTH_WAYS),
    "bert-generation, not a decoder": ("bert-generation", _BOTH_WAYS),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "gemma3_text, both directions": ("gemma3_text", {"use_bidirectional_attention": True}),
    "llama, dynamic rotary factors": ("llama", _DYNAMIC),
    "llama, eager": ("llama", {"attn_implementation": "eager"}),
    "llama, longrope": ("llama", _LONGROPE),
    "minicpm3, longrope": ("minicpm3", _LONGROPE),
    "mistral, eager": ("mistral", {"attn_implementation": "eager"}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "phi3, longrope": ("phi3", _LONGROPE),
    "phi4_multimodal, longrope": ("phi4_multimodal", _LONGROPE),
    "phimoe, longrope": (
        "phimoe",
        {
            **_LONGROPE,
            "rope_parameters": {
                **_LONGROPE["rope_parameters"],
                "short_mscale": 1.1,
                "long_mscale": 1.2,
            },
        },
    ),
    "qwen2, sliding window": (
        "qwen2",
        {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8},
    ),
    "qwen3, dynamic rotary factors": ("qwen3", _DYNAMIC),
    "qwen3_moe, eager experts": ("qwen3_moe", {"experts_implementation": "eager"}),
    "xlm, not causal": ("xlm", {"causal": False}),
}
"""Name -> type, and what is different."""
NAMES = (*TYPES, *VARIANTS)


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of a tiny model; `overrides` are fields of it."""
    special = {**SPECIAL.get(model_type, {}), **overrides}
    return _shrink(CONFIG_MAPPING[model_type], special)


def _shrink(config_class: Any, overrides: dict[str, Any]) -> PreTrainedConfig:
    nested = {
        name: value
        for name, value in overrides.items()
        if isinstance(value, dict) and name.endswith("config")
    }
    default = _default(config_class, overrides)
    fields: dict[str, Any] = {}
    layers = _layers(default)
    for name, value in vars(default).items():
        if name.startswith("_"):
            continue
        if isinstance(value, PreTrainedConfig):
            if name in getattr(config_class, "sub_configs", {}) or name.endswith("config"):
                fields[name] = _shrink(type(value), nested.get(name, {}))
        elif name in NAMES_OF_LAYERS and layers:
            fields[name] = len(layers)
        elif isinstance(value, (list, tuple)) and layers and len(value) == _depth(default):
            fields[name] = type(value)(value[i] for i in layers)
        elif name.endswith(RANDOM) and isinstance(value, float):
            fields[name] = 0.0
        elif name in SMALL and isinstance(value, int) and not isinstance(value, bool):
            fields[name] = min(value, SMALL[name])
        elif name == "initializer_range" or name == "init_std":
            fields[name] = 0.2
        elif name.endswith("_token_id") and isinstance(value, int) and value >= VOCABULARY:
            fields[name] = VOCABULARY - 1
    if "pad_token_id" in vars(default):
        fields["pad_token_id"] = 0
    for name, token in {"bos_token_id": 1, "eos_token_id": 2}.items():
        if getattr(default, name, None) is not None:
            fields[name] = token
    if "kv_lora_rank" in vars(default):
        fields["num_key_value_heads"] = SMALL[
            "num_attention_heads"
        ]  # of latent attention all are heads
    fields |= {name: value for name, value in overrides.items() if name not in nested}
    return config_class(**fields)


def _default(config_class: Any, overrides: dict[str, Any]) -> PreTrainedConfig:
    """Some have no default that is valid: they get what is special."""
    try:
        return config_class()
    except Exception:
        return config_class(**overrides)


def _depth(config: PreTrainedConfig) -> int:
    return next(
        (vars(config)[name] for name in NAMES_OF_LAYERS if isinstance(vars(config).get(name), int)),
        0,
    )


def _layers(config: PreTrainedConfig) -> list[int]:
    """Indices of layers that are kept: one of every kind, two at least, the first of each."""
    depth = _depth(config)
    if depth < 2:
        return list(range(depth))
    per_layer = [
        v for n, v in vars(config).items() if isinstance(v, (list, tuple)) and len(v) == depth
    ]
    kinds: dict[Any, int] = {}
    for i in range(depth):
        kinds.setdefault(tuple(repr(values[i]) for values in per_layer), i)
    chosen = sorted(kinds.values())[:MOST_LAYERS]
    return chosen if len(chosen) > 1 else [0, 1]


def tiny_model(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of a type or variant in eval mode and fp32, whose weights are so large that
    other inputs give visibly other logits."""
    model_type, different = VARIANTS.get(name, (name, {}))
    overrides = {**different, **overrides}
    how = {
        n: overrides.pop(n)
        for n in ("attn_implementation", "experts_implementation")
        if n in overrides
    }
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides), **how)
    lm = lm.float().eval()
    lm.generation_config.eos_token_id = lm.generation_config.forced_eos_token_id = None
    with torch.no_grad():  # what begins at zero or one, too, is to matter
        for parameter in lm.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.std() < 0.1:
                parameter.normal_(std=0.2)
    return lm
