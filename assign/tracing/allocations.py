"""Count the bytes that operators allocate on tensors without data."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from assign import _torch
from assign.tracing.joint import tensors_in

Scratch = Callable[[Any, Sequence[Any], Mapping[str, Any], Any], int]
"""``(operator, arguments, keyword arguments, result)`` → bytes that its kernel has for itself while it runs."""


class Allocations(_torch.TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives it no types
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
        given = [leaf for leaf in _torch.pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        addresses = {_torch.storage_id(tensor.untyped_storage()) for tensor in given}
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            if _torch.storage_id(storage) not in addresses and storage.device.type == "meta":
                addresses.add(_torch.storage_id(storage))
                size = int(storage.nbytes())
                self.now += size
                weakref.finalize(storage, self._free, size)
        self.peak = max(self.peak, self.now + self._scratch(func, args, kwargs or {}, result))
        return result

    def _free(self, size: int) -> None:
        self.now -= size
