"""PyTorch's own databases of operators and modules as tiny models: ``op_db`` and ``module_db`` of ``torch.testing``.

Importing them changes torch's global flags, so only a process of their own does it.
"""

import functools
import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.testing._internal import common_methods_invocations
from torch.testing._internal.common_modules import module_db

common_methods_invocations.wrapper_set_seed = lambda operator, *args, **kwargs: operator(
    *args, **kwargs
)  # seeds are ours

DATABASES = ("op_db", "module_db")
SAMPLES = 3
"""Of each operator or module, the first so many."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands for a tensor in the arguments of a sample: parameter or tensor of the batch with this number."""

    number: int
    is_parameter: bool


class Sample(nn.Module):
    """Calls an operator or a module with the arguments of a sample; its other tensors are ``batch``.

    Its parameters are the module's own and the tensors that the sample wants a gradient of, or else the first
    floating-point one.
    """

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any, after: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.after = function, after
        taker = _Taker(wants_one=not any(True for _ in self.parameters()))
        self.arguments = taker.take((list(args), kwargs))
        self.inputs = nn.ParameterList(taker.parameters)
        self.batch = taker.batch

    def forward(self, batch: list[Tensor]) -> Any:
        args, kwargs = fill(self.arguments, list(self.inputs), batch)
        return self.after(self.function(*args, **kwargs))


class _Taker:
    """Takes the tensors out of the arguments of a sample, and leaves slots."""

    def __init__(self, *, wants_one: bool) -> None:
        self.wants_one = wants_one
        self.parameters: list[nn.Parameter] = []
        self.batch: list[Tensor] = []
        self.slots: dict[int, Slot] = {}

    def take(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return _mapped(self.take, value)
        if id(value) not in self.slots:
            first = self.wants_one and value.is_floating_point() and not self.parameters
            trained, copied = first or value.requires_grad, value.detach().clone()
            kept: list[Any] = self.parameters if trained else self.batch
            self.slots[id(value)] = Slot(len(kept), trained)
            kept.append(nn.Parameter(copied) if trained else copied)
        return self.slots[id(value)]


def fill(value: Any, parameters: list[Tensor], batch: list[Tensor]) -> Any:
    """The arguments of a sample, with tensors in place of their slots."""
    if isinstance(value, Slot):
        return parameters[value.number] if value.is_parameter else batch[value.number]
    return _mapped(lambda each: fill(each, parameters, batch), value)


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with each of its parts replaced; itself if it has none."""
    if isinstance(value, (list, tuple)):
        parts = [function(each) for each in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {name: function(each) for name, each in value.items()}
    return value


def outputs_of(made: Any) -> list[Tensor]:
    """The floating-point and complex tensors in a result, complex ones as pairs of real numbers."""
    if isinstance(made, Tensor):
        if made.is_complex():
            return [torch.view_as_real(made.resolve_conj())]
        return [made] if made.is_floating_point() else []
    parts = list(made.values()) if isinstance(made, dict) else list(made) if isinstance(made, (list, tuple)) else []
    return [tensor for part in parts for tensor in outputs_of(part)]


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """A weighted sum of all that the model makes."""
    total = torch.zeros(())
    for tensor in outputs_of(model(batch)):
        weights = torch.arange(tensor.numel(), dtype=torch.float32).cos()
        total = total + (tensor.reshape(-1).float() * weights).sum()
    return total


def size(model: nn.Module, batch: list[Tensor]) -> float:
    """The sum of the magnitudes that :func:`loss` sums."""
    with torch.no_grad():
        made = [tensor.reshape(-1).double() for tensor in outputs_of(model(batch))]
        return float(sum((each * torch.arange(each.numel()).cos()).abs().sum() for each in made))


def names() -> list[tuple[str, str]]:
    """Database and name of all that is differentiable in float32 on a CPU."""
    return list(_entries())


def samples(database: str, name: str) -> Iterator[Sample]:
    """The first samples of an operator or a module."""
    seed()
    entry = _entries()[database, name]
    make = _of_operator if database == "op_db" else _of_module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from itertools.islice(make(entry), SAMPLES)


def seed() -> None:
    """Seed every generator that a sample or an operator may draw from."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


@functools.cache
def _entries() -> dict[tuple[str, str], Any]:
    operators = [
        each
        for each in common_methods_invocations.op_db
        if each.supports_autograd and torch.float32 in each.supported_backward_dtypes("cpu")
    ]
    found = {("op_db", each.full_name): each for each in operators}
    return found | {("module_db", each.name): each for each in module_db if torch.float32 in each.dtypes}


def _of_operator(entry: Any) -> Iterator[Sample]:
    for each in entry.sample_inputs("cpu", torch.float32, requires_grad=True):
        yield Sample(entry.op, (each.input, *each.args), each.kwargs, each.output_process_fn_grad)


def _itself(made: Any) -> Any:
    return made


def _of_module(entry: Any) -> Iterator[Sample]:
    for each in entry.module_inputs_func(entry, "cpu", torch.float32, requires_grad=True, training=True):
        module = entry.module_cls(*each.constructor_input.args, **each.constructor_input.kwargs)
        yield Sample(module, each.forward_input.args, each.forward_input.kwargs, _itself)
