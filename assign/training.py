"""The training loop: with a plan, or plain PyTorch without one; seeds, loss scaling, checkpoints, measured memory.

Epoch ``n`` is seeded (torch, numpy, random) by the seed and ``n`` alone: two runs see the same data in the same order,
whatever else they draw, and a resumed run goes on bit for bit.
"""

import contextlib
import dataclasses
import gc
import hashlib
import math
import os
import pickle
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from assign import _torch
from assign.assignment import Assignment
from assign.errors import DivergedError, TaskError
from assign.executor.apply import apply, planned_step
from assign.formats import Scaling, parse_format
from assign.memory import Replay
from assign.recipes import get_recipe
from assign.tasks.batch import Batch, count_bytes, move, tensors_in
from assign.tasks.task import Metrics, Task, check_device
from assign.tensors import TensorTable

WARM_UP = 2
"""Steps before a step counts as steady: they make the optimizer's states and compile what is compiled."""

INITIAL_SCALE = 65536.0
"""Of dynamic loss scaling; doubled after an epoch without overflow, halved at each. Source: arXiv 2301.13464's code."""

_SMALLEST_GRADIENT = 2.0**-30
"""A format that reaches no lower needs loss scaling: fp16 (2^-24) does, the paper's FP(6,9,0) (2^-39) does not."""

_CHECKPOINT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where training stands after a step. ``steps_per_epoch`` is None where the data has no length."""

    epoch: int
    epochs: int
    step: int
    steps_per_epoch: int | None
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a run of training came to.

    Attributes:
        metrics: what the task's ``evaluate`` says at the end; after a divergence, at the end of the last good epoch.
        loss: mean of the last epoch; ``losses``: of each epoch, the unfinished one included.
        measured_peak_bytes: every byte alive at the worst moment of one steady step; None if there was none.
        predicted_peak_bytes: what the memory model says of it; None without a table.
        step_seconds: median of the steady steps; None if there was none.
        steps: optimizer steps tried; ``skipped_steps`` of them had gradients that were not finite, and a loss scale.
        message: after a divergence, where it happened and what to try.
        model: as trained; where training diverged, not fit for use.
    """

    metrics: Metrics
    loss: float
    losses: tuple[float, ...]
    measured_peak_bytes: int | None
    predicted_peak_bytes: int | None
    step_seconds: float | None
    diverged: bool
    steps: int
    skipped_steps: int
    loss_scale: float | None
    message: str
    model: nn.Module = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite become None."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "model"}
        finite = {name: _finite_or_none(value) for name, value in self.metrics.items()}
        return {
            **plain,
            "metrics": finite,
            "loss": _finite_or_none(self.loss),
            "losses": [_finite_or_none(loss) for loss in self.losses],
        }


def train(
    task: Task,
    plan: Assignment | None = None,
    *,
    table: TensorTable | None = None,
    backend: str = "eager",
    seed: int = 0,
    epochs: int | None = None,
    device: str = "cpu",
    checkpoint: Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    max_steps: int | None = None,
    on_step: Callable[[Progress], None] | None = None,
    raise_on_divergence: bool = False,
) -> TrainResult:
    """Train ``task`` from the start, under ``plan`` or, without one, in plain PyTorch.

    Args:
        table: of the model, to say what peak the memory model predicts.
        backend: as in ``assign.apply``.
        epochs: in place of the task's own number.
        checkpoint: file written after every epoch, and after every ``checkpoint_every`` steps.
        resume: go on from ``checkpoint``.
        max_steps: stop after so many steps.
        on_step: told after every step.
    Raises:
        TaskError: the task does not keep to its interface, or the checkpoint cannot be used.
        DivergedError: the loss is not finite, and ``raise_on_divergence``.
        PlanError, TraceError: as ``assign.apply``.
    """
    if resume and checkpoint is None:
        raise TaskError("train: resume=True needs checkpoint=, the file to go on from.")
    run = _Run(task, plan, backend=backend, seed=seed, device=device, epochs=epochs or task.epochs)
    run.on_step = on_step
    if resume and checkpoint is not None:
        run.load(checkpoint)
    message = run.train(checkpoint, checkpoint_every, max_steps)
    if message and raise_on_divergence:
        raise DivergedError(message)
    return run.result(table, message)


