"""Measure the noise of every tensor and format over several batches, in a file that a killed run resumes from."""

import copy
import fnmatch
import itertools
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from assign.errors import PlanError, TraceError
from assign.noise.sampling import sample
from assign.noise.stepping import ProbedStep
from assign.plan.formats import parse_format, parse_saved
from assign.plan.noise import EXACT, Cell, Method, NoiseTable, Sample
from assign.plan.recipes import candidates_of, get_recipe
from assign.plan.tensors import Role, TensorTable
from assign.tracing.capture import Loss
from assign.tracing.tracer import trace

UNTIL = 0.1
BATCHES = 8
WARM_UP = 40
"""Steps of training after which noise ranks plans well; at the start it does so less (``bench_search.py``)."""

_SECONDS = 5.0  # between two writings of the file, while choices are measured one by one


def measure_noise(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Loss,
    *,
    recipe: str = "native",
    formats: Sequence[str] = (),
    saved: Collection[str] = (),
    pins: Mapping[str, str] = MappingProxyType({}),
    method: Method | str = Method.FIRST_ORDER,
    until: float = UNTIL,
    most: int = BATCHES,
    seed: int = 0,
    optimizer: Callable[[Any], Optimizer] | None = None,
    warm_up: int = 0,
    file: str | os.PathLike[str] | None = None,
    table: TensorTable | None = None,
    on_batch: Callable[[NoiseTable], None] | None = None,
) -> NoiseTable:
    """Measure how much rounding each tensor of a step, in each of its formats, changes the gradient of the parameters.

    Batches are measured one after the other. The measurement ends when the median, over all choices, of the relative
    standard error of the noise is at most ``until`` (after two batches or more), after ``most`` batches, or when there
    are no more.

    Args:
        model: with its current weights. It is not changed: if ``warm_up`` is given, a copy is trained.
        batches: arguments of ``loss``, one after the other.
        loss: ``loss(model, batch)`` → scalar tensor.
        recipe: its candidates are measured; it also decides whether gradients are rounded under a loss scale.
        formats: measured for every tensor in addition, e.g. ``e4m3:pow2``; or ``e4m3/e5m2``, for values and gradients.
        saved: formats of saved activations, e.g. ``int4:block64``.
        pins: pattern of keys → a format measured for these.
        method: ``first-order``: all tensors at once, from derivatives; only tensors of which torch has no derivative
            are measured one by one. ``measured``: one step for each.
        until: relative standard error at which the measurement ends.
        most: largest number of batches.
        seed: of random numbers in a step; batch number n has ``seed + n``.
        warm_up: steps of training, on the first batches, before the measurement. Noise at random weights ranks plans
            less well than noise after about 40 steps.
        optimizer: ``optimizer(parameters)`` → torch optimizer for ``warm_up``.
        file: the table is written to it after every batch; batches that it holds already are not measured again.
        table: of the model, if it was traced before.
        on_batch: called with the table after every batch.
    Returns:
        The noise of each tensor and format, batch by batch.
    Raises:
        PlanError: the file is of another model, or was measured in another way; there is no batch, or
            no such method; or ``warm_up`` without an optimizer.
        FormatError: a format does not exist.
        TraceError: as :func:`assign.trace`.
        DivergedError: the gradient of the step without rounding is zero or not finite.
    Examples:
        ```python
        noise = assign.measure_noise(model, [batch], loss)
        print(noise.noise("0.weight", "e4m3:pow2"))
        plan = assign.search(
            model, batch, loss, low_ratio=0.5, strategy="milp", noise=noise
        )
        ```
    """
    if warm_up < 0:
        raise PlanError(
            f"noise: a warm-up of {warm_up} steps was asked for.\n  Allowed: 0 or more. Give 0 for a trained model."
        )
    iterator = iter(batches)
    if warm_up:
        model = _warmed_up(model, itertools.islice(iterator, warm_up), loss, optimizer, warm_up, seed)
    first = next(iterator, None)
    if first is None or most < 1 or not until >= 0:
        raise PlanError(
            f"noise: {'no batch' if first is None else f'at most {most} batches, until {until}'} was given; noise is "
            "measured on at least one batch, until a share of at least 0.\n  Give batches, --batches 8, --until 0.1."
        )
    if method not in list(Method):
        raise PlanError(f"noise: there is no method {method!r}; choose from {', '.join(Method)}.")
    table = table or trace(model, first, loss)
    cells = _choices(table, recipe, formats, saved, pins)
    found = NoiseTable(
        fingerprint=table.fingerprint,
        method=Method(method),
        seed=seed,
        loss_scaling=get_recipe(recipe).loss_scaling,
        warm_up=warm_up,
    )
    if file is not None and Path(file).exists():
        found = _resumed(NoiseTable.load(file), found, table, file)
    step = ProbedStep(model, loss, fused=found.method is Method.MEASURED)
    writer = _Writer(found, file)
    for number, batch in enumerate(_first(first, iterator, most)):
        missing = [cell for cell in cells if len(writer.table.cells.get(cell, ())) <= number]
        if missing:
            drawn = sample(found.method, step, batch, missing, seed=seed + number, loss_scaling=found.loss_scaling)
            for cell, each in drawn:
                writer.add(cell, each)
            writer.write()
        if on_batch is not None:
            on_batch(writer.table)
        if writer.table.relative_error <= until:
            break
    return writer.table


