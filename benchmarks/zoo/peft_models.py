"""LoRA by peft on bases in bf16."""

import importlib
from typing import Any

import torch
from torch import nn

from benchmarks.zoo import transformers_models

_TARGETS = {
    "LlamaForCausalLM": ("llama", ["q_proj", "v_proj"]),
    "GPT2LMHeadModel": ("gpt2", ["c_attn"]),
    "BertForMaskedLM": ("bert", ["query", "value"]),
    "Qwen2ForCausalLM": ("qwen2", ["q_proj", "v_proj"]),
}


def names() -> list[tuple[str, str]]:
    """Bases."""
    return [(f"{folder}/modeling_{folder}", name) for name, (folder, _) in _TARGETS.items()]


def build(file: str, name: str) -> tuple[nn.Module, Any]:
    """The base with adapters."""
    peft = importlib.import_module("peft")
    model, batch = transformers_models.build(file, name)
    settings = peft.LoraConfig(r=4, target_modules=_TARGETS[name][1], lora_dropout=0.0)
    return peft.get_peft_model(model.to(torch.bfloat16), settings), batch
