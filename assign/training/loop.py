"""The training loop, with or without a plan: seeds, loss scaling, checkpoints, measured memory.

Epoch ``n`` is seeded (torch, numpy, random) by the seed and ``n`` alone. Two runs therefore see the same data in the
same order, whatever random numbers they draw, and a resumed run equals an uninterrupted one bit for bit.
"""

import contextlib
import copy
import dataclasses
import hashlib
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from assign import distributed
from assign.errors import DivergedError, PlanError, TaskError
from assign.executor.apply import apply, planned_step
from assign.executor.micro_batches import MicroBatchedStep
from assign.formats.parsing import parse_format
from assign.memory.estimate import peak_bytes
from assign.numerics.delayed import DelayedScales
from assign.numerics.promotion import Promoted, Promotion
from assign.optim.masters import widened_weights
from assign.optim.optimizers import follow
from assign.options import accept_former
from assign.plan.keys import is_grad_key
from assign.plan.persistent_state import (
    UpdateRounding,
    check_rounding,
    has_scaled_gradients,
    is_narrow,
    is_narrowed,
    master_format,
    narrow_buffers,
)
from assign.plan.plan import Assignment
from assign.plan.recipes import get_recipe, promotable
from assign.plan.step_options import StepOptions
from assign.plan.table import TensorTable
from assign.tasks.batch import Batch, move, tensors_in
from assign.tasks.task import Metrics, Task, check_device
from assign.tracing.loaded import complete, stored_otherwise
from assign.tracing.measuring import count_bytes, measure_peak
from assign.training import checkpoints
from assign.training.history import EpochResult, History, Point, TrainResult
from assign.training.options import TrainOptions
from assign.training.weights import continue_from, load_states

WARM_UP = 2
"""Number of warm-up steps, which create the optimizer's states and compile; later steps are measured."""

INITIAL_SCALE = 65536.0
"""First loss scale; doubled after an epoch without overflow, halved at each. Source: code of arXiv 2301.13464."""

_SMALLEST_GRADIENT = 2.0**-30
"""Formats whose smallest value is above this need loss scaling: fp16 (2^-24), but not the paper's FP(6,9,0) (2^-39)."""

_CHECKPOINT_VERSION = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """State of the training after a step.

    Attributes:
        steps_per_epoch: None if the data has no length.
        promoted: tensors that were promoted because of overflow in this step.
        plan: the plan with all promotions so far.
    """

    epoch: int
    epochs: int
    step: int
    steps_per_epoch: int | None
    loss: float
    promoted: tuple[Promoted, ...] = ()
    plan: Assignment | None = None


@accept_former(options=TrainOptions)
def train(
    task: Task,
    plan: Assignment | None = None,
    *,
    table: TensorTable | None = None,
    options: TrainOptions | None = None,
    on_step: Callable[[Progress], None] | None = None,
    on_epoch: Callable[[int, EpochResult], None] | None = None,
    raise_on_divergence: bool = False,
) -> TrainResult:
    """Train ``task`` under ``plan``, or in plain PyTorch without one.

    Args:
        task: model, loss, data and optimizer.
        plan: for the task's model.
        table: of the model. If it is given, the result has the predicted peak.
        options: backend, seed, device, length, checkpoint, start and promotion.
        on_step: called after every step.
        on_epoch: called after every finished epoch with its number, starting at 1, and its result.
        raise_on_divergence: raise an error instead of returning a result that says so.
    Returns:
        Loss, metrics, seconds, measured and predicted peak, promotions, and the training curve.
    Raises:
        TaskError: the task does not implement its interface, several processes train, or the checkpoint or the weights
            cannot be used, for example because the masters cannot represent them (see ``assign.analysis.audit_range``).
        DivergedError: the loss is not finite, and ``raise_on_divergence`` is set.
        PlanError, TraceError: as for :func:`assign.apply`.
    """
    options = options or TrainOptions()
    if distributed.world_size() > 1:
        raise TaskError(
            f"train: this is one of {distributed.world_size()} processes, and each would train its own model on "
            "all of the data.\n  Allowed: one process.\n  Start it without torchrun, or write the loop yourself, "
            "with DistributedDataParallel(assign.apply(model, plan))."
        )
    if options.checkpoint is not None:
        checkpoints.check(options.checkpoint)
    run = _Run(task, plan, options)
    run.on_step, run.on_epoch = on_step, on_epoch
    if options.resume and options.checkpoint is not None:
        run.load(options.checkpoint)
    message = run.train(options.checkpoint, options.checkpoint_every, options.max_steps)
    if message and raise_on_divergence:
        raise DivergedError(message)
    return run.result(table, message)