class _Writer:
    """Gathers samples; the table with them, and now and then its file."""

    def __init__(self, table: NoiseTable, file: str | os.PathLike[str] | None) -> None:
        self.table = table
        self._file, self._written = file, time.monotonic()
        self._new: dict[Cell, list[Sample]] = {}

    def add(self, cell: Cell, each: Sample) -> None:
        self._new.setdefault(cell, []).append(each)
        if time.monotonic() - self._written > _SECONDS:
            self.write()

    def write(self) -> None:
        self.table, self._new = self.table.add(self._new), {}
        if self._file is not None:
            self.table.save(self._file)
        self._written = time.monotonic()


def _warmed_up(
    model: nn.Module, batches: Iterator[Any], loss: Loss, make: Callable[[Any], Optimizer] | None, steps: int, seed: int
) -> nn.Module:
    """A copy of the model, trained a step on each of the batches.

    Raises:
        PlanError: there is no optimizer, or not a batch for each step.
        TraceError: nothing can be trained, or the loss has no gradient.
    """
    if make is None:
        raise PlanError(
            f"noise: a warm-up of {steps} steps needs an optimizer.\n"
            "  Give optimizer=torch.optim.AdamW, say, or a trained model and warm_up=0."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TraceError("noise: no parameter of the model requires a gradient. Unfreeze one, or train nothing.")
    trained = copy.deepcopy(model)
    optimizer = make(trained.parameters())
    done = 0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in batches:
            optimizer.zero_grad()
            found = loss(trained, batch)
            if not isinstance(found, Tensor) or found.numel() != 1 or not found.requires_grad:
                raise TraceError(
                    f"noise: loss(model, batch) returned {found if not isinstance(found, Tensor) else 'a tensor'} "
                    "during the warm-up; it must be a scalar tensor with a gradient.\n"
                    "  Do not detach it, and compute it in floating point."
                )
            torch.autograd.backward(found)
            optimizer.step()
            done += 1
    if done < steps:
        raise PlanError(
            f"noise: a warm-up of {steps} steps was asked for, and there are {done} batches; noise is measured on "
            "those that follow.\n  Give more batches (one may come again), or a smaller warm_up."
        )
    optimizer.zero_grad()
    return trained


def _first(first: Any, rest: Iterable[Any], most: int) -> Iterable[Any]:
    yield first
    for _, batch in zip(range(most - 1), rest, strict=False):
        yield batch


def _choices(
    table: TensorTable, recipe: str, formats: Sequence[str], saved: Collection[str], pins: Mapping[str, str]
) -> list[Cell]:
    """Every tensor with each format that it may have, but fp32; each once."""
    cells: dict[Cell, None] = {}
    by_recipe, asked = candidates_of(table, get_recipe(recipe)), candidates_of(table, get_recipe(recipe), formats)
    for row in table.paper_tensors:
        for fmt in (*by_recipe[row.key], *(asked[row.key] if formats else ())):
            cells[Cell(row.key, fmt.name)] = None
    for pattern, name in pins.items():
        matched = fnmatch.filter(by_recipe, pattern)
        cells |= {Cell(key, parse_format(name).name): None for key in matched}
    waiting = [parse_saved(name) for name in saved]
    for row in table.tensors:
        if row.role is Role.SAVED:
            cells |= {Cell(row.key, fmt.name): None for fmt in waiting}
    return [cell for cell in cells if cell.format != EXACT]


def _resumed(stored: NoiseTable, asked: NoiseTable, table: TensorTable, file: str | os.PathLike[str]) -> NoiseTable:
    try:
        stored.check(table)
    except PlanError as error:
        error.add_note(f"The file is {file}.")
        raise
    for name in ("method", "seed", "loss_scaling", "warm_up"):
        before, now = getattr(stored, name), getattr(asked, name)
        if before != now:
            raise PlanError(
                f"noise: {file} was measured with {name.replace('_', ' ')} {before}, {now} is asked for now, and one "
                "table holds one way of measuring.\n  Give the options that it was begun with, or another file."
            )
    return stored
