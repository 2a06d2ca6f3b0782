"""Small models of diffusers with noise for a sample."""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

_BLOCKS: dict[str, Any] = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
_HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
_CODERS: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
_SETTINGS: dict[str, dict[str, Any]] = {
    "UNet2DModel": _BLOCKS | {
        "sample_size": 16, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "UNet2DConditionModel": _BLOCKS | {
        "sample_size": 16, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 32,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8,
    },
    "UNet1DModel": {
        "sample_size": 64, "block_out_channels": (32, 32), "extra_in_channels": 64,
        "down_block_types": ("DownBlock1DNoSkip", "DownBlock1D"), "up_block_types": ("UpBlock1D", "UpBlock1DNoSkip"),
    },
    "UNet3DConditionModel": _BLOCKS | {
        "sample_size": 16, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "cross_attention_dim": 32,
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "attention_head_dim": 8,
    },
    "AutoencoderKL": _CODERS | {"sample_size": 16},
    "VQModel": _CODERS | {"num_vq_embeddings": 32},
    "AutoencoderTiny": {"encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16),
                        "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
    "DiTTransformer2DModel": _HEADS | {"sample_size": 8, "in_channels": 4, "num_embeds_ada_norm": 10},
    "Transformer2DModel": _HEADS | {"in_channels": 32, "norm_num_groups": 8},
    "PixArtTransformer2DModel": _HEADS | {"sample_size": 8, "in_channels": 4, "out_channels": 8, "caption_channels": 32,
                                          "cross_attention_dim": 32},
    "SD3Transformer2DModel": _HEADS | {"sample_size": 8, "in_channels": 4, "out_channels": 4, "joint_attention_dim": 32,
                                       "caption_projection_dim": 32, "pooled_projection_dim": 32},
    "FluxTransformer2DModel": _HEADS | {"in_channels": 16, "num_single_layers": 1, "joint_attention_dim": 32,
                                        "pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6)},
    "SanaTransformer2DModel": _HEADS | {"sample_size": 8, "in_channels": 4, "out_channels": 4, "caption_channels": 32,
                                        "num_cross_attention_heads": 2, "cross_attention_head_dim": 16,
                                        "cross_attention_dim": 32},
    "WanTransformer3DModel": _HEADS | {"in_channels": 4, "out_channels": 4, "text_dim": 32, "freq_dim": 16,
                                       "ffn_dim": 64, "rope_max_seq_len": 32},
}  # fmt: skip


def names() -> list[tuple[str, str]]:
    """The models, with the folder of ``diffusers.models`` that they come from."""
    diffusers = importlib.import_module("diffusers")
    return [(getattr(diffusers, each).__module__.split(".")[2], each) for each in _SETTINGS]


def build(_: str, name: str) -> tuple[nn.Module, Any]:
    """The model and its inputs."""
    torch.manual_seed(0)
    model = getattr(importlib.import_module("diffusers"), name)(**_SETTINGS[name])
    return model.train(), _inputs(name, getattr(model.config, "in_channels", 3))


def _inputs(name: str, channels: int) -> dict[str, Tensor]:
    times = torch.tensor([3, 7])
    words = torch.randn(2, 5, 32)
    small = torch.randn(2, channels, 8, 8)
    chosen: dict[str, dict[str, Tensor]] = {
        "UNet2DModel": {"timestep": times},
        "UNet2DConditionModel": {"timestep": times, "encoder_hidden_states": words},
        "UNet1DModel": {"sample": torch.randn(2, 2, 64), "timestep": times},
        "UNet3DConditionModel": {
            "sample": torch.randn(2, channels, 3, 16, 16), "timestep": times, "encoder_hidden_states": words,
        },
        "DiTTransformer2DModel": {"hidden_states": small, "timestep": times, "class_labels": torch.tensor([1, 2])},
        "Transformer2DModel": {"hidden_states": small},
        "PixArtTransformer2DModel": {"hidden_states": small, "timestep": times, "encoder_hidden_states": words},
        "SanaTransformer2DModel": {"hidden_states": small, "timestep": times, "encoder_hidden_states": words},
        "SD3Transformer2DModel": {
            "hidden_states": small, "timestep": times, "encoder_hidden_states": words,
            "pooled_projections": torch.randn(2, 32),
        },
        "FluxTransformer2DModel": {
            "hidden_states": torch.randn(2, 16, channels), "timestep": times / 10, "encoder_hidden_states": words,
            "pooled_projections": torch.randn(2, 32), "img_ids": torch.rand(16, 3).round(),
            "txt_ids": torch.zeros(5, 3),
        },
        "WanTransformer3DModel": {
            "hidden_states": torch.randn(2, channels, 2, 8, 8), "timestep": times, "encoder_hidden_states": words,
        },
    }  # fmt: skip
    found = chosen.get(name, {})
    return found if "hidden_states" in found else {"sample": torch.randn(2, channels, 16, 16)} | found
