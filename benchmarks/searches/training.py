"""Plans trained, and their gradients beside those of fp32."""

import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from assign.executor.apply import planned_step
from assign.plan.plan import Assignment
from benchmarks.searches.subjects import Subject

LAST = 20
"""Steps at the end whose mean loss is a training's."""


def train(subject: Subject, plan: Assignment | None, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One training for each seed; the plan's step is traced once for all. Weights are judged in plain fp32.

    One that diverges counts as one that has learned nothing: it has the loss of its first step and its first weights.
    """
    model = subject.model(0)
    step = _step(subject, model, plan)
    runs = []
    for seed in seeds:
        model.load_state_dict(subject.model(seed).state_dict())
        losses, seconds = zip(*fit(subject, model, step, subject.batches(seed)), strict=True)
        diverged = not math.isfinite(losses[-1])
        if diverged:
            model.load_state_dict(subject.model(seed).state_dict())
        judged = judge(subject, model)
        first = losses[0] if math.isfinite(losses[0]) else judged["held_out_loss"]
        runs.append(
            {
                "seed": seed,
                "loss": first if diverged else statistics.fmean(losses[-LAST:]),
                "diverged_at": len(losses) if diverged else None,
                "step_seconds": statistics.median(seconds),
                **judged,
            }
        )
    return runs


def fit(
    subject: Subject, model: nn.Module, step: Callable[[Any], Tensor], batches: Iterable[Any]
) -> Iterator[tuple[float, float]]:
    """Loss and seconds of one step after the other, until a loss is not finite."""
    optimizer = subject.task.make_optimizer(model)
    for batch in batches:
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = step(batch)
        loss.backward()
        optimizer.step()
        value = float(loss.detach())
        yield value, time.perf_counter() - start
        if not math.isfinite(value):
            break


def along(subject: Subject, seed: int, places: Sequence[int]) -> list[nn.Module]:
    """Copies of a model in training in fp32, after so many steps each, ``places`` in order."""
    model = subject.model(seed)
    steps = fit(subject, model, _step(subject, model, None), subject.batches(seed))
    found, done = [], 0
    for place in places:
        done += len(list(itertools.islice(steps, place - done)))
        found.append(copy.deepcopy(model))
    return found


def judge(subject: Subject, model: nn.Module) -> dict[str, float]:
    """Loss and accuracy on what was held out, in plain fp32."""
    model.eval()
    with torch.no_grad():
        found = subject.judge(model)
    model.train()
    return found


def gradient_error(subject: Subject, model: nn.Module, plan: Assignment, batches: Sequence[Any]) -> float:
    """‖g_q − g‖² / ‖g‖² under the whole plan at these weights, the mean over the batches."""
    state = {name: each.clone() for name, each in model.state_dict().items()}
    exact = [_gradient(model, subject.task.loss(model, batch)) for batch in batches]
    step = _step(subject, model, plan)
    rounded = [_gradient(model, step(batch)) for batch in batches]
    model.load_state_dict(state)
    return statistics.fmean(
        float((q - g).square().sum() / g.square().sum()) for q, g in zip(rounded, exact, strict=True)
    )


def _gradient(model: nn.Module, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([each.flatten() for each in found])


def _step(subject: Subject, model: nn.Module, plan: Assignment | None) -> Callable[[Any], Tensor]:
    if plan is None:
        return lambda batch: subject.task.loss(model, batch)
    return planned_step(model, subject.task.loss, plan, backend="eager")


def step_seconds(subject: Subject, count: int = 20) -> float:
    """Median of a step in fp32, now and here."""
    model = subject.model(0)
    steps = fit(subject, model, _step(subject, model, None), subject.batches(0, min(count, subject.steps)))
    return statistics.median(seconds for _, seconds in steps)
