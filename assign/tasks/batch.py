"""Batches: a batch is any nesting of tuples, lists and mappings that contains tensors."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Batch = Any


def move(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on ``device``; objects with a method ``to`` are moved by it."""
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: move(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(move(value, device) for value in batch)
    return batch


def tensors_in(batch: Batch) -> Iterator[Tensor]:
    """Yield every tensor of a batch."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, tuple, list)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_in(value)