def needs_loss_scaling(plan: Assignment) -> bool:
    """Whether small gradients would vanish under ``plan``: its recipe says so, or one's format is as short as fp16.

    A format with a scale of its own does not count; bf16 reaches as low as fp32.
    """
    formats = {entry.format for key, entry in plan.entries.items() if key.endswith(".grad")}
    rows = [parse_format(name) for name in formats]
    short = any(row.scaling is Scaling.NONE and row.min_subnormal > _SMALLEST_GRADIENT for row in rows)
    return get_recipe(plan.recipe).loss_scaling or short


def measure_peak(step: Callable[[], object], resident: Iterable[Tensor]) -> int:
    """Bytes alive at the worst moment of ``step``, those of ``resident`` included.

    Memory that ``resident`` does not name and ``step`` does not allocate is not counted: free the last step's gradients
    before. On CPU the profiler's memory events are added up; on CUDA the allocator is asked.
    """
    tensors = list(resident)
    held = count_bytes(tensors)
    if any(tensor.is_cuda for tensor in tensors):
        gc.collect()  # garbage in cycles, freed within the step, would make room for the step's own
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return held + torch.cuda.max_memory_allocated() - before
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _quiet_stderr():
        profiler.start()
    try:
        step()
    finally:
        with _quiet_stderr():
            profiler.stop()
    now = peak = 0  # what was allocated before the profiler started makes no event when it is freed
    for change in _torch.memory_changes(profiler):
        now += change
        peak = max(peak, now)
    return held + peak


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Swallow what C++ prints: Kineto says on stderr that the profiler starts and stops."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


@dataclass(slots=True, kw_only=True)
class _History:
    """What a run has seen so far; goes into the checkpoint."""

    epoch: int = 0
    step_in_epoch: int = 0
    steps: int = 0
    skipped: int = 0
    skipped_in_epoch: int = 0
    losses: list[float] = field(default_factory=list)
    epoch_loss: float = 0.0
    metrics: Metrics = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    first_batch_bytes: int = 0


