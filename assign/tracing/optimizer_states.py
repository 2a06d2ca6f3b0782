"""Find the optimizer states, from one step of the optimizer.

If possible, the step runs on tensors without data: nothing is computed, and its allocations are counted. For an
optimizer that reads values, a step on zeros in memory is taken instead, up to a size. If neither works, for example for
an optimizer that needs a closure, the states are unknown: none are counted, and a warning is issued.
"""

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from assign import _torch
from assign.errors import TraceError
from assign.numerics.torch_dtypes import dtype_name
from assign.plan.keys import Key, state_key
from assign.plan.table import Role, TensorInfo
from assign.tracing.allocations import Allocations
from assign.tracing.loaded import loaded_dtypes

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

_MAX_ELEMENTS = 2**28
"""Number of parameter elements up to which a step on zeros is taken: 1 GiB, and the same for each state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerStates:
    """States that an optimizer keeps.

    Attributes:
        name: name of its class, ``''`` without an optimizer.
        rows: rows of the states that are plain tensors; states in a library's own tensor type only count in ``bytes``.
        bytes: bytes of all states.
        scratch: bytes of the temporary tensors of a step.
    """

    name: str = ""
    rows: tuple[TensorInfo, ...] = ()
    bytes: int = 0
    scratch: int = 0


def read_optimizer(
    model: nn.Module, make: OptimizerFactory | None, used: Collection[str] | None = None
) -> OptimizerStates:
    """Return the states that the optimizer keeps for the model's parameters.

    Args:
        model: its parameters are not changed: the optimizer gets copies of them.
        make: makes the optimizer from parameters; None: the step has no optimizer.
        used: names of the trained parameters that have a gradient; None means all.
    Raises:
        TraceError: the optimizer cannot be made.
    """
    if make is None:
        return OptimizerStates()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    loaded = loaded_dtypes(model)
    ways = [_Way(device="meta")]
    if sum(p.numel() for _, p in named) <= _MAX_ELEMENTS:
        ways += [_Way(device="cpu"), _Way(device="cpu", sparse=True)]
    failures = []
    for way in ways:
        twins = [
            nn.Parameter(torch.zeros_like(p, device=way.device, dtype=loaded.get(name, p.dtype))) for name, p in named
        ]
        instance = _made(make, twins)
        with_gradient = [twin for (name, _), twin in zip(named, twins, strict=True) if used is None or name in used]
        try:
            scratch = _step(instance, with_gradient, way, on_gpu=any(p.device.type == "cuda" for _, p in named))
        except Exception as error:
            failures.append(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
            continue
        rows, total = _read(instance, [name for name, _ in named], twins)
        return OptimizerStates(name=optimizer_name(instance), rows=tuple(rows), bytes=total, scratch=scratch)
    name = optimizer_name(instance)
    warnings.warn(
        f"trace: the states of {name} are unknown and not counted: no step without data or on zeros creates them "
        f"({failures[-1]}). The predicted memory of a step does not include them.",
        stacklevel=3,
    )
    return OptimizerStates(name=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    """How to take a step: the device and the kind of gradients."""

    device: str
    sparse: bool = False

    def gradient(self, twin: Tensor) -> Tensor:
        if not self.sparse:
            return torch.zeros_like(twin)
        first = torch.zeros(1, 1, dtype=torch.int64)
        return torch.sparse_coo_tensor(first, twin.new_zeros((1, *twin.shape[1:])), twin.shape, check_invariants=True)


def _made(make: OptimizerFactory, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    try:
        return make(parameters)
    except Exception as error:
        raise TraceError(
            f"trace: optimizer(parameters) failed on the {len(parameters)} trained parameters of the model: "
            f"{type(error).__name__}: {error}\n"
            "  Allowed: a function that makes a torch optimizer of them all. Give one, or None to count no states."
        ) from error


def _step(instance: torch.optim.Optimizer, twins: Sequence[nn.Parameter], way: _Way, *, on_gpu: bool) -> int:
    """Take two steps, the first of which makes the states; return the temporary bytes that the second one allocates.

    A fused optimizer updates in place, element by element, and allocates nothing.
    """
    fused = all(group.get("fused") for group in instance.param_groups)
    for group in instance.param_groups:
        if group.get("fused"):  # rejects tensors without data; its states are the same
            group["fused"] = False
        elif on_gpu:
            group["foreach"] = True
    counting = way.device == "meta"
    with torch.compiler.set_stance("force_eager"):
        for _ in range(2 if counting else 1):
            for twin in twins:
                twin.grad = way.gradient(twin)
            with Allocations() if counting else contextlib.nullcontext(Allocations()) as allocations:
                instance.step()
    return 0 if fused else allocations.peak


def _read(
    instance: torch.optim.Optimizer, names: Sequence[str], twins: Sequence[nn.Parameter]
) -> tuple[list[TensorInfo], int]:
    rows, total = [], 0
    for name, twin in zip(names, twins, strict=True):
        states = {key: x for key, x in instance.state[twin].items() if isinstance(x, Tensor) and x.numel() > 1}
        total += sum(part.untyped_storage().nbytes() for state in states.values() for part in _parts(state))
        if not all(type(state) is Tensor and state.is_floating_point() for state in states.values()):
            continue
        rows += [_row(name, key, state) for key, state in states.items()]
    return rows, total


def _parts(state: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that hold a state: itself, or those inside a library's own tensor type."""
    if not _torch.is_traceable_wrapper_subclass(state):
        yield state
        return
    for name in state.__tensor_flatten__()[0]:
        yield from _parts(getattr(state, name))


def _row(name: str, key: str, state: Tensor) -> TensorInfo:
    return TensorInfo(
        key=state_key(name, key),
        role=Role.OPTIM_STATE,
        shape=tuple(state.shape),
        elements=state.numel(),
        dtype=dtype_name(state.dtype),
        op="optimizer",
        module=Key(name).module,
    )


def optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    """Return ``AdamW`` for a class of torch, and the full path of any other class, which may compute anything."""
    kind = type(optimizer)
    return (
        kind.__name__ if f"{kind.__module__}.".startswith("torch.optim.") else f"{kind.__module__}.{kind.__qualname__}"
    )
