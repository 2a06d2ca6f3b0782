"""What makes a configuration of transformers small: rules by the name of a field."""

import re
from typing import Any

LAYERS = r"(^|_)(n_layers?|(num_)?(hidden_|attention_|encoder_|decoder_)?layers|num_blocks|depth|[elrx]_layers)$"
"""Fields that say how many layers or blocks there are."""

RULES: tuple[tuple[str, int], ...] = (
    (r"feat_extract_layers$|^num_adapter_layers$|^num_residual_layers$|cross_attention_layers$", 1 << 30),
    (r"mamba_(n|num)_heads$|^n_mamba_heads$", 4),
    (r"mamba_d_ssm$", 64),
    (r"q_lora_rank$|kv_lora_rank$|_lora_rank$", 16),
    (r"qk_head_dim$", 32),
    (r"qk_rope_head_dim$|qk_nope_head_dim$|rotary_dim$", 16),
    (r"(decoder|neck)_in_channels$|^upsample_groups$|^output_channels$", 32),
    (r"(^|_)(head_dim|dim_head|d_head|d_kv|kv_channels|attention_head_size|head_size)$", 16),
    (r"(^|_)((num_|n_)?(kv_|value_|key_value_|query_|index_|key_)?(attention_)?heads|n_head|self_attn_heads)$", 2),
    (r"num_(query_)?groups$|num_key_value_groups$", 2),
    (LAYERS, 2),
    (r"(intermediate_size|ffn_dim|d_ff|dff|n_inner|ffn_hidden_size|mlp_dim|dim_ff|dim_feedforward)$", 64),
    (r"(feedforward_dim|feed_?forward_size|feed_forward_hidden_size|intermediate_dim|linear_units|d_inner)$", 64),
    (r"(^|_)(hidden_size|hidden_dim|d_model|n_embd|embed_dim|emb_dim|embedding_size|embedding_dim|width|dim)$", 32),
    (r"(^|_)(embed_proj_dim|projection_dim|projection_size|proj_dim|project_dim|pooler_output_size|output_dim)$", 32),
    (r"(^|_)(d_latents|hidden_channels|proj_size|out_dim|encoder_dim|classifier_proj_size|codevector_dim)$", 32),
    (r"(^|_)(vocab_size|target_vocab_size)$", 128),
    (r"(max_position_embeddings|n_positions|n_ctx|seq_length|max_seq_len|max_(source|target)_positions)$", 64),
    (r"(^|_)(sliding_window|attention_chunk_size|chunk_size|block_size)$", 16),
    (r"(experts|expert_num)$", 4),
    (r"(experts_per_tok(en)?|moe_top_?k|moe_k|topk)$", 2),
    (r"(n_shared_experts|num_shared_experts|n_group|topk_group|num_expert_group)$", 1),
    (r"(state_size|d_state|ssm_state_size)$", 8),
    (r"num_(queries|query_tokens|latents)$", 8),
    (r"first_k_dense_replace$", 1),
    (r"mm_tokens_per_image$", 4),
    (r"(train_num_points|num_denoising|num_negatives)$", 16),
    (r"codebook_size$|num_embeddings$", 32),
)  # fmt: skip
"""A name that matches has at most this value, and each number of a list: the first rule counts."""

TOKENS = {
    "pad": 0, "bos": 1, "eos": 2, "decoder_start": 1, "cls": 1, "sep": 2, "image": 100, "video": 101, "audio": 102,
    "mask": 3, "unk": 3,
}  # fmt: skip
"""Ids of special tokens in a vocabulary of 128; others count from 103 on."""

SAME: dict[str, Any] = {
    "mask_time_length": 2,
    "mask_time_min_masks": 1,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "use_pretrained_backbone": False,
    "mrope_section": [2, 3, 3],
}
"""Fields with one value wherever they are."""

