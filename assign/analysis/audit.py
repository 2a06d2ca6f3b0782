"""Detect values that overflow or underflow in fp16 or bf16, in constants and checkpoints, before training.

* :func:`audit_constants`: an ``eps`` that the format cannot represent, a ``beta`` that it rounds to 1;
* :func:`audit_range`: weights, gradients and updates of an fp32 model, before training continues in the format.

Source: arXiv 2305.10947 (constants), 2311.18587 (range).
"""

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from assign.errors import FormatError, TaskError
from assign.formats.parsing import parse_format
from assign.formats.rows import Format
from assign.numerics.rounding import quantize
from assign.numerics.torch_dtypes import SIXTEEN_BITS
from assign.plan.keys import state_key
from assign.tasks.batch import move
from assign.tasks.task import Task, check_device
from assign.training.weights import load_weights

_EPSILONS = ("eps", "epsilon", "variance_epsilon")
_DECAYS = ("betas", "alpha", "rho")
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


# ---- constants


class Action(StrEnum):
    """What an audit does with its findings."""

    WARN = "warn"
    RAISE = "raise"
    RETURN = "return"


class PrecisionWarning(UserWarning):
    """A constant cannot be represented well in the format of its operands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A constant that its format cannot represent well.

    Attributes:
        where: ``optimizer, group 0`` or a module's path.
        name: of the option, e.g. ``eps`` or ``betas[1]``.
        becomes: its value in the format.
        why: the consequence.
        advice: a value that the format can represent.
    """

    where: str
    name: str
    value: float
    format: str
    becomes: float
    why: str
    advice: float

    def __str__(self) -> str:
        return (
            f"{self.where}: {self.name}={self.value:g} is {self.becomes:.4g} in {self.format}: {self.why}.\n"
            f"  Allowed: {self.advice:g} or {'less' if self.value > self.advice else 'more'}.\n"
            f"  Set {self.name}={self.advice:g}, or keep this part in float32."
        )


def audit_constants(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    format: Format | str | None = None,
    action: Action | str = Action.WARN,
) -> tuple[Finding, ...]:
    """Find constants that overflow, underflow or round to another value in their format, before training.

    An ``eps`` has to be a normal number of the format: if it rounds to zero, it does not prevent a division by zero;
    below ``min_normal`` it has lost bits. And ``1 - beta``, or a batch normalisation's ``momentum``, has to be more
    than half of a moment's last bit; otherwise the moment never decays.

    Args:
        model: each module with an ``eps`` is checked in the dtype of its own parameters or buffers, or else of the
            model; a batch normalisation's ``momentum`` in the dtype of its running statistics.
        optimizer: each group is checked in the dtype of its parameters, in which torch stores the states.
        format: check everything in this format instead, e.g. before the model is converted.
        action: ``warn`` (one :class:`PrecisionWarning` per finding), ``raise``, or ``return`` to do nothing else.
    Returns:
        The findings. There are none for float32 and wider dtypes.
    Raises:
        FormatError: there are findings and ``action`` is ``raise``; or the format or the action is unknown.
    Examples:
        ```python
        optimizer = adamw(model.parameters())
        found = assign.analysis.audit_constants(model, optimizer, format="fp16", action="return")
        for each in found:
            print(each.where, each.name, each.why, each.advice)
        ```
    Source: arXiv 2305.10947: 1e-4 for optimizers and 1e-3 for batch normalisation in fp16. Here: the smallest power of
        ten that is a normal number, and ten times that. For ``beta``: arXiv 2010.06192's bounds of a lost update.
    """
    chosen = parse_format(format) if isinstance(format, str) else format
    if action not in list(Action):
        raise FormatError(
            f"audit_constants: action is {action!r}.\n  Allowed: {', '.join(Action)}.\n  Choose one of these."
        )
    found = [*_in_modules(model, chosen), *(_in_groups(optimizer, chosen) if optimizer else ())]
    if action == Action.RAISE and found:
        raise FormatError("\n".join(map(str, found)))
    if action == Action.WARN:
        for each in found:
            warnings.warn(str(each), PrecisionWarning, stacklevel=2)
    return tuple(found)


