"""Return freed memory to the operating system when the size of the batch changes."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch

from assign import _torch


class Heap:
    """The C library's heap of this process, as one training step uses it.

    glibc keeps freed memory for the next allocation of the same size. Steps whose sizes change find it too small, so
    resident memory grows from size to size: that of float32 training doubles within 80 sizes.
    """

    def __init__(self) -> None:
        self._sizes: list[torch.Size] | None = None

    def next_step(self, inputs: Any) -> None:
        """Return freed memory if the CPU tensors in ``inputs`` have other shapes than those of the step before."""
        leaves = _torch.pytree.tree_leaves(inputs)
        sizes = [each.shape for each in leaves if isinstance(each, torch.Tensor) and each.device.type == "cpu"]
        if self._sizes is not None and sizes != self._sizes:
            trim()
        self._sizes = sizes


def trim() -> None:
    """Return freed memory of the heap to the operating system: takes milliseconds, and nothing outside of glibc."""
    function = _malloc_trim()
    if function is not None:
        function(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # another C library
        return None
    return found
