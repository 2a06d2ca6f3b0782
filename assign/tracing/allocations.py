"""Bytes that operators allocate, counted on tensors without data: nothing is computed."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from assign.tracing.joint import tensors_in

Scratch = Callable[[Any, Sequence[Any], Mapping[str, Any], Any], int]
"""``(operator, arguments, keyword arguments, result)`` → bytes that its kernel has for itself while it runs."""


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives it no types
    """While the mode is on, what operators make is counted; what is dropped later is taken off.

    Attributes:
        now: bytes alive, of those made under the mode.
        peak: the most at any operator, its scratch included; may be set back.
    """

    supports_higher_order_operators = True  # a checkpointed block's operators that draw random numbers are such

    def __init__(self, scratch: Scratch = lambda *_: 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self.now = self.peak = 0
        self._scratch = scratch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        addresses = {t.untyped_storage()._cdata for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in addresses and storage.device.type == "meta":
                addresses.add(storage._cdata)
                size = int(storage.nbytes())
                self.now += size
                weakref.finalize(storage, self._free, size)
        self.peak = max(self.peak, self.now + self._scratch(func, args, kwargs or {}, result))
        return result

    def _free(self, size: int) -> None:
        self.now -= size
