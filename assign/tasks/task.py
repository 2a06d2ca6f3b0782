"""A task: a model, its loss, its data, and how to train and evaluate it."""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from assign.errors import TaskError
from assign.options import option
from assign.tasks.batch import Batch

Metrics = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Model, loss, data and optimizer of a training; checked when it is created.

    Attributes:
        model: a module, which is copied for every run, or a function without arguments that makes one, called after
            seeding.
        loss: ``loss(model, batch)`` → scalar tensor.
        train: batches, read once per epoch: a list, a ``DataLoader``, or anything that can be iterated repeatedly.
        evaluate: ``evaluate(model)`` → named numbers or None; called without gradients and with the model in eval mode.
        optimizer: ``optimizer(parameters)`` → a torch optimizer.
        epochs: number of passes over ``train``.
        scheduler: ``scheduler(optimizer)`` → a learning-rate scheduler, stepped after every epoch.
        name: for reports and messages.
    Raises:
        TaskError: says which field, what was given and what is allowed.
    """

    model: nn.Module | Callable[[], nn.Module]
    loss: Callable[[nn.Module, Batch], Tensor]
    train: Iterable[Batch]
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    epochs: int
    evaluate: Callable[[nn.Module], Metrics | None] | None = None
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module) and not callable(self.model):
            _refuse("model", self.model, "a torch.nn.Module, or a function of no arguments that makes one")
        _check_callable("loss", self.loss, "a function loss(model, batch) that returns a scalar tensor")
        if isinstance(self.optimizer, Optimizer):
            _refuse(
                "optimizer", self.optimizer, "a function of parameters, e.g. lambda p: torch.optim.AdamW(p, lr=1e-3)"
            )
        _check_callable("optimizer", self.optimizer, "a function optimizer(parameters) that returns a torch optimizer")
        for name, value in (("evaluate", self.evaluate), ("scheduler", self.scheduler)):
            if value is not None:
                _check_callable(name, value, f"a function {_SIGNATURES[name]}, or None")
        if isinstance(self.train, Iterator):
            _refuse("train", self.train, "batches that can be read again every epoch: wrap an iterator in list(...)")
        if isinstance(self.train, Tensor) or not isinstance(self.train, Iterable):
            _refuse("train", self.train, "an iterable of batches: a list or a torch.utils.data.DataLoader")
        if not isinstance(self.epochs, int) or isinstance(self.epochs, bool) or self.epochs < 1:
            _refuse("epochs", self.epochs, "a whole number of at least 1")
        if not isinstance(self.name, str):
            _refuse("name", self.name, "a text")

    def make_model(self) -> nn.Module:
        """Return a new model for one run; ``self.model`` itself is never trained.

        Raises:
            TaskError: the function returned something else.
        """
        if isinstance(self.model, nn.Module):
            return copy.deepcopy(self.model)
        made = self.model()
        if not isinstance(made, nn.Module):
            _refuse("model()", made, "a torch.nn.Module")
        return made

    def make_optimizer(self, model: nn.Module) -> Optimizer:
        """Return an optimizer for the trainable parameters of ``model``.

        Raises:
            TaskError: no parameter is trainable, or the function returned something else.
        """
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not parameters:
            _refuse("model", model, "a module with at least one parameter that requires a gradient")
        made = self.optimizer(parameters)
        if not isinstance(made, Optimizer):
            _refuse("optimizer(parameters)", made, "a torch.optim.Optimizer")
        return made

    def first_batch(self) -> Batch:
        """Return the first batch, e.g. for tracing.

        Raises:
            TaskError: there is no batch.
        """
        for batch in self.train:
            return batch
        return _refuse("train", self.train, "at least one batch")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """Options of a task in the shell; None leaves the value to the task.

    Attributes:
        data: Directory with the task's data.
        batch_size: Samples per step. Default: the task's own number.
        seed: Seed of the model, the data's order and the search.
        device: Where the model and the data are: ``cpu``, ``cuda``, ``cuda:1``, and so on.
        epochs: Epochs to train. Default: the task's own number.
        width: Multiplier of the channels of the built-in models.
    Raises:
        TaskError: a value is out of its range, or there is no such device.
    """

    data: Path | None = None
    batch_size: int | None = None
    seed: int = 0
    device: str = "cpu"
    epochs: int | None = None
    width: float | None = field(default=None, metadata=option(hidden=True))

    def __post_init__(self) -> None:
        for name, value in (("batch_size", self.batch_size), ("epochs", self.epochs)):
            if value is not None and value < 1:
                raise TaskError(f"{name} is {value}; give a whole number of at least 1.")
        if self.width is not None and not 0 < self.width <= 16:
            raise TaskError(f"width is {self.width}; give a multiplier above 0 and up to 16, e.g. 0.5.")
        check_seed(self.seed)
        check_device(self.device)


SEEDS = 2**32
"""A seed s must satisfy -SEEDS < s < SEEDS, so that all random-number generators accept it."""


def check_seed(seed: int, *, where: str = "task") -> int:
    """Return the seed after checking that random-number generators accept it.

    Raises:
        TaskError: it is out of range.
    """
    if not -SEEDS < seed < SEEDS:
        raise TaskError(
            f"{where}: the seed is {seed}, which is outside the range of random generators.\n"
            f"  Allowed: whole numbers from {1 - SEEDS} to {SEEDS - 1}.\n  Give a smaller one."
        )
    return seed


def check_device(name: str) -> torch.device:
    """Return the device called ``name``.

    Raises:
        TaskError: this machine does not have it.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # which one torch raises depends on the kind of device
        allowed = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise TaskError(f"device {name!r} cannot be used here: choose from {', '.join(allowed)}.") from error
    return device


_SIGNATURES = {
    "evaluate": "evaluate(model) that returns named numbers",
    "scheduler": "scheduler(optimizer) that returns a torch learning-rate scheduler",
}


def _check_callable(field: str, value: Any, allowed: str) -> None:
    if not callable(value):
        _refuse(field, value, allowed)


def _refuse(field: str, given: Any, allowed: str) -> Any:
    shown = repr(given) if isinstance(given, (int, float, str, type(None))) else f"a {type(given).__name__}"
    raise TaskError(f"Task: {field} is {shown}; it must be {allowed}.")