MISSING: dict[str, Any] = {
    "prediction_length": 4,
    "vocab_size": 128,
    "audio_token_id": 102,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "moe_topk": 2,
}
"""Fields whose default is None and that the model needs."""


def small(fields: dict[str, Any], *, shallow: bool = False) -> dict[str, Any]:
    """The fields of a configuration, those of its parts too, with small values.

    Args:
        fields: Of the default configuration.
        shallow: Whether widths stay as they are, where they depend on each other in a way that names do not tell.
    """
    layers, picks = _layers(fields)
    chosen = next((fields[key] for key in _CHOSEN if fields.get(key)), None)
    found: dict[str, Any] = {}
    others = 103
    for key, value in fields.items():
        if key in _DERIVED:
            continue
        if isinstance(value, dict) and key not in ("id2label", "label2id"):
            found[key] = small(value, shallow=shallow)
        elif key in SAME:
            found[key] = SAME[key]
        elif value is None and key in MISSING and not shallow:
            found[key] = MISSING[key]
        elif re.search(r"_token_(id|index)$", str(key)) and isinstance(value, int):
            name = re.sub(r"_token_(id|index)$", "", key)
            found[key] = TOKENS.get(name, others)
            others += name not in TOKENS
        elif key == "image_size" and not shallow:
            found[key] = _image_size(value, fields.get("patch_size"))
        elif isinstance(value, list | tuple) and picks and len(value) == layers:
            found[key] = [value[each] for each in picks]
        elif re.search(LAYERS, str(key)) and value == layers and picks:
            found[key] = len(picks)
        else:
            found[key] = _smaller(key, value, shallow)
    if chosen and "hidden_sizes" not in fields and isinstance(fields.get("num_hidden_layers"), int):
        found |= {"num_hidden_layers": max(2, len(chosen))}
        found |= {key: list(range(1, len(chosen) + 1)) for key in _CHOSEN if key in fields and "out" in key}
        found |= {key: list(range(len(chosen))) for key in _CHOSEN if fields.get(key) and "backbone" in key}
    return found


_CHOSEN = ("out_indices", "_out_indices", "backbone_out_indices")
_DERIVED = ("out_features", "_out_features", "stage_names", "per_layer_config")


def _layers(fields: dict[str, Any]) -> tuple[int, list[int]]:
    """How many layers there are, and which of them stay: one of each kind, at least two."""
    depths = [fields[key] for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if fields.get(key)]
    count = next((each for each in depths if isinstance(each, int)), 0)
    lists = {key: each for key, each in fields.items() if isinstance(each, list | tuple) and len(each) == count}
    if count < 3 or not lists or "depths" in fields:
        return 0, []
    kinds = [tuple(str(each[layer]) for each in lists.values()) for layer in range(count)]
    picks = sorted({kind: layer for layer, kind in reversed(list(enumerate(kinds)))}.values())
    return count, (picks if len(picks) > 1 else [0, 1])[:6]


def _image_size(value: Any, patch: Any) -> Any:
    """Four patches a side or more."""
    if isinstance(value, dict | list | tuple) or value is None:
        patch = patch if isinstance(patch, int) else 16
        return type(value)(_image_size(each, patch) for each in value) if isinstance(value, list | tuple) else value
    patch = patch if isinstance(patch, int) else 16
    return min(value, patch * max(4, 64 // patch))


def _smaller(key: str, value: Any, shallow: bool) -> Any:
    pattern, most = next(((each, most) for each, most in RULES if re.search(each, str(key))), ("", 1 << 30))
    wide = shallow and most in (2, 8, 16, 32, 64) and pattern != LAYERS
    if isinstance(value, bool) or wide:
        return value
    if isinstance(value, int):
        return min(value, most) if value > 0 else value
    if isinstance(value, list | tuple) and value and re.search("heads|depths|in_channels", str(key)):
        return type(value)(_smaller("depth" if key == "depths" else key, each, shallow) for each in value)
    return value
