"""Models of transformers whose sizes or inputs do not follow from names: by their modelling file."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

POINTS = {
    "encoder_hidden_sizes": [8, 8, 16, 16],
    "decoder_hidden_size": 32,
    "descriptor_decoder_dim": 32,
    "max_keypoints": 12,
}
"""A small detector of points."""

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blip_2": {"image_token_index": 100},
    "chameleon": {"vocabulary_map": {"<image>": 100}},
    "cohere_asr": {"decoder_start_token_id": 1},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1, "num_hidden_layers": 3},
    "encoder_decoder": {"decoder_start_token_id": 1, "pad_token_id": 0},
    "vision_encoder_decoder": {"decoder_start_token_id": 1, "pad_token_id": 0},
    "speech_encoder_decoder": {"decoder_start_token_id": 1, "pad_token_id": 0},
    "esm": {"pad_token_id": 0, "mask_token_id": 3},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16, "mamba_n_heads": 4},
    "fuyu": {"patch_size": 30},
    "granite_speech5": {"context_size": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "instructblip": {"image_token_index": 100},
    "instructblipvideo": {"video_token_index": 101},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "llava_next": {"image_grid_pinpoints": [[56, 56]]},
    "llava_next_video": {"image_grid_pinpoints": [[56, 56]]},
    "llava_onevision": {"image_grid_pinpoints": [[56, 56]]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1},
    "mimi": {"upsample_groups": 32, "codebook_dim": 32, "vector_quantization_hidden_dimension": 32},
    "mistral4": {"qk_rope_head_dim": 8},
    "moonshine": {"pad_token_id": 0},
    "nemotron": {"num_key_value_heads": 2},
    "pop2piano": {"decoder_start_token_id": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {  # draws its seeds anew in each step
        "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [3, 4], "hidden_dropout_prob": 0.0, "hash_seed": 1,
        "local_attention_probs_dropout_prob": 0.0, "lsh_attention_probs_dropout_prob": 0.0,
    },
    "sam2": {
        "vision_config": {
            "backbone_config": {
                "image_size": [64, 64], "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [16, 32, 64, 128],
                "hidden_size": 16, "global_attention_blocks": [3], "num_attention_heads_per_stage": [1, 2, 2, 2],
                "window_size_per_stage": [8, 4, 4, 2],
            },
            "backbone_channel_list": [128, 64, 32, 16], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        },
        "prompt_encoder_config": {"image_size": 64},
    },
    "slanet": {"max_text_length": 8},
    "slanext": {"max_text_length": 8},
    "lightglue": {"descriptor_dim": 32, "hidden_size": 32, "intermediate_size": 64, "keypoint_detector_config": POINTS},
    "superglue": {
        "gnn_layers_types": ["self", "cross"], "sinkhorn_iterations": 5, "keypoint_encoder_sizes": [16],
        "hidden_size": 32, "keypoint_detector_config": POINTS,
    },
    "sam_hq": {"vision_config": {"output_channels": 32}},
    "autoformer": {"label_length": 2, "moving_average": 3},
    "swin": {"image_size": 224},
    "donut_swin": {"image_size": 224},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lilt": {"hidden_size": 48},
    "bros": {"dim_bbox_projection": 16, "dim_bbox_sinusoid_emb_1d": 8},
    "mobilebert": {"true_hidden_size": 32, "intra_bottleneck_size": 32},
    "llama4": {"vision_config": {
        "intermediate_size": 128, "projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32,
    }},
    "zoedepth": {"bottleneck_features": 32, "fusion_hidden_size": 32},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320},
    "align": {
        "projection_dim": 80,
        "vision_config": {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 80},
    },
    "bridgetower": {"hidden_size": 128, "text_config": {"hidden_size": 128}, "vision_config": {"hidden_size": 128}},
    "moonshine_streaming": {"num_key_value_heads": 2},
    "dots1": {"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "step3p7": {"text_config": {"sliding_window": 16}},
    "kosmos2": {"latent_query_num": 4},
    "nemotron_h": {"n_groups": 1},
    "qwen2_5_omni": {"vision_start_token_id": 103},
    "qwen3_omni_moe": {"vision_start_token_id": 103},
    "timm_backbone": {"backbone": "resnet10t"},
    "xlstm": {"hidden_size": 32, "num_heads": 2, "embedding_dim": 32},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6},
}  # fmt: skip
"""Fields that a small configuration has, those of its parts in a dict of their own."""


def _ids(*shape: int, high: int = 2) -> Tensor:
    return torch.randint(0, high, shape)


def _music(config: Any) -> dict[str, Any]:
    """Each codebook is a row of its own."""
    books = config.num_codebooks
    return {
        "input_ids": _ids(2 * books, 12, high=100),
        "labels": _ids(2, 12, books, high=100),
        "attention_mask": None,
    }


INPUTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "bark": lambda _: {"input_ids": _ids(2, 12, 8, high=30), "codebook_idx": 2},
    "pix2struct": lambda config: {
        "flattened_patches": torch.ones(2, 16, 2 + config.vision_config.patch_embed_hidden_size),
        "attention_mask": torch.ones(2, 16),
    },
    "instructblip": lambda _: {"qformer_input_ids": _ids(2, 12, high=100)},
    "instructblipvideo": lambda _: {"qformer_input_ids": _ids(2, 12, high=100)},
    "video_llama_3": lambda _: {"image_merge_sizes": torch.tensor([2, 2])},
    "grounding_dino": lambda _: {"labels": None},
    "mm_grounding_dino": lambda _: {"labels": None},
    "kosmos2": lambda _: {"image_embeds_position_mask": (torch.arange(12) < 4).expand(2, 12)},
    "mllama": lambda config: {
        "pixel_values": torch.randn(2, 1, 4, 3, config.vision_config.image_size, config.vision_config.image_size),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, 4, dtype=torch.long),
        "cross_attention_mask": torch.ones(2, 12, 1, 4, dtype=torch.long),
    },
    "lightglue": lambda _: {"pixel_values": torch.randn(2, 2, 3, 64, 64)},
    "superglue": lambda _: {"pixel_values": torch.randn(2, 2, 1, 64, 64)},
    "lxmert": lambda config: {
        "visual_feats": torch.randn(2, 5, config.visual_feat_dim),
        "visual_pos": torch.randn(2, 5, config.visual_pos_dim),
        "labels": _ids(2),
    },
    "musicgen": _music,
    "musicgen_melody": _music,
    "perceiver": lambda _: {"inputs": _ids(2, 12, high=100)},
    "siglip2": lambda config: {
        "pixel_values": torch.randn(2, 16, 3 * config.vision_config.patch_size**2),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * 2),
    },
    "seggpt": lambda config: {
        "pixel_values": torch.randn(2, 3, config.image_size[0] // 2, config.image_size[1]),
        "prompt_pixel_values": torch.randn(2, 3, config.image_size[0] // 2, config.image_size[1]),
        "prompt_masks": torch.randn(2, 3, config.image_size[0] // 2, config.image_size[1]),
    },
    "shieldgemma2": lambda _: {"labels": None},
    "swin2sr": lambda _: {"labels": None},
    "vilt": lambda config: {"labels": torch.rand(2, config.num_labels)},
    "visual_bert": lambda config: {
        "visual_embeds": torch.randn(2, 4, config.visual_embedding_dim),
        "visual_attention_mask": torch.ones(2, 4),
        "labels": _ids(2, 16, high=100),
    },
}  # fmt: skip
"""Inputs beside, or instead of, those that names tell; None leaves one out."""
