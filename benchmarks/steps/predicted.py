"""Predicted beside measured, one model in a process of its own: `python benchmarks/steps/predicted.py JOB OUT`.

Models of a few to a few dozen megabytes a step, of every kind that the memory model knows, and plans from all-fp32 to
all that is stored in few bits.
"""

import gc
import itertools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))

from assign.executor.apply import planned_step
from assign.executor.compiled_memory import rehearse
from assign.memory.estimate import estimate
from assign.optim.optimizers import follow
from assign.plan.space import SearchSpace
from assign.planner import search_table
from assign.tasks.models import GPT, ResNet
from assign.tracing.measuring import measure_peak
from assign.tracing.tracer import trace
from benchmarks import facts

Made = tuple[nn.Module, Any]
"""A model and a batch."""


def main() -> None:
    job, result = (Path(argument) for argument in sys.argv[1:])
    options = json.loads(job.read_text())
    torch.set_num_threads(options["threads"])
    rows = [
        compare(options["model"], plan, backend, options["seed"])
        for backend in options["backends"]
        for plan in options["plans"]
    ]
    facts.write(result, rows)


def compare(model_name: str, plan_name: str, backend: str, seed: int) -> dict[str, Any]:
    """Bytes of one step, as they are said to be and as they are."""
    torch.manual_seed(seed)
    torch.compiler.reset()
    gc.collect()
    model, batch = MODELS[model_name]()
    model.train()
    table = trace(model, batch, _loss, _adamw)
    plan = search_table(table, **PLANS[plan_name])
    said = estimate(table, plan)
    compiled = rehearse(model, batch, _loss, plan, table) if backend == "inductor" else None
    predicted, peak_at = (compiled.peak_bytes, compiled.peak_in) if compiled else (said.peak_bytes, said.peak_at)
    step = planned_step(model, _loss, plan, backend=backend)
    optimizer = follow(_adamw(model.parameters()), model, plan)
    losses = []

    def one() -> None:
        optimizer.zero_grad()
        loss = step(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())

    for _ in range(3):  # optimizer states come into being, kernels are compiled
        one()
    optimizer.zero_grad()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    inputs = batch.values() if isinstance(batch, Mapping) else batch
    measured = measure_peak(one, [*model.parameters(), *model.buffers(), *inputs, *states])
    return {
        "model": model_name,
        "plan": plan_name,
        "backend": backend,
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "ratio": predicted / measured,
        "of_fp32": predicted / said.baseline_peak_bytes,
        "peak_at": peak_at,
        "losses": [float(loss) for loss in losses],
    }


PLANS: dict[str, dict[str, Any]] = {
    "fp32": {"strategy": "uniform", "space": SearchSpace(formats="fp32")},
    "bf16": {"strategy": "uniform", "space": SearchSpace(formats="bf16")},
    "native, half low": {"low_ratio": 0.5},
    "native, all low": {"low_ratio": 1.0},
    "hfp8, all low": {"low_ratio": 1.0, "space": "hfp8"},
    "bf16, 8-bit states, bf16 gradients": {
        "low_ratio": 0.0,
        "space": SearchSpace(optimizer_states="dynamic8", gradients="bf16"),
    },
}


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def _loss(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        found: Tensor = model(**batch).loss
        return found
    output, target = model(batch[0]), batch[1]
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def _images(n: int, size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, size, size), torch.randint(10, (n,))


def _tokens(n: int, length: int, symbols: int) -> tuple[Tensor, Tensor]:
    return torch.randint(symbols, (n, length)), torch.randint(symbols, (n, length))


def _mlp() -> Made:
    widths = (512, 2048, 2048, 2048)
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(2048, 10)), (torch.randn(2048, 512), torch.randint(10, (2048,)))


def _resnet() -> Made:
    return ResNet(channels_in=3, widths=(32, 64), blocks=2, classes=10), _images(64, 32)


def _gpt() -> Made:
    return GPT(symbols=1024, context=128, width=128, layers=3, heads=4), _tokens(8, 128, 1024)


def _transformers(kind: str, config: str, images: tuple[int, int] | None = None, **sizes: Any) -> Callable[[], Made]:
    def make() -> Made:
        import transformers

        model = getattr(transformers, kind)(getattr(transformers, config)(**sizes))
        if images:
            pixels, labels = _images(*images)
            return model, {"pixel_values": pixels, "labels": labels}
        ids, _ = _tokens(8, 128, 1000)
        return model, {"input_ids": ids, "labels": ids}

    return make


_TEXT = {"vocab_size": 1000, "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 3}
_DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.0}

MODELS: dict[str, Callable[[], Made]] = {
    "mlp": _mlp,
    "resnet": _resnet,
    "gpt": _gpt,
    "vit": _transformers(
        "ViTForImageClassification",
        "ViTConfig",
        (32, 32),
        **{**_TEXT, "num_attention_heads": 3, "image_size": 32, "patch_size": 4, "num_labels": 10},
    ),
    "bert": _transformers("BertForMaskedLM", "BertConfig", **_TEXT, **_DROPOUT, num_attention_heads=3),
    "llama": _transformers(
        "LlamaForCausalLM", "LlamaConfig", **_TEXT, num_attention_heads=6, num_key_value_heads=2, use_cache=False
    ),
    "gpt2 (transformers)": _transformers(
        "GPT2LMHeadModel",
        "GPT2Config",
        vocab_size=1000,
        n_embd=192,
        n_layer=3,
        n_head=3,
        n_positions=128,
        use_cache=False,
    ),
    "resnet (transformers)": _transformers(
        "ResNetForImageClassification",
        "ResNetConfig",
        (32, 64),
        embedding_size=32,
        hidden_sizes=[64, 128, 128, 256],
        depths=[1, 1, 1, 1],
        num_labels=10,
    ),
    "mobilenet": _transformers(
        "MobileNetV2ForImageClassification", "MobileNetV2Config", (32, 64), depth_multiplier=0.5, num_labels=10
    ),
    "convnext": _transformers(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        (32, 64),
        hidden_sizes=[32, 64, 128, 128],
        depths=[1, 1, 2, 1],
        num_labels=10,
    ),
}


if __name__ == "__main__":
    main()