def _in_modules(model: nn.Module, chosen: Format | None) -> Iterator[Finding]:
    for path, module in model.named_modules():
        for name in _EPSILONS:
            value = getattr(module, name, None)
            if isinstance(value, float):
                fmt = chosen or _narrow(_own_dtype(module) or _own_dtype(model, recurse=True))
                times = 10 if isinstance(module, _BATCH_NORMS) else 1
                yield from _epsilon(path or type(module).__name__, name, value, fmt, times)
        if isinstance(module, _BATCH_NORMS) and module.running_var is not None and module.momentum:
            fmt = chosen or _narrow(module.running_var.dtype)
            yield from _momentum(path or type(module).__name__, module.momentum, fmt)


def _in_groups(optimizer: Optimizer, chosen: Format | None) -> Iterator[Finding]:
    for index, group in enumerate(optimizer.param_groups):
        where = f"optimizer, group {index}"
        narrow = {dtype: _narrow(dtype) for dtype in (parameter.dtype for parameter in group["params"])}
        for fmt in [chosen] if chosen else narrow.values():
            for name, value in _numbers(group, ("eps",)):
                yield from _epsilon(where, name, value, fmt, 1)
            for name, value in _numbers(group, _DECAYS):
                yield from _decay(where, name, value, fmt)


