"""Measure the noise of every tensor and format over several batches, in a file that a killed run resumes from."""

import copy
import fnmatch
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from assign.errors import PlanError, TraceError
from assign.formats.parsing import parse_format, parse_saved
from assign.noise.estimators import sample
from assign.noise.instrumented_step import ProbedStep
from assign.noise.options import NoiseOptions
from assign.options import accept_former
from assign.plan.noise_table import EXACT, Cell, Method, NoiseTable, Sample
from assign.plan.recipes import candidates_of
from assign.plan.space import SearchSpace
from assign.plan.table import Role, TensorTable
from assign.tracing.capture import Loss
from assign.tracing.step import NOT_GIVEN, Step, check_given, refuse_more
from assign.tracing.tracer import trace

_SECONDS = 5.0  # between two writes of the file, while choices are measured one by one


@accept_former("table", space=SearchSpace, options=NoiseOptions)
def measure_noise(
    model: nn.Module | Step,
    batches: Iterable[Any] = NOT_GIVEN,
    loss: Loss = NOT_GIVEN,
    *,
    space: SearchSpace | str = "native",
    options: NoiseOptions | None = None,
    optimizer: Callable[[Any], Optimizer] | None = None,
    file: str | os.PathLike[str] | None = None,
    on_batch: Callable[[NoiseTable], None] | None = None,
) -> NoiseTable:
    """Measure how much rounding each tensor of a step, in each of its formats, changes the gradient of the parameters.

    Batches are measured one after the other. The measurement ends when the median, over all choices, of the relative
    standard error of the noise is at most ``options.rtol`` (after two batches or more), after ``options.max_batches``
    batches, or when there are no more.

    If an optimizer is given, a copy of the model is first trained for ``options.warm_up`` steps, by default 40, on the
    ``batches`` in turn, again from the first after the last. Batches of an iterator that are trained on are not
    measured. Without an optimizer the weights are measured as they are.

    Args:
        model: with its current weights, which are not changed; or the result of :func:`assign.trace`.
        batches: arguments of ``loss``, one after the other. With a traced step, its own batch is the default.
        loss: ``loss(model, batch)`` → scalar tensor.
        space: its formats are measured, those of the recipe and those that it names in addition, also for saved
            activations and pinned tensors; or the name of a recipe. The recipe also decides whether gradients are
            rounded under a loss scale.
        options: method, warm-up and seed of the measurement, and when it ends.
        optimizer: ``optimizer(parameters)`` → torch optimizer for the warm-up. The optimizer of a traced step is used
            only if ``options.warm_up`` is given.
        file: the table is written to it after every batch; batches that are in it already are not measured again.
        on_batch: called with the table after every batch.
    Returns:
        The noise of each tensor and format, batch by batch.
    Raises:
        PlanError: the file belongs to another model, or was measured with other options; there is no batch; or a
            warm-up has no optimizer, or not a batch for each step.
        FormatError: a format does not exist.
        TraceError: as for :func:`assign.trace`; or a traced step and a loss are given.
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
    space, options = SearchSpace.of(space), options or NoiseOptions()
    step: Step | None = None
    if isinstance(model, Step):
        refuse_more("noise", loss=loss, optimizer=NOT_GIVEN if optimizer is None else optimizer)
        batches = [model.batch] if batches is NOT_GIVEN else batches
        step = model
        model, loss, optimizer = step.model, step.loss, step.optimizer
    check_given("noise", batches=batches, loss=loss)
    warm_up = options.steps(trained=optimizer is None)
    if warm_up:
        again = batches if isinstance(batches, Iterator) else itertools.chain.from_iterable(itertools.repeat(batches))
        model = _warmed_up(model, itertools.islice(again, warm_up), loss, optimizer, warm_up, options.seed)
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise PlanError(
            "noise: no batch was given; noise is measured on at least one batch.\n  Give batches=[batch], for example."
        )
    table = step or trace(model, first, loss)
    found = NoiseTable(
        fingerprint=table.fingerprint,
        method=Method(options.method),
        seed=options.seed,
        loss_scaling=space.rules.loss_scaling,
        warm_up=warm_up,
    )
    if file is not None and Path(file).exists():
        found = _resumed(NoiseTable.load(file), found, table, file)
    writer = _Writer(found, file)
    probed = ProbedStep(model, loss, fused=found.method is Method.MEASURED)
    for so_far in _by_batch(probed, itertools.chain([first], iterator), _choices(table, space), writer, options):
        if on_batch is not None:
            on_batch(so_far)
    return writer.table


def _by_batch(
    step: ProbedStep, batches: Iterable[Any], cells: list[Cell], writer: "_Writer", options: NoiseOptions
) -> Iterator[NoiseTable]:
    """Measure batch after batch; yield the table after each."""
    for number, batch in enumerate(itertools.islice(batches, options.max_batches)):
        table = writer.table
        missing = [cell for cell in cells if len(table.cells.get(cell, ())) <= number]
        if missing:
            seed, scaled = options.seed + number, table.loss_scaling
            for cell, each in sample(table.method, step, batch, missing, seed=seed, loss_scaling=scaled):
                writer.add(cell, each)
            writer.write()
        yield writer.table
        if writer.table.relative_error <= options.rtol:
            return


class _Writer:
    """Collects samples in a table, and writes its file from time to time."""

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
    """Return a copy of the model, trained for one step on each of the batches.

    Raises:
        PlanError: there is no optimizer, or not a batch for each step.
        TraceError: nothing can be trained, or the loss has no gradient.
    """
    if make is None:
        raise PlanError(
            f"noise: a warm-up of {steps} steps needs an optimizer.\n"
            "  Give optimizer=torch.optim.AdamW, say, or a trained model and NoiseOptions(warm_up=0)."
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
            f"noise: the warm-up has {steps} steps, but there are only {done} batches; noise is measured on later "
            "batches.\n  Give more batches, a list of batches, or a smaller warm_up."
        )
    optimizer.zero_grad()
    return trained


def _choices(table: TensorTable, space: SearchSpace) -> list[Cell]:
    """Return every tensor with each format that it may have, except fp32; each pair once."""
    cells: dict[Cell, None] = {}
    by_recipe, requested = candidates_of(table, space.rules), candidates_of(table, space.rules, space.formats)
    for row in table.paper_tensors:
        for fmt in (*by_recipe[row.key], *(requested[row.key] if space.formats else ())):
            cells[Cell(row.key, fmt.name)] = None
    for pattern, name in space.pins.items():
        matched = fnmatch.filter(by_recipe, pattern)
        cells |= {Cell(key, parse_format(name).name): None for key in matched}
    saved_formats = [parse_saved(name) for name in space.saved]
    for row in table.tensors:
        if row.role is Role.SAVED:
            cells |= {Cell(row.key, fmt.name): None for fmt in saved_formats}
    return [cell for cell in cells if cell.format != EXACT]


def _resumed(stored: NoiseTable, requested: NoiseTable, table: TensorTable, file: str | os.PathLike[str]) -> NoiseTable:
    try:
        stored.check(table)
    except PlanError as error:
        error.add_note(f"The file is {file}.")
        raise
    for name in ("method", "seed", "loss_scaling", "warm_up"):
        before, now = getattr(stored, name), getattr(requested, name)
        if before != now:
            raise PlanError(
                f"noise: {file} was measured with {name.replace('_', ' ')} {before}, but {now} was requested; "
                "one table has one value of it.\n  Give the same options as before, or another file."
            )
    return stored
