"""Models whose steps are timed, each with a loss and one batch of random data, or many of real data.

Dropout is 0: losses can be compared.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assign.tasks import BUILTIN, TaskOptions
from assign.tasks.data import read_text
from assign.tasks.models import GPT, ResNet

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is trained.

    Attributes:
        model, batch: make one, from torch's global generator, on the CPU.
        real: batches of the same shape from a directory of data sets, in an order drawn from that generator.
        loss: ``loss(model, batch)`` → scalar tensor.
        description: sizes, for the result.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]
    description: str
    real: Callable[[Path], Iterator[Batch]] | None = None


def make_workload(name: str, *, small: bool, batch: int | None = None) -> Workload:
    """The workload called ``name``; ``small``: of the same kind, with a step of milliseconds."""
    return WORKLOADS[name](small, batch)


def _cifar_resnet(widths: tuple[int, ...], batch_size: int) -> Callable[[bool, int | None], Workload]:
    def make(small: bool, batch: int | None) -> Workload:
        chosen, n, size = ((8, 16), batch or 4, 8) if small else (widths, batch or batch_size, 32)
        return Workload(
            model=lambda: ResNet(channels_in=3, widths=chosen, blocks=1 if small else 2, classes=10),
            batch=lambda: _images(n, size, 10),
            loss=_class_loss,
            real=None if small else partial(_cifar_images, n),
            description=f"CIFAR ResNet, widths {chosen}, batch {n}, {size}×{size} images",
        )

    return make


def _vit_tiny(small: bool, batch: int | None) -> Workload:
    from transformers import ViTConfig, ViTForImageClassification

    width, layers, heads, n, size = (32, 1, 2, batch or 2, 8) if small else (192, 12, 3, batch or 64, 32)
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=size,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=10,
    )
    return Workload(
        model=lambda: ViTForImageClassification(config),
        batch=lambda: _images(n, size, 10),
        loss=_logits_loss,
        description=f"ViT-tiny, {layers} layers × {width}, batch {n}, {size}×{size} images in patches of 4",
    )


def _gpt2(small: bool, batch: int | None) -> Workload:
    if small:
        return _gpt(layers=1, width=32, heads=2, length=16, symbols=64, n=batch or 2)
    return _gpt(layers=4, width=256, heads=4, length=256, symbols=8192, n=batch or 8)


def _gpt2_small(small: bool, batch: int | None) -> Workload:
    if small:
        return _gpt2(small, batch)
    return _gpt(layers=12, width=768, heads=12, length=1024, symbols=50257, n=batch or 8)


def _gpt(*, layers: int, width: int, heads: int, length: int, symbols: int, n: int) -> Workload:
    return Workload(
        model=lambda: GPT(symbols=symbols, context=length, width=width, layers=layers, heads=heads),
        batch=lambda: _tokens(n, length, symbols),
        loss=_sequence_loss,
        real=partial(_plays, n, length),
        description=f"GPT-2, {layers} layers × {width}, {symbols} symbols, batch {n}, sequence {length}",
    )


def _resnet50(small: bool, batch: int | None) -> Workload:
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]} if small else {}
    n, size = (batch or 2, 32) if small else (batch or 128, 224)
    config = ResNetConfig(num_labels=1000, **sizes)
    return Workload(
        model=lambda: ResNetForImageClassification(config),
        batch=lambda: _images(n, size, 1000),
        loss=_logits_loss,
        description=f"ResNet-50, batch {n}, {size}×{size} images",
    )


def _llama_1b(small: bool, batch: int | None) -> Workload:
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, heads, length, symbols = (32, 1, 4, 16, 64) if small else (2048, 16, 32, 1024, 32000)
    n = batch or (2 if small else 4)
    config = LlamaConfig(
        vocab_size=symbols,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return Workload(
        model=lambda: LlamaForCausalLM(config),
        batch=lambda: _tokens(n, length, symbols),
        loss=_token_loss,
        description=f"Llama shape, {layers} layers × {width}, batch {n}, sequence {length}",
    )


WORKLOADS: dict[str, Callable[[bool, int | None], Workload]] = {
    "resnet18": _cifar_resnet((64, 128, 256, 512), 128),
    "resnet-2.8m": _cifar_resnet((64, 128, 256), 64),
    "gpt2": _gpt2,
    "vit-tiny": _vit_tiny,
    "resnet50": _resnet50,
    "gpt2-small": _gpt2_small,
    "llama-1b": _llama_1b,
}

DEFAULTS = {"cpu": ("resnet18", "gpt2", "vit-tiny"), "cuda": ("resnet50", "gpt2-small", "llama-1b")}
"""Models by kind of device."""


def _images(n: int, size: int, classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, size, size), torch.randint(classes, (n,))


def _tokens(n: int, length: int, symbols: int) -> tuple[Tensor, Tensor]:
    text = torch.randint(symbols, (n, length + 1))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def _cifar_images(n: int, directory: Path) -> Iterator[Batch]:
    """Images of CIFAR-10, moved and mirrored, with their classes."""
    task = BUILTIN["cifar10"](TaskOptions(data=directory, batch_size=n))
    while True:
        yield from task.train


def _plays(n: int, length: int, directory: Path) -> Iterator[Batch]:
    """Pieces of Shakespeare's plays from random places, each character a symbol, and the characters that follow."""
    text = read_text(directory, "tinyshakespeare.txt", "gpt2")
    codes = torch.tensor(list(text.encode("ascii")))
    while True:
        starts = torch.randint(len(codes) - length, (n, 1))
        pieces = codes[starts + torch.arange(length + 1)]
        yield pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()


def _class_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _logits_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    logits: Any = model(batch[0]).logits
    return F.cross_entropy(logits, batch[1])


def _sequence_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def _token_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    logits: Any = model(batch[0]).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())
