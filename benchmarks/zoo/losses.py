"""The loss of a model of the zoo."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """The model's own loss; of a model without one, the mean square of the first tensor of its output."""
    found = model(**batch)
    own = getattr(found, "loss", None)
    if own is not None:
        return own.mean()
    tensor = next(each for each in _tensors(found) if each.is_floating_point() and each.requires_grad)
    return (tensor - 0.1).square().mean()


def _tensors(found: Any) -> Iterator[torch.Tensor]:
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, Mapping):
        for each in found.values():
            yield from _tensors(each)
    elif isinstance(found, list | tuple):
        for each in found:
            yield from _tensors(each)
