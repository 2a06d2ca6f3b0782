"""Return freed memory to the operating system when the size of the batch changes."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch

from assign import _torch

_STEPS = 2
"""Steps with new sizes before which freed memory is returned."""


class Heap:
    """The C library's heap of this process, as one training step uses it.

    glibc keeps freed memory for the next allocation of the same size. If the sizes of a step change, this memory is too
    small, so resident memory grows with each new size: that of float32 training doubles within 80 sizes. The second
    step of a size would still reach beyond the first one's memory, in whose holes its tensors do not fit.
    """

    def __init__(self) -> None:
        self._sizes: list[torch.Size] | None = None
        self._trims = 0

    def next_step(self, inputs: Any) -> None:
        """Return freed memory in the first two steps whose CPU tensors have other shapes than those of the step before.

        Args:
            inputs: of the step, in any nesting.
        """
        leaves = _torch.pytree.tree_leaves(inputs)
        sizes = [each.shape for each in leaves if isinstance(each, torch.Tensor) and each.device.type == "cpu"]
        if self._sizes is not None and sizes != self._sizes:
            self._trims = _STEPS
        if self._trims:
            self._trims -= 1
            trim()
        self._sizes = sizes


def trim() -> None:
    """Return freed memory of the heap to the operating system. It takes milliseconds; without glibc it does nothing."""
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
