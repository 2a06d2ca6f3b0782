"""Deferred tensors: placeholders for results of a recorded step that are not computed yet."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from torch import Tensor, fx

from assign import _torch
from assign.tracing.pieces import Crossing
from assign.tracing.torch_functions import METADATA


class Recording(Protocol):
    """The methods of a recording that a deferred tensor uses."""

    def close(self, reason: str) -> None:
        """Compute the operators recorded so far."""

    def record(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record a torch function."""


class Deferred(Tensor):
    """A tensor without data of its own: a node of the piece that is being recorded or, once computed, a real tensor."""

    recording: Recording
    node: fx.Node
    fake: Tensor
    computed: Tensor | None
    parametric: bool
    crossing: Crossing | None

    def setup(self, recording: Recording, node: fx.Node, fake: Tensor, parametric: bool) -> None:
        """Connect the tensor to its node."""
        self.recording, self.node, self.fake, self.parametric = recording, node, fake, parametric
        self.computed, self.crossing = None, None

    @property
    def computed_value(self) -> Tensor:
        """Return the real tensor in the dtype of the user's code; a plan may store it in fewer bits."""
        assert self.computed is not None
        return self.computed if self.computed.dtype == self.fake.dtype else self.computed.to(self.fake.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if (func.__self__.__name__ if name == "__get__" else name) in METADATA:
            return plain(func, args, kwargs or {})
        args, kwargs = with_tensors(unwrapped, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it without ``func``
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Record an operator that torch itself calls on a deferred tensor, like any other."""
        recording = next(x.recording for x in tensors_in((args, kwargs or {})) if isinstance(x, Deferred))
        with _torch.without_functions():
            return recording.record(func, args, kwargs or {})


def unwrapped(x: Tensor) -> Tensor:
    """Return the real tensor of a deferred tensor, after computing it if necessary, and any other tensor as it is."""
    if not isinstance(x, Deferred):
        return x
    if x.computed is None:
        x.recording.close("a tensor was used outside the step")
    return x.computed_value


def plain(func: Any, args: Any, kwargs: Any) -> Any:
    """Call a torch function on deferred tensors as on plain tensors."""
    with _torch.without_subclasses():
        return func(*args, **kwargs)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists, dicts and slices."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for each in values:
            yield from tensors_in(each)
    elif isinstance(values, Mapping):
        for each in values.values():
            yield from tensors_in(each)
    elif isinstance(values, slice):
        yield from tensors_in((values.start, values.stop, values.step))


def with_tensors(change: Callable[[Any], Any], values: Any) -> Any:
    """Return the same nested values with ``change`` applied to their tensors."""
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, (tuple, list)):
        return like(values, [with_tensors(change, each) for each in values])
    if isinstance(values, dict):
        return {key: with_tensors(change, each) for key, each in values.items()}
    if isinstance(values, slice):
        return slice(*(with_tensors(change, each) for each in (values.start, values.stop, values.step)))
    return values.item() if isinstance(values, np.generic) else values


def like(values: Any, parts: list[Any]) -> Any:
    """Return ``parts`` in a container of the same type as ``values``."""
    kind = type(values)
    if kind in (tuple, list):
        return kind(parts)
    if hasattr(values, "_fields"):
        return kind(*parts)
    if isinstance(values, tuple) and hasattr(values, "n_fields"):  # the type that torch.max and others return
        return kind(parts)
    return list(parts) if isinstance(values, list) else tuple(parts)
