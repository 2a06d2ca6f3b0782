"""Measure the noise of many tensors on one batch, exactly or from derivatives.

*Measured*: one step per choice, with only that tensor rounded, compared with the unrounded step on the same batch and
random numbers.

*First-order*: one step for all choices. Let g be the parameters' gradient and t any tensor of the step. For a random
vector r of signs, one more backward pass gives aₜ = ∂⟨r, g⟩/∂t for every t at once. Rounding t by δ then changes ⟨r, g⟩
by ⟨aₜ, δ⟩ to first order, and the mean of its square over r is ‖δg‖². Rounding errors of single elements are almost
independent: Σ (aₜ δ)² has the same mean, and needs far fewer draws. What they have in common shows along g itself: with
r = g the change is ⟨g, δg⟩, which also gives the cosine. The loss changes by ⟨∂loss/∂t, δ⟩. When a gate of relu flips,
the gradient jumps, and no derivative shows it: :mod:`assign.noise.relu_flips` adds the noise of such flips.

Some operators of the backward pass cannot be differentiated again. If torch can decompose such an operator, its parts
run instead. Otherwise tensors that are rounded before it are measured, and so are tensors whose derivative is not
finite.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from assign.errors import DivergedError
from assign.formats.parsing import parse_saved
from assign.noise.instrumented_step import ProbedStep, Result
from assign.noise.perturb import largest_gradient, loss_scale, round_tensor
from assign.noise.relu_flips import flip_factor, root_mean_square
from assign.plan.keys import base_key, is_saved_key
from assign.plan.noise_table import Cell, Method, Sample

DRAWS = 2
"""Number of vectors r per batch. Few are enough: each batch draws new ones, and a sum over elements averages too."""

_NO_DERIVATIVE = re.compile(r"derivative for '?(?:aten::)?(\w+)[\w:. ]*'? (?:is )?not implemented")


def sample(
    method: Method, step: ProbedStep, batch: Any, cells: Sequence[Cell], *, seed: int, loss_scaling: bool
) -> Iterator[tuple[Cell, Sample]]:
    """Yield one sample of every cell, on one batch; all random numbers depend on ``seed`` only.

    Args:
        method: whether to run the rounded step, or to differentiate the unrounded one.
        step: the step with its probes.
        batch: as the step takes it.
        cells: pairs of a tensor and a format.
        seed: of all random numbers.
        loss_scaling: whether gradients are rounded under the loss scale that training arrives at.
    Raises:
        DivergedError: loss or gradient of the unrounded step are not finite, or the gradient is zero.
    """
    run = _measure if method is Method.MEASURED else _differentiate
    yield from run(step, batch, cells, seed, loss_scaling)


def _measure(
    step: ProbedStep, batch: Any, cells: Sequence[Cell], seed: int, loss_scaling: bool
) -> Iterator[tuple[Cell, Sample]]:
    largest, touched = 0.0, set()

    def record(x: Tensor, key: str) -> Tensor:
        nonlocal largest
        touched.add(key)
        largest = max(largest, largest_gradient({key: x})) if loss_scaling else largest
        return x

    with torch.no_grad():
        exact = step.run(batch, record, seed=seed)
        size = _squared_norm(exact)
        for cell in cells:
            rounding = _rounding(cell, largest if loss_scaling else 0.0, seed)
            found = step.run(batch, functools.partial(_changed, cell.key, rounding), seed=seed)
            change = [after - before for after, before in zip(found.gradients, exact.gradients, strict=True)]
            along = _product(exact.gradients, change) / size
            yield cell, _as_sample(_product(change, change) / size, along, float(found.loss - exact.loss))


def _differentiate(
    step: ProbedStep, batch: Any, cells: Sequence[Cell], seed: int, loss_scaling: bool
) -> Iterator[tuple[Cell, Sample]]:
    derivatives = _derivatives(step, batch, {cell.key for cell in cells}, seed)
    if derivatives is None:
        yield from _measure(step, batch, cells, seed, loss_scaling)
        return
    largest = largest_gradient(derivatives.values) if loss_scaling else 0.0
    left = []
    for cell in cells:
        key = derivatives.find(cell.key)
        if not step.hidden.isdisjoint({cell.key, base_key(cell.key)}):
            left.append(cell)
        elif key is None:  # it has no gradient, like the batch
            yield cell, Sample(0.0, 1.0, 0.0)
        else:
            value = derivatives.values[key]
            error = _rounding(cell, largest, seed)(value) - value
            found = derivatives.sample(key, error)
            if found is None:
                left.append(cell)
            else:
                yield cell, found
    if left:
        yield from _measure(step, batch, left, seed, loss_scaling)


def _changed(changed: str, rounding: Callable[[Tensor], Tensor], x: Tensor, key: str) -> Tensor:
    """Return the tensor ``key`` of a step: rounded if it is the one to change."""
    return rounding(x) if key == changed else x


def _derivatives(step: ProbedStep, batch: Any, keys: set[str], seed: int) -> "_Derivatives | None":
    """Return the derivatives of one step without operators that have none; None if torch does not name these."""
    while True:
        try:
            return _Derivatives.of(step, batch, keys, seed)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch raises it for an operator without a derivative
            refused = _NO_DERIVATIVE.search(str(error))
            if refused is None or not step.avoid(refused[1]):
                return None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Derivatives:
    """Derivatives of one step, by key.

    Attributes:
        values: every tensor t.
        squares: mean of aₜ² over the draws.
        flips: the same mean for the part of aₜ due to the slopes of gates.
        along: aₜ for r = g.
        by_loss: ∂loss/∂t.
        size: squared norm of the gradients.
    """

    values: Mapping[str, Tensor]
    squares: Mapping[str, Tensor]
    flips: Mapping[str, Tensor]
    along: Mapping[str, Tensor]
    by_loss: Mapping[str, Tensor]
    size: float

    @classmethod
    def of(cls, step: ProbedStep, batch: Any, keys: set[str], seed: int) -> "_Derivatives":
        tensors: dict[str, Tensor] = {}
        wanted = keys | {base_key(key) for key in keys}

        def record(x: Tensor, key: str) -> Tensor:
            if key not in wanted:
                return x
            tensors[key] = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            return tensors[key]

        with torch.enable_grad():
            result = step.run(batch, record, seed=seed)
            gradients = [x for x in result.gradients if x.requires_grad]
            size = _squared_norm(result)
            generator = torch.Generator().manual_seed(seed)
            squares: dict[str, Tensor] = {}
            flips: dict[str, Tensor] = {}
            for _ in range(DRAWS):
                signs = [torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1 for x in gradients]
                smooth = _adjoints(gradients, signs, tensors)
                result.slopes.on = True
                sloped = _adjoints(gradients, signs, tensors)
                result.slopes.on = False
                for key, adjoint in sloped.items():
                    plain = smooth.get(key, torch.zeros(()))
                    squares[key] = squares.get(key, torch.zeros(())) + plain.square() / DRAWS
                    flips[key] = flips.get(key, torch.zeros(())) + (adjoint - plain).square() / DRAWS
            by_loss = _adjoints([result.loss], [torch.ones_like(result.loss)], tensors)
            along = _adjoints(gradients, [x.detach() for x in gradients], tensors)
        values = {key: x.detach() for key, x in tensors.items()}
        return cls(values=values, squares=squares, flips=flips, along=along, by_loss=by_loss, size=size)

    def find(self, key: str) -> str | None:
        """Return the key under which a tensor was recorded; None if it was not.

        A fused operator such as attention saves a copy that its parts do not have; then the tensor itself stands for
        the copy.
        """
        return next((each for each in (key, base_key(key) if is_saved_key(key) else key) if each in self.values), None)

    def sample(self, key: str, error: Tensor) -> Sample | None:
        """Return the sample for a rounding error; None if a derivative is not finite, e.g. after a root of zero."""
        along = _dot(self.along.get(key), error) / self.size
        noise = (_dot(self.squares.get(key), error.square()) + self._flipped(key, error)) / self.size + along**2
        if not math.isfinite(noise):
            return None
        return _as_sample(noise, along, _dot(self.by_loss.get(key), error))

    def _flipped(self, key: str, error: Tensor) -> float:
        """Return the squared change of the gradients by gates that flip."""
        flips, value = self.flips.get(key), self.values[key]
        if flips is None:
            return 0.0
        if is_saved_key(key):  # the gate reads the copy, and closes where it is zero
            closed = (value > 0) & (value + error <= 0)
            return _dot(flips * root_mean_square(value).square(), closed.to(flips))
        return flip_factor(value, error) * _dot(flips, error.square())


def _adjoints(
    gradients: Sequence[Tensor], directions: Sequence[Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    if not gradients:  # all of them are constants
        return {}
    found = torch.autograd.grad(gradients, list(tensors.values()), directions, retain_graph=True, allow_unused=True)
    return {key: each for key, each in zip(tensors, found, strict=True) if each is not None}


def _rounding(cell: Cell, largest: float, seed: int) -> Callable[[Tensor], Tensor]:
    fmt = parse_saved(cell.format)
    scale = loss_scale(fmt, largest)
    return lambda x: round_tensor(x, cell.key, fmt, scale=scale, seed=seed)


def _squared_norm(result: Result) -> float:
    size = _product(result.gradients, result.gradients)
    if not (math.isfinite(size) and bool(result.loss.isfinite().all())) or size == 0:
        what, loss = "zero" if size == 0 else "not finite", float(result.loss.detach())
        raise DivergedError(
            f"noise: the gradient of the unrounded step is {what} on this batch (loss {loss:g}), so there is "
            "nothing to compare with.\n  Give another batch, or trained weights: --checkpoint"
        )
    return size


def _product(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return sum(_dot(a, b) for a, b in zip(first, second, strict=True))


def _dot(first: Tensor | None, second: Tensor) -> float:
    if first is None:
        return 0.0
    return float(torch.where(second == 0, 0.0, first.detach() * second.detach()).sum(dtype=torch.float64))


def _as_sample(noise: float, along: float, loss: float) -> Sample:
    """Return a sample; ``along`` is ⟨g, δg⟩ / ‖g‖²."""
    turned = 1 + 2 * along + noise
    cosine = (1 + along) / math.sqrt(turned) if turned > 0 else 0.0
    return Sample(noise, max(-1.0, min(1.0, cosine)), loss)