class _Run:
    """One run of training: model, optimizer and what belongs to them, made from a seed."""

    def __init__(
        self, task: Task, plan: Assignment | None, *, backend: str, seed: int, device: str, epochs: int
    ) -> None:
        self.task, self.plan, self.seed, self.epochs = task, plan, seed, epochs
        self.device = check_device(device)
        self.on_step: Callable[[Progress], None] | None = None
        self.history = _History()
        _seed(seed)
        self.model = task.make_model().to(self.device)
        self.model.train()
        self.optimizer = task.make_optimizer(self.model)
        self.scheduler = task.scheduler(self.optimizer) if task.scheduler else None
        self.length = len(task.train) if isinstance(task.train, Sized) else None
        self.scaler: torch.amp.GradScaler | None = None
        self.planned = self.model
        self.loss: Callable[[Batch], Tensor] = lambda batch: task.loss(self.model, batch)
        if plan is not None:
            self.loss = planned_step(self.model, task.loss, plan, backend=backend)
            self.planned = apply(self.model, plan, backend=backend)
            if needs_loss_scaling(plan):
                self.scaler = torch.amp.GradScaler(
                    self.device.type, init_scale=INITIAL_SCALE, growth_interval=self.length or 2000
                )
        self.warm_up = WARM_UP  # counts down, in every process anew
        self.last_step = math.inf
        self.resumed: Mapping[str, Tensor | None] | None = None

    def train(self, checkpoint: Path | None, every: int | None, max_steps: int | None) -> str:
        """Train to the end; returns where it diverged, '' if it did not."""
        h = self.history
        stop = math.inf if max_steps is None else max_steps
        self.last_step = min(stop, math.inf if self.length is None else self.length * self.epochs)
        while h.epoch < self.epochs and h.steps < stop:
            complete = True
            for value in self._epoch():
                if not math.isfinite(value):
                    return self._diverged(f"the loss is {value}")
                if checkpoint and every and h.steps % every == 0:
                    self.save(checkpoint)
                if h.steps >= stop:
                    complete = h.step_in_epoch == self.length
                    break
            message = self._end_epoch(complete)
            if message:
                return message
            if checkpoint:
                self.save(checkpoint)
        return ""

    def _epoch(self) -> Iterator[float]:
        """Do the rest of the epoch's steps; yields the loss of each."""
        h = self.history
        _seed(self.seed, h.epoch)
        batches = iter(self.task.train)
        for _ in range(h.step_in_epoch):  # those before the checkpoint
            next(batches, None)
        if self.resumed is not None:
            self._restore_rng(self.resumed)
            self.resumed = None
        for batch in batches:
            value = self._timed_step(move(batch, self.device))
            h.step_in_epoch += 1
            h.steps += 1
            h.epoch_loss += value
            if self.on_step:
                self.on_step(
                    Progress(
                        epoch=h.epoch + 1, epochs=self.epochs, step=h.steps, steps_per_epoch=self.length, loss=value
                    )
                )
            yield value
        if not h.step_in_epoch:
            raise TaskError("Task: train has no batch. Give at least one; a batch size above the data's gives none.")

    def _end_epoch(self, complete: bool) -> str:
        """Evaluate, and turn to the next epoch if this one is complete; returns where it diverged, '' if it did not."""
        h = self.history
        metrics = self._evaluate()
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            return self._diverged(f"{bad[0]} is {metrics[bad[0]]}")
        if self.scaler and h.skipped_in_epoch == h.step_in_epoch:
            return self._diverged("every step of the epoch had gradients that are not finite, at any loss scale")
        h.metrics = metrics
        if complete:
            h.losses.append(h.epoch_loss / h.step_in_epoch)
            h.epoch, h.step_in_epoch, h.epoch_loss, h.skipped_in_epoch = h.epoch + 1, 0, 0.0, 0
            if self.scheduler:
                self.scheduler.step()
        return ""

    def _timed_step(self, batch: Batch) -> float:
        h = self.history
        size = count_bytes(tensors_in(batch))
        h.first_batch_bytes = h.first_batch_bytes or size
        steady = self.warm_up <= 0 or h.steps + 1 == self.last_step > 1
        if steady and h.peak_bytes is None and size == h.first_batch_bytes:
            return self._measured_step(batch)
        start = time.perf_counter()
        value = self._step(batch)
        if self.warm_up <= 0:
            h.seconds.append(time.perf_counter() - start)
        self.warm_up -= 1
        return value

    def _measured_step(self, batch: Batch) -> float:
        values: list[float] = []
        self.optimizer.zero_grad(set_to_none=True)
        states = [s for state in self.optimizer.state.values() for s in state.values() if isinstance(s, Tensor)]
        resident = [*self.model.parameters(), *self.model.buffers(), *states, *tensors_in(batch)]
        self.history.peak_bytes = measure_peak(lambda: values.append(self._step(batch)), resident)
        return values[0]

    def _step(self, batch: Batch) -> float:
        """One whole step; returns the loss, which waits for the device."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise TaskError(f"Task: loss(model, batch) returned {what}; it must be a scalar tensor with a gradient.")
        if self.scaler is None:
            loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch gives it no types
            self.scaler.step(self.optimizer)
            before = self.scaler.get_scale()
            self.scaler.update()
            skipped = self.scaler.get_scale() < before
            self.history.skipped += skipped
            self.history.skipped_in_epoch += skipped
        return float(loss.detach())

    def _evaluate(self) -> Metrics:
        if self.task.evaluate is None:
            return {}
        self.model.eval()
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=cuda):  # what it draws must not change the training
            found = self.task.evaluate(self.planned)
        self.model.train()
        if found is None:
            return {}
        if not isinstance(found, Mapping):
            raise TaskError(
                f"Task: evaluate(model) returned a {type(found).__name__}; it must be named numbers or None."
            )
        return {str(name): float(value) for name, value in found.items()}

    def _diverged(self, what: str) -> str:
        h = self.history
        where = f"training diverged at step {h.steps} (epoch {h.epoch + 1} of {self.epochs}): {what}."
        if self.plan is None:
            return f"{where} No plan was in use: try a lower learning rate, or look for such values in the data."
        other = "" if self.plan.recipe == "native" else ", or the recipe native, whose 8-bit tensors have a scale each"
        return f"{where} The plan is too narrow for this model: try a lower low ratio, a higher budget{other}."

    def result(self, table: TensorTable | None, message: str) -> TrainResult:
        h = self.history
        unfinished = [h.epoch_loss / h.step_in_epoch] if h.step_in_epoch else []
        losses = (*h.losses, *unfinished)
        entries = self.plan.entries if self.plan else {}
        return TrainResult(
            metrics=dict(h.metrics),
            loss=losses[-1] if losses else math.nan,
            losses=losses,
            measured_peak_bytes=h.peak_bytes,
            predicted_peak_bytes=Replay(table, entries).peak_bytes if table else None,
            step_seconds=statistics.median(h.seconds) if h.seconds else None,
            diverged=bool(message),
            steps=h.steps,
            skipped_steps=h.skipped,
            loss_scale=self.scaler.get_scale() if self.scaler else None,
            message=message,
            model=self.model,
        )

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that goes on from it."""
        entries = sorted((key, entry.format) for key, entry in self.plan.entries.items()) if self.plan else []
        plan = hashlib.sha256(repr(entries).encode()).hexdigest()[:16] if self.plan else "none"
        return {"version": _CHECKPOINT_VERSION, "task": self.task.name, "seed": self.seed, "plan": plan}

    def save(self, path: Path) -> None:
        """Write everything that going on needs; the file is never half written."""
        state = {
            "identity": self._identity(),
            "history": dataclasses.asdict(self.history),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else {},
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "rng": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            torch.save(state, temporary)
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:
            raise TaskError(
                f"cannot write the checkpoint {path}: {error}. Give a file in a directory that exists."
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            TaskError: it is not there, not a checkpoint, or of another run.
        """
        if not path.is_file():
            raise TaskError(f"there is no checkpoint {path} to go on from. Start without resume; training writes it.")
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            found = state["identity"]
        except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError, OSError) as error:
            raise TaskError(f"{path} is not a checkpoint, or it was cut off. Start again without resume.") from error
        for name, wanted in self._identity().items():
            if found.get(name) != wanted:
                raise TaskError(
                    f"the checkpoint {path} is of another run: its {name} is {found.get(name)!r}, not {wanted!r}. "
                    "Go on with what it was made with, or start without resume."
                )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise TaskError(f"the checkpoint {path} is of another model or optimizer: {error}") from error
        if self.scheduler:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        self.history = _History(**state["history"])
        self.resumed = state["rng"] if self.history.step_in_epoch else None

    def _restore_rng(self, states: Mapping[str, Tensor | None]) -> None:
        cpu, cuda = states["cpu"], states["cuda"]
        if cpu is not None:
            torch.set_rng_state(cpu.cpu())
        if cuda is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(cuda.cpu(), self.device)


def _seed(seed: int, epoch: int | None = None) -> None:
    """Seed every global generator; ``epoch`` None is before the first."""
    mixed = seed if epoch is None else seed * 1_000_003 + epoch + 1
    torch.manual_seed(mixed)
    random.seed(mixed)
    np.random.seed(mixed % 2**32)


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