def needs_loss_scaling(plan: Assignment) -> bool:
    """Whether small gradients would underflow under ``plan``.

    They would if its recipe says so, or if a gradient's format is as short as fp16. A format with a scale of its own
    does not count; bf16 has the range of fp32. With 16-bit masters there is no loss scaling: the scale would have to be
    divided out of gradients in those 16 bits. Nor is there any if all gradients are in formats that
    saturate, such as posits: none becomes infinite, so that the scale would grow without limit.
    """
    if any(is_narrow(master_format(plan.entries, key)) for key in plan.entries):
        return False
    formats = {entry.format for key, entry in plan.entries.items() if is_grad_key(key)}
    rows = [parse_format(name) for name in formats]
    if rows and all(row.layout and row.layout.saturates for row in rows):
        return False
    scalable = [row for row in rows if not row.scaled and not (row.layout and row.layout.saturates)]
    short = any(row.min_subnormal > _SMALLEST_GRADIENT for row in scalable)
    return get_recipe(plan.recipe).loss_scaling or short


class _Run:
    """One run of training: model, optimizer and everything else that it needs, made from a seed."""

    def __init__(self, task: Task, plan: Assignment | None, options: TrainOptions) -> None:
        self.task, self.plan, self.seed, self.epochs = task, plan, options.seed, options.epochs or task.epochs
        chosen = options.promotion
        self.promotion = Promotion(plan, every=chosen.every, threshold=chosen.threshold) if plan else None
        self.device = check_device(options.device)
        self.on_step: Callable[[Progress], None] | None = None
        self.on_epoch: Callable[[int, EpochResult], None] | None = None
        self.history = History()
        _seed(self.seed)
        self.model = task.make_model().to(self.device)
        self.model.train()
        stored = complete(plan, self.model) if plan else None
        rounding = options.update_rounding or (plan.update_rounding if plan else UpdateRounding.NEAREST)
        self.update_rounding = check_rounding(rounding, stored.entries if stored else {}, where="train")
        states = continue_from(task, self.model, plan, options.weights) if options.weights else None
        self.length = len(task.train) if isinstance(task.train, Sized) else None
        self.scaler: torch.amp.GradScaler | None = None
        self.scales: DelayedScales | None = None
        self.planned = self.model
        self.loss: Callable[[Batch], Tensor] = lambda batch: task.loss(self.model, batch)
        if plan is not None:
            self.scales = DelayedScales(plan)
            shared: Any = {"backend": options.backend, "promotion": self.promotion, "scales": self.scales}
            self.loss = planned_step(self.model, task.loss, plan, **shared)
            self.planned = apply(self.model, plan, **shared)
            if needs_loss_scaling(stored or plan):
                _check_divisible(plan)
                self.scaler = torch.amp.GradScaler(
                    self.device.type, init_scale=INITIAL_SCALE, growth_interval=self.length or 2000
                )
        self.optimizer = task.make_optimizer(self.model)  # after apply: its parameters have the plan's dtypes
        if plan is not None and stored is not None and is_narrowed(stored.entries):
            self.optimizer = follow(self.optimizer, self.model, plan, update_rounding=self.update_rounding)
        if states:
            load_states(self.optimizer, states)
        self.scheduler = task.scheduler(self.optimizer) if task.scheduler else None
        self.warm_up = WARM_UP  # counts down; starts again in every process
        self.last_step = math.inf
        self.resumed: Mapping[str, Tensor | None] | None = None
        self.harmless: set[int] = (
            set()
        )  # positions in a batch of tensors whose infinities leave the loss finite, such as masks
        self.unmeasured: Batch | None = None  # the last batch, until the peak of a step has been measured
        self.hidden = ""  # why training diverged, if the plan's formats would hide it by saturation

    def train(self, checkpoint: Path | None, every: int | None, max_steps: int | None) -> str:
        """Train to the end; return a message that says where training diverged, or '' if it did not."""
        h = self.history
        stop = math.inf if max_steps is None else max_steps
        self.last_step = min(stop, math.inf if self.length is None else self.length * self.epochs)
        while h.epoch < self.epochs and h.steps < stop:
            complete = True
            for value in self._epoch():
                if self.hidden:
                    return self._diverged(self.hidden)
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
            if complete and self.on_epoch:
                self.on_epoch(self.history.epoch, self.history.epochs[-1])
        if self.unmeasured is not None and h.peak_bytes is None:
            self._measure_afterwards(self.unmeasured)
        return ""

    def _epoch(self) -> Iterator[float]:
        """Do the remaining steps of the epoch; yield the loss of each."""
        h = self.history
        _seed(self.seed, h.epoch)
        batches = iter(self.task.train)
        for _ in range(h.step_in_epoch):  # skip the batches before the checkpoint
            next(batches, None)
        if self.resumed is not None:
            self._restore_rng(self.resumed)
            self.resumed = None
        for each in batches:
            batch = move(each, self.device)
            if self._hides_infinities(each, batch):
                yield math.inf
                return
            step = self._next_step(batch)
            promoted: tuple[Promoted, ...] = ()
            if self.promotion:
                promoted = self.promotion.step()
                step = dataclasses.replace(step, overflow=self.promotion.overflow_max)
            h.take(step)
            if self.on_step:
                self.on_step(
                    Progress(
                        epoch=h.epoch + 1,
                        epochs=self.epochs,
                        step=h.steps,
                        steps_per_epoch=self.length,
                        loss=step.loss,
                        promoted=promoted,
                        plan=self.promotion.plan if self.promotion else None,
                    )
                )
            yield step.loss
        if not h.step_in_epoch:
            raise TaskError("Task: train has no batch. Give at least one; a batch size above the data size gives none.")

    def _hides_infinities(self, loaded: Batch, batch: Batch) -> bool:
        """Whether the batch holds infinities that make the loss of the model without a plan non-finite.

        A plan's formats may saturate them, and training would continue with meaningless values. An attention mask holds
        infinities too, but its loss is finite. The loss without a plan is computed only the first time that a tensor of
        the batch holds infinities.

        Args:
            loaded: the batch before it is moved to the device.
            batch: the same on the device.
        """
        if self.plan is None:
            return False
        found = {place for place, x in enumerate(tensors_in(loaded)) if _has_infinities(x)} - self.harmless
        if not found:
            return False
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=cuda):
            loss = float(self.task.loss(copy.deepcopy(self._as_loaded()), batch))
        if math.isfinite(loss):
            self.harmless |= found
            return False
        self.hidden = f"the next batch holds infinite values, and without the plan its loss is {loss}"
        return True

    def _end_epoch(self, complete: bool) -> str:
        """Evaluate, and end the epoch if it is complete; return a message about divergence, or ''."""
        h = self.history
        metrics = self._evaluate(self.planned)
        fp32_metrics = self._evaluate(self._as_loaded()) if self.plan else {}
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            return self._diverged(f"{bad[0]} is {metrics[bad[0]]}")
        if self.scaler and h.skipped_in_epoch == h.step_in_epoch:
            return self._diverged("every step of the epoch had gradients that are not finite, at any loss scale")
        h.metrics, h.fp32_metrics = metrics, fp32_metrics
        if complete:
            h.end_epoch(self.scaler.get_scale() if self.scaler else None)
            if self.scheduler:
                self.scheduler.step()
        return ""

    def _next_step(self, batch: Batch) -> Point:
        """Do one whole step; the first one after the warm-up also measures peak memory."""
        h = self.history
        size = count_bytes(tensors_in(batch))
        h.first_batch_bytes = h.first_batch_bytes or size
        steady = self.warm_up <= 0 or h.steps + 1 == self.last_step > 1
        if steady and h.peak_bytes is None and size == h.first_batch_bytes:
            return self._measured_step(batch)
        self.unmeasured = batch if h.peak_bytes is None else None
        step = self._step(batch)
        if self.warm_up <= 0:
            h.seconds.append(step.seconds)
        self.warm_up -= 1
        return step

    def _measured_step(self, batch: Batch) -> Point:
        steps: list[Point] = []
        self.optimizer.zero_grad(set_to_none=True)
        states = [s for state in self.optimizer.state.values() for s in state.values() if isinstance(s, Tensor)]
        resident = [*self.model.parameters(), *self.model.buffers(), *states, *tensors_in(batch)]
        self.history.peak_bytes = measure_peak(lambda: steps.append(self._step(batch)), resident)
        return steps[0]

    def _measure_afterwards(self, batch: Batch) -> None:
        """Measure the peak memory of one extra step if no step of the training was measured, then restore the state."""
        before = copy.deepcopy({name: part.state_dict() for name, part in self._parts().items()})
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            self._measured_step(batch)
        self.optimizer.zero_grad(set_to_none=True)
        for name, part in self._parts().items():
            part.load_state_dict(before[name])

    def _step(self, batch: Batch) -> Point:
        """Do one whole step; reading its loss synchronizes with the device."""
        start = time.perf_counter()
        scale, skipped = None, False
        self.optimizer.zero_grad(set_to_none=True)
        if self.scaler is not None and isinstance(self.loss, MicroBatchedStep):
            self.loss.expect(self.scaler.get_scale())
        loss = self.loss(batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise TaskError(f"Task: loss(model, batch) returned {what}; it must be a scalar tensor with a gradient.")
        if self.scaler is None:
            torch.autograd.backward(loss)
            self.optimizer.step()
        else:
            torch.autograd.backward(self.scaler.scale(loss))
            self.scaler.step(self.optimizer)
            before = self.scaler.get_scale()
            self.scaler.update()
            scale = self.scaler.get_scale()
            skipped = scale < before
        value = float(loss.detach())
        seconds = time.perf_counter() - start
        number = self.history.steps + 1
        return Point(step=number, loss=value, seconds=seconds, loss_scale=scale, skipped=int(skipped))

    def _as_loaded(self) -> nn.Module:
        """Return the model; if the plan changed dtypes of masters or buffers, a copy of it with those as loaded."""
        changed = stored_otherwise(self.model)
        buffers = narrow_buffers(self.plan.entries if self.plan else {})
        if not changed and not buffers:
            return self.model
        plain = copy.deepcopy(self.model)
        for name, parameter in plain.named_parameters():
            if name in changed:
                parameter.grad = None
                parameter.data = parameter.data.to(changed[name])
        for name, buffer in plain.named_buffers():
            buffer.data = buffer.data.float() if name in buffers else buffer.data
        plain.load_state_dict(widened_weights(self.model, self.optimizer))
        return plain

    def _evaluate(self, model: nn.Module) -> Metrics:
        if self.task.evaluate is None:
            return {}
        model.eval()
        cuda = [self.device] if self.device.type == "cuda" else []
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=cuda),
        ):  # random numbers drawn here must not change the training
            found = self.task.evaluate(model)
        model.train()
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
        if self.hidden:
            return f"{where} Look for such values in the data, or in the code that prepares it."
        other = "" if self.plan.recipe == "native" else ", or the recipe native, whose 8-bit tensors have a scale each"
        return f"{where} The plan is too narrow for this model: try a lower low ratio, a higher budget{other}."

    def result(self, table: TensorTable | None, message: str) -> TrainResult:
        """Return the result of the run.

        Args:
            table: of the model, for the predicted peak.
            message: where the training diverged; empty if it did not.
        """
        h, promotion = self.history, self.promotion
        plan = promotion.plan if promotion else self.plan
        later = promotable(table, self.plan) if table and self.plan and promotion and promotion.every else {}
        entries, inside = (plan.entries, plan.sums_inside) if plan else ({}, False)
        peak = peak_bytes(table, entries, self.update_rounding, later, sums_inside=inside) if table else None
        return TrainResult(
            metrics=dict(h.metrics),
            fp32_metrics=dict(h.fp32_metrics),
            loss=h.losses[-1] if h.losses else math.nan,
            losses=h.losses,
            epochs=tuple(h.epochs),
            course=tuple(h.course.points),
            promotions=promotion.promoted if promotion else (),
            promote_threshold=promotion.threshold if promotion and promotion.every else None,
            measured_peak_bytes=h.peak_bytes,
            predicted_peak_bytes=peak,
            fingerprint=table.fingerprint if table else None,
            step_seconds=h.step_seconds,
            diverged=bool(message),
            steps=h.steps,
            skipped_steps=h.skipped,
            loss_scale=self.scaler.get_scale() if self.scaler else None,
            message=message,
            plan=plan,
            model=self.model,
        )

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """Return the properties that a checkpoint must share with the run that resumes from it."""
        entries = sorted((key, entry.format) for key, entry in self.plan.entries.items()) if self.plan else []
        plan = hashlib.sha256(repr(entries).encode()).hexdigest()[:16] if self.plan else "none"
        return {
            "version": _CHECKPOINT_VERSION,
            "task": self.task.name,
            "seed": self.seed,
            "plan": plan,
            "update_rounding": str(self.update_rounding),
            **({"step": self.plan.step.to_json()} if self.plan and self.plan.step != StepOptions() else {}),
        }

    def save(self, path: Path) -> None:
        """Write everything that is needed to resume."""
        state = {name: part.state_dict() for name, part in self._parts().items()}
        rng = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        history = dataclasses.asdict(self.history)
        checkpoints.save(path, {"identity": self._identity(), "history": history, "rng": rng, **state})

    def load(self, path: Path) -> None:
        """Resume from a checkpoint.

        Raises:
            TaskError: there is no such file, it is not a checkpoint, or it belongs to another run.
        """
        state = checkpoints.load(path, self._identity(), self.device)
        for name, part in self._parts().items():
            with _fits(path, name):
                if name not in ("model", "optimizer"):
                    checkpoints.check_like(part.state_dict(), state[name])
                part.load_state_dict(state[name])
        with _fits(path, "history"):
            self.history = History.of(state["history"])
        with _fits(path, "random state"):
            if not isinstance(state["rng"], Mapping):
                raise ValueError(f"it is a {type(state['rng']).__name__}")
            torch.Generator().set_state(state["rng"]["cpu"].cpu())
            self.resumed = state["rng"] if self.history.step_in_epoch else None

    def _parts(self) -> dict[str, Any]:
        """Return the objects that have a ``state_dict``, by name."""
        parts = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "promotion": self.promotion,
            "scales": self.scales,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _restore_rng(self, states: Mapping[str, Tensor | None]) -> None:
        cpu, cuda = states["cpu"], states["cuda"]
        if cpu is not None:
            torch.set_rng_state(cpu.cpu())
        if cuda is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(cuda.cpu(), self.device)


