"""Count the bytes that operators allocate on tensors without data."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from assign import _torch
from assign.tracing.joint import tensors_in

Scratch = Callable[[Any, Sequence[Any], Mapping[str, Any], Any], int]
"""``(operator, arguments, keyword arguments, result)`` → bytes of scratch memory that its kernel uses while it runs."""


class Allocations(_torch.TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives it no types
    """A mode that counts the bytes that operators allocate, minus those that are freed.

    Attributes:
        now: bytes alive, of tensors made under the mode.
        peak: the maximum at any operator, its scratch memory included; may be reset.
    """

    supports_higher_order_operators = True  # random operators of a checkpointed block are higher-order

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
