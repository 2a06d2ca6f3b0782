"""Tiny models of every architecture that a library has, with a batch and the model's own loss."""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

SMALL = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embed_dim": 32, "emb_dim": 32, "embedding_size": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 1, "decoder_layers": 1,
    "num_encoder_layers": 1, "num_decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "num_attention_heads": 2, "n_head": 2, "n_heads": 2, "num_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "d_kv": 16, "intermediate_size": 64, "ffn_dim": 64, "d_ff": 64, "n_inner": 64, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "dim_ff": 64, "hidden_dim": 64, "vocab_size": 128, "max_position_embeddings": 64,
    "n_positions": 64, "n_ctx": 64, "seq_length": 64, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "state_size": 8, "image_size": 32, "patch_size": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sliding_window": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "num_labels": 3, "projection_dim": 32,
}  # fmt: skip
"""Fields of configurations that say how large a model is."""

TASKS = ("causal", "masked", "seq2seq", "image", "diffusers", "peft")
_MAPPINGS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}
_DIFFUSERS = {
    "UNet2DModel": {
        "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "UNet2DConditionModel": {
        "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 32,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8,
    },
    "AutoencoderKL": {
        "block_out_channels": (16, 32), "norm_num_groups": 8, "sample_size": 16,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    "AutoencoderTiny": {"encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16),
                        "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
    "VQModel": {"block_out_channels": (16, 32), "norm_num_groups": 8, "num_vq_embeddings": 32,
                "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
    "DiTTransformer2DModel": {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8,
                              "in_channels": 4, "num_embeds_ada_norm": 10},
    "Transformer2DModel": {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 32,
                           "norm_num_groups": 8, "num_layers": 1},
    "UNet1DModel": {"sample_size": 64, "block_out_channels": (16, 16), "extra_in_channels": 16,
                    "down_block_types": ("DownBlock1DNoSkip", "DownBlock1D"),
                    "up_block_types": ("UpBlock1D", "UpBlock1DNoSkip")},
}  # fmt: skip
_PEFT = ("llama", "gpt2", "bert", "qwen2")


def names(task: str) -> list[str]:
    """Names of the architectures of a task."""
    if task == "diffusers":
        return list(_DIFFUSERS)
    if task == "peft":
        return list(_PEFT)
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    return list(getattr(auto, _MAPPINGS[task]))


def build(task: str, name: str) -> tuple[nn.Module, Any]:
    """A tiny model and a batch for :func:`loss`."""
    torch.manual_seed(0)
    if task == "diffusers":
        return _diffuser(name)
    if task == "peft":
        return _with_adapters(name)
    transformers = importlib.import_module("transformers")
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    kind = getattr(auto, _MAPPINGS[task])[name]
    kind = getattr(transformers, kind if isinstance(kind, str) else kind[0])
    config = _small(kind.config_class)
    if task == "seq2seq" and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 1
    model = kind(config)
    return model.train(), _batch(task, model.config)


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """The model's own loss; of a model without one, the mean square of what it predicts."""
    found = model(**batch)
    own = getattr(found, "loss", None)
    if own is not None:
        return own.mean()
    tensor = found.sample if hasattr(found, "sample") else found[0]
    tensor = tensor if isinstance(tensor, torch.Tensor) else tensor.sample
    return (tensor - 0.1).square().mean()


def _small(config_class: Any) -> Any:
    """A configuration with small sizes, those of its parts too."""
    default = config_class()
    known = default.to_dict()
    given: dict[str, Any] = {
        key: value for key, value in SMALL.items() if isinstance(known.get(key), int) or key.endswith("token_id")
    }
    given = {key: value for key, value in given.items() if key in known}
    for key, part in getattr(config_class, "sub_configs", {}).items():
        if isinstance(known.get(key), Mapping):
            kind = type(getattr(default, key)) if part is None or part.__name__ == "AutoConfig" else part
            given[key] = _small(kind).to_dict()
    if isinstance(known.get("layer_types"), list):
        given["layer_types"] = _spread(known["layer_types"])
        given["num_hidden_layers"] = len(given["layer_types"])
    return config_class(**given)


def _spread(kinds: list[str]) -> list[str]:
    """One layer of each kind, at least two."""
    different = list(dict.fromkeys(kinds))
    return different if len(different) > 1 else different * 2


def _batch(task: str, config: Any) -> dict[str, Any]:
    if task == "image":
        size = getattr(config, "image_size", 32) or 32
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.randn(2, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}
    ids = torch.randint(3, min(128, getattr(config, "vocab_size", 128)), (2, 12))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def _diffuser(name: str) -> tuple[nn.Module, Any]:
    diffusers = importlib.import_module("diffusers")
    model = getattr(diffusers, name)(**_DIFFUSERS[name])
    channels = getattr(model.config, "in_channels", 3)
    batch: dict[str, Any] = {"sample": torch.randn(2, channels, 16, 16)}
    if name.startswith("UNet"):
        batch["timestep"] = torch.tensor([3, 7])
    if name == "UNet2DConditionModel":
        batch["encoder_hidden_states"] = torch.randn(2, 5, 32)
    if name == "UNet1DModel":
        batch["sample"] = torch.randn(2, 2, 64)
    if name.endswith("Transformer2DModel"):
        size = 8 if name.startswith("DiT") else 16
        batch = {"hidden_states": torch.randn(2, channels, size, size)}
        if name.startswith("DiT"):
            batch |= {"timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 2])}
    return model.train(), batch


def _with_adapters(name: str) -> tuple[nn.Module, Any]:
    """LoRA by peft on a base in bf16."""
    peft = importlib.import_module("peft")
    model, batch = build("masked" if name == "bert" else "causal", name)
    targets = {"gpt2": ["c_attn"], "bert": ["query", "value"]}.get(name, ["q_proj", "v_proj"])
    settings = peft.LoraConfig(r=4, target_modules=targets, lora_dropout=0.0)
    return peft.get_peft_model(model.to(torch.bfloat16), settings), batch


def all_names(tasks: list[str]) -> Iterator[tuple[str, str]]:
    """Every task with each of its architectures."""
    for task in tasks:
        yield from ((task, name) for name in names(task))
