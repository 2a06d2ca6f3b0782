"""One configuration in a process of its own: `python benchmarks/steps/worker.py JOB.json RESULT.json`.

``bench_step.py`` starts it, once for each configuration: a crash, a NaN or a compiler's global state stays here.
"""

import gc
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parents[2]))

from assign import _torch
from assign.executor.rehearsal import rehearse
from assign.plan.assignment import Assignment
from assign.plan.memory import estimate
from assign.tasks.batch import count_bytes, move
from assign.tracing.tracer import trace
from assign.training.loop import INITIAL_SCALE, needs_loss_scaling
from assign.training.measuring import measure_peak
from benchmarks import facts
from benchmarks.steps.configurations import (
    CONFIGURATIONS,
    Configuration,
    UnavailableError,
    adamw,
    check_available,
    make_loss,
    make_optimizer,
    make_plan,
)
from benchmarks.steps.workloads import Workload, make_workload

WARM_UP = 3
FEWEST_STEPS = 5
"""Steady steps that are taken even where the time is over."""

_LEARNING_RATE = 3e-4


def main() -> None:
    job, result = (Path(argument) for argument in sys.argv[1:])
    facts.write(result, run(json.loads(job.read_text())))


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Everything that is measured of one configuration of one model."""
    configuration = CONFIGURATIONS[job["configuration"]]
    device = torch.device(job["device"])
    torch.set_num_threads(job["threads"])
    try:
        check_available(configuration, device)
    except UnavailableError as reason:
        return {"status": "skipped", "reason": str(reason)}
    torch.manual_seed(job["seed"])
    workload = make_workload(job["model"], small=job["small"], batch=job["batch"])
    model = workload.model().to(device).train()
    batch = move(workload.batch(), device)
    batches = itertools.repeat(batch) if job["data"] is None else real_batches(workload, job["data"], device)
    start = time.perf_counter()
    plan = make_plan(configuration, model, batch, workload)
    plan_seconds = time.perf_counter() - start if plan else None
    predicted = predict(plan, configuration, model, batch, workload) if plan else None
    compute = make_loss(configuration, model, workload, plan, device)
    step = Step(
        make_optimizer(configuration, model, plan, _LEARNING_RATE),
        lambda: compute(next(batches)),
        torch.amp.GradScaler(device.type, init_scale=INITIAL_SCALE) if plan and needs_loss_scaling(plan) else None,
    )
    seconds = [timed(step, device) for _ in range(WARM_UP)]
    deadline = time.perf_counter() + job["step_seconds"]
    while len(seconds) < WARM_UP + job["steps"]:
        if time.perf_counter() > deadline and len(seconds) >= WARM_UP + FEWEST_STEPS:
            break
        seconds.append(timed(step, device))
    steady = seconds[WARM_UP:]
    median = statistics.median(steady)
    states = [s for state in step.optimizer.state.values() for s in state.values() if isinstance(s, Tensor)]
    resident = [*model.parameters(), *model.buffers(), *states, *batch]
    saved = step.measure_saved(device)
    step.optimizer.zero_grad(set_to_none=True)
    peak = measure_peak(step, resident)
    return {
        "status": "ok" if all(map(math.isfinite, step.losses)) else "not finite",
        "description": workload.description,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": steady,
        "median_seconds": median,
        "compile_seconds": max(0.0, sum(seconds[:WARM_UP]) - WARM_UP * median),
        "plan_seconds": plan_seconds,
        "low_ratio": plan.provenance.estimate["low_ratio"] if plan else None,
        "peak_bytes": peak,
        "predicted_bytes": predicted,
        "saved_bytes": saved,
        "state_bytes": count_bytes(states),
        "real_data": job["data"] is not None,
        "losses": step.losses,
        "skipped_steps": step.skipped,
    }


def predict(
    plan: Assignment, configuration: Configuration, model: nn.Module, batch: Any, workload: Workload
) -> int | None:
    """Peak bytes of the step, said before it runs; None where the optimizer's are not the plan's to know.

    Torch's fused AdamW needs less room than the one that is predicted.
    """
    if not configuration.states:
        return None
    table = trace(model, batch, workload.loss, adamw)
    if configuration.backend != "inductor":
        return estimate(table, plan).peak_bytes
    return rehearse(model, batch, workload.loss, plan, table).peak_bytes


def real_batches(workload: Workload, directory: str, device: torch.device) -> Iterator[Any]:
    """Batches of real data on the device."""
    if workload.real is None:
        raise SystemExit(f"there is no real data for: {workload.description}")
    return (move(batch, device) for batch in workload.real(Path(directory)))


class Step:
    """A whole training step: forward, loss, backward, optimizer."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, compute: Callable[[], Tensor], scaler: torch.amp.GradScaler | None
    ) -> None:
        self.optimizer, self.compute, self.scaler = optimizer, compute, scaler
        self.losses: list[float] = []
        self.skipped = 0

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.finish(self.compute())

    def finish(self, loss: Tensor) -> None:
        """What comes after the forward pass; reading the loss waits for the device, as logging it does."""
        if self.scaler is None:
            loss.backward()
            self.optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            before = self.scaler.get_scale()
            self.scaler.update()
            self.skipped += self.scaler.get_scale() < before
        self.losses.append(float(loss.detach()))

    def measure_saved(self, device: torch.device) -> int:
        """Bytes that a forward pass allocates and that still live when it is done: they wait for the backward pass."""
        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            loss = self.compute()
            torch.cuda.synchronize()
            saved = torch.cuda.memory_allocated() - before
        else:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                loss = self.compute()
            saved = sum(_torch.memory_changes(profiler))
        self.finish(loss)
        return saved


def timed(step: Step, device: torch.device) -> float:
    """Seconds of one step, the device waited for."""
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