def _numbers(group: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    """Yield the names and values of numbers: ``eps=1e-8`` as it is, ``betas=(.9, .999)`` one by one."""
    for name in names:
        value = group.get(name)
        if isinstance(value, float):
            yield name, value
        elif isinstance(value, (tuple, list)):
            yield from (
                (f"{name}[{i}]", float(each)) for i, each in enumerate(value) if isinstance(each, (float, Tensor))
            )


def _epsilon(where: str, name: str, value: float, fmt: Format | None, times: int) -> Iterator[Finding]:
    if fmt is None or value == 0 or value >= fmt.min_normal:
        return
    becomes = _in_format(value, fmt)
    advice = times * 10.0 ** math.ceil(math.log10(fmt.min_normal))
    why = "it protects against no division by zero" if becomes == 0 else "it is subnormal and loses bits"
    yield Finding(where=where, name=name, value=value, format=fmt.name, becomes=becomes, why=why, advice=advice)


def _decay(where: str, name: str, value: float, fmt: Format | None) -> Iterator[Finding]:
    """Find a ``beta`` whose change of a moment is lost.

    A moment ``s`` becomes ``s · beta``. A change of half a last bit is between 2^-(m+2) and 2^-(m+1) of ``s``.
    """
    if fmt is None or not 0 < 1 - value < 2.0 ** -(fmt.mantissa_bits + 1):
        return
    never = 1 - value < 2.0 ** -(fmt.mantissa_bits + 2)
    what, falls = ("a moment", "decreases") if never else ("some values of a moment", "decrease")
    why = f"{what} in this format never {falls}"
    advice = math.floor(1000 * (1 - 2.0 ** -(fmt.mantissa_bits + 1))) / 1000
    becomes = _in_format(value, fmt)
    yield Finding(where=where, name=name, value=value, format=fmt.name, becomes=becomes, why=why, advice=advice)


def _momentum(where: str, value: float, fmt: Format | None) -> Iterator[Finding]:
    """Find a momentum whose change of a running statistic is lost: ``beta`` is 1 - momentum, and a step rounds once."""
    for found in _decay(where, "momentum", 1 - value, fmt):
        why = found.why.replace("moment", "running statistic")
        becomes, advice = _in_format(value, parse_format(found.format)), round(1 - found.advice, 3)
        yield replace(found, value=value, becomes=becomes, why=why, advice=advice)


def _in_format(value: float, fmt: Format) -> float:
    return float(quantize(torch.tensor(value), fmt, saturate=False, dtype=torch.float32))


def _own_dtype(module: nn.Module, recurse: bool = False) -> torch.dtype | None:
    held = [*module.parameters(recurse), *module.buffers(recurse)]
    return next((tensor.dtype for tensor in held if tensor.is_floating_point()), None)


def _narrow(dtype: torch.dtype | None) -> Format | None:
    return parse_format(SIXTEEN_BITS[dtype]) if dtype is not None and dtype in SIXTEEN_BITS else None


# ---- range


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeRow:
    """One tensor that would be stored in the format. Shares are of its nonzero elements, None if unknown.

    Attributes:
        name: a parameter, a buffer, or ``parameter.optim.state``.
        largest: largest magnitude.
        overflowing: number of elements that would become infinite, or are not finite already.
        small: share below the smallest value of the format.
        small_gradients: share of products of learning rate and gradient below it.
        lost_updates: share of the updates below half of the weight's last bit; rounding to nearest loses these.
    """

    name: str
    elements: int
    largest: float
    overflowing: int
    small: float | None
    small_gradients: float | None = None
    lost_updates: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeReport:
    """Effect of a format on a model, its optimizer's states and its next step.

    Attributes:
        rows: parameters, buffers and states.
        weights: all parameters together.
    """

    format: str
    rows: tuple[RangeRow, ...]
    weights: RangeRow

    @property
    def fits(self) -> bool:
        """Whether nothing overflows."""
        return not any(row.overflowing for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data; a largest magnitude that is not finite becomes None."""
        weights, *tensors = (
            asdict(row) | {"largest": row.largest if math.isfinite(row.largest) else None}
            for row in (self.weights, *self.rows)
        )
        return {"format": self.format, "fits": self.fits, "weights": weights, "tensors": tensors}


@torch.no_grad()
def audit_range(model: nn.Module, optimizer: Optimizer, *, format: Format | str = "fp16") -> RangeReport:
    """Find values that would overflow, underflow or no longer change if training continued in ``format``.

    Call it with gradients in place: after ``loss.backward()``, before ``optimizer.step()``. It checks the update that
    the optimizer would make now, computed on a copy of the optimizer.

    Args:
        model: in float32, e.g. with a checkpoint's weights.
        optimizer: of the model, with the states that would be cast too.
        format: a format or its name.
    Returns:
        Counts for each tensor, and for all weights together.
    Raises:
        TaskError: no parameter has a gradient, or the optimizer needs a closure.
        FormatError: there is no such format.
    Source: arXiv 2311.18587.
    """
    fmt = parse_format(format) if isinstance(format, str) else format
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    updates = _updates(optimizer)
    rates = {parameter: float(group["lr"]) for group in optimizer.param_groups for parameter in group["params"]}
    counts = {
        name: _Counts.of(parameter, fmt, rates.get(parameter), updates.get(parameter))
        for parameter, name in names.items()
    }
    rows = [count.row(name) for name, count in counts.items()]
    rows += [_Counts.of(buffer, fmt).row(name) for name, buffer in model.named_buffers() if buffer.is_floating_point()]
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if _like(value, parameter):
                rows.append(_Counts.of(value, fmt).row(state_key(names.get(parameter, "?"), name)))
    return RangeReport(format=fmt.name, rows=tuple(rows), weights=_Counts.sum(counts.values()).row("all weights"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counts:
    """Numbers of elements. Unlike shares, they can be added."""

    elements: int
    largest: float
    overflowing: int
    nonzero: int
    small: int
    gradients: int = 0
    small_gradients: int = 0
    updates: int = 0
    lost_updates: int = 0

    @classmethod
    def of(cls, x: Tensor, fmt: Format, rate: float | None = None, update: Tensor | None = None) -> "_Counts":
        size = x.detach().abs()
        more: dict[str, int] = {}
        if rate is not None and update is not None and x.grad is not None:
            grad = (x.grad * rate).abs()
            more["gradients"], more["small_gradients"] = _count(grad), _count(grad, fmt.min_subnormal)
            more["updates"], more["lost_updates"] = _count(update.abs()), _count(update.abs(), _half_a_bit(size, fmt))
        return cls(
            elements=x.numel(),
            largest=float(size.max()) if x.numel() else 0.0,
            overflowing=int((~(size < fmt.overflow_threshold)).sum()),
            nonzero=_count(size),
            small=_count(size, fmt.min_subnormal),
            **more,
        )

    @classmethod
    def sum(cls, counts: Iterable["_Counts"]) -> "_Counts":
        parts = [*counts]
        numbers = [field.name for field in fields(cls) if field.name != "largest"]
        totals = {name: sum(getattr(part, name) for part in parts) for name in numbers}
        largest = float(torch.tensor([0.0, *(part.largest for part in parts)]).max())  # keeps NaN, unlike Python's max
        return cls(largest=largest, **totals)

    def row(self, name: str) -> RangeRow:
        return RangeRow(
            name=name,
            elements=self.elements,
            largest=self.largest,
            overflowing=self.overflowing,
            small=_share(self.small, self.nonzero),
            small_gradients=_share(self.small_gradients, self.gradients),
            lost_updates=_share(self.lost_updates, self.updates),
        )


def _count(size: Tensor, below: Tensor | float | None = None) -> int:
    """Return the number of elements above zero, and below a limit if one is given."""
    found = size > 0
    return int((found if below is None else found & (size < below)).sum())


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _half_a_bit(size: Tensor, fmt: Format) -> Tensor:
    """Return half of the distance from each magnitude to the next one in the format."""
    exponent = torch.where(size == 0, fmt.min_exponent, torch.frexp(size).exponent - 1).clamp(min=fmt.min_exponent)
    return torch.ldexp(torch.full_like(size, 0.5), exponent - fmt.mantissa_bits)


def _updates(optimizer: Optimizer) -> dict[Tensor, Tensor]:
    """Return the change that the optimizer's next step would make to each parameter with a gradient, in float64.

    In float32 the changes below the weight's last bit would be missing.
    """
    ours = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if all(parameter.grad is None for parameter in ours):
        raise TaskError(
            "audit_range: no parameter has a gradient, so there is no update to audit.\n"
            "  Allowed: a model with gradients.\n  Call loss.backward() first, and do not step."
        )
    twin = copy.deepcopy(optimizer)
    theirs = [parameter for group in twin.param_groups for parameter in group["params"]]
    for parameter, other in zip(ours, theirs, strict=True):
        other.data = other.data.double()
        other.grad = None if parameter.grad is None else parameter.grad.double()
        state = twin.state.get(other, {})
        state.update({name: value.double() for name, value in state.items() if _like(value, other)})
    try:
        twin.step()
    except TypeError as error:
        raise TaskError(
            f"audit_range: {type(optimizer).__name__}.step() cannot be called without arguments: {error}.\n"
            "  Allowed: optimizers whose step() needs no arguments.\n  Use one of them, e.g. torch.optim.SGD."
        ) from error
    return {p: other - p.double() for p, other in zip(ours, theirs, strict=True) if p.grad is not None}


def _like(value: Any, parameter: Tensor) -> bool:
    """Whether a state has one element per element of the parameter."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape == parameter.shape


def audit_task(
    task: Task, *, format: str = "fp16", checkpoint: Path | None = None, device: str = "cpu"
) -> tuple[tuple[Finding, ...], RangeReport]:
    """Return both audits of a task's model, optimizer and first batch, for training in ``format``.

    Args:
        task: a new model and optimizer are made from it.
        format: name of the format.
        checkpoint: as for ``weights.load_weights``. Default: the new model.
        device: device of the step: ``cpu`` or ``cuda``.
    Raises:
        TaskError: the task or the checkpoint cannot be used.
        FormatError: there is no such format.
    """
    where = check_device(device)
    model = task.make_model().to(where).train()
    optimizer = task.make_optimizer(model)
    if checkpoint is not None:
        load_weights(checkpoint, model, optimizer)
    loss = task.loss(model, move(task.first_batch(), where))
    torch.autograd.backward(loss)
    constants = audit_constants(model, optimizer, format=format, action=Action.RETURN)
    return constants, audit_range(model, optimizer, format=format)