def _has_infinities(x: Tensor) -> bool:
    """Whether ``x`` holds ±inf. For a tensor in host memory this does not synchronize with the device."""
    return x.is_floating_point() and bool(x.isinf().any().cpu().numpy())


@contextlib.contextmanager
def _fits(path: Path, name: str) -> Iterator[None]:
    """Convert any error that a model or an optimizer raises when it loads its state to a TaskError."""
    try:
        yield
    except Exception as error:
        raise TaskError(
            f"the checkpoint {path} belongs to another run: its {name} does not fit: {error}\n"
            "  Resume with the options of that run, or start without resume."
        ) from error


def _check_divisible(plan: Assignment) -> None:
    """Check that a loss scale can be divided out of the gradients.

    Raises:
        PlanError: gradients are stored in 8 bits, with a scale of their own.
    """
    if has_scaled_gradients(plan.entries):
        raise PlanError(
            f"train: the plan stores gradients in 8 bits with a scale of their own, and its recipe {plan.recipe!r} "
            "needs a loss scale, by which such gradients cannot be divided.\n"
            "  Allowed: gradients in fp32 or bf16, or a recipe without loss scaling: native, bf16.\n"
            "  Search again with one of these."
        )


def _seed(seed: int, epoch: int | None = None) -> None:
    """Seed every global generator; ``epoch`` is None before the first epoch."""
    mixed = seed if epoch is None else seed * 1_000_003 + epoch + 1
    torch.manual_seed(mixed)
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
