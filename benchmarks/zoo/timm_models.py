"""A small model of each modelling file of timm, with two images and their classes."""

import copy
import functools
import importlib
import re
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from benchmarks.zoo import torchvision_standin

CLASSES = 3
SIDE = 64
"""Of an image, where the model takes any."""

MOST = 60e6
"""Parameters, beyond which a model takes minutes here."""


def names() -> list[tuple[str, str]]:
    """Each modelling file with one of its smallest models, where that has fewer than :data:`MOST` parameters."""
    timm = _timm()
    files = defaultdict(list)
    for name in timm.list_models():
        files[importlib.import_module("timm.models._registry")._model_to_module[name]].append(name)
    found = [(file, min(sorted(those, key=_by_name)[:4], key=_parameters)) for file, those in sorted(files.items())]
    return [(file, name) for file, name in found if _parameters(name) < MOST]


def build(_: str, name: str) -> tuple[nn.Module, Any]:
    """The model, and two images: small ones, or if it cannot take these, of the size that it was made for."""
    errors = []
    for settings in ({"img_size": SIDE}, {}):
        for small in (True, False):
            try:
                torch.manual_seed(0)
                model = _timm().create_model(name, pretrained=False, num_classes=CLASSES, **settings).train()
                channels, side, _ = model.default_cfg["input_size"]
                side = SIDE if small else side
                batch = {"images": torch.randn(2, channels, side, side), "classes": torch.tensor([0, 1])}
                loss(copy.deepcopy(model), batch)
                return model, batch
            except Exception as error:
                errors.append(error)
    raise errors[-1]


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Cross entropy."""
    return nn.functional.cross_entropy(model(batch["images"]), batch["classes"])


@functools.cache
def _timm() -> Any:
    torchvision_standin.install()
    return importlib.import_module("timm")


def _by_name(name: str) -> tuple[int, str]:
    """Small ones first, as far as a name tells."""
    rank = next(
        (place for place, each in enumerate(_WORDS) if re.search(rf"(^|[_.]){each}([_.]|$)", name)), len(_WORDS)
    )
    return rank, name


_WORDS = (
    "test", "atto", "femto", "pico", "nano", "xxtiny", "xtiny", "xxs", "xs", "t0", "s0", "m0", "b0", "0", "tiny", "t",
    "mini", "small", "s", "10t", "18", "s12", "a0", "m1", "b1", "11", "base",
)  # fmt: skip


def _parameters(name: str) -> float:
    if name.startswith("test_"):
        return 0
    try:
        with torch.device("meta"):
            model = _timm().create_model(name, pretrained=False, num_classes=CLASSES)
    except Exception:  # some compute with values while they are made
        return float("inf")
    return sum(each.numel() for each in model.parameters())
