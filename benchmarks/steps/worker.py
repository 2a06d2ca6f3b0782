"""One configuration in a process of its own: a crash, a NaN or a compiler's global state stays here.

``processes.py`` starts it with a job, as JSON. It makes the model, compiles, warms up and says ``ready``; then it takes
as many steps as each line of its input says, and at ``finish`` tells what was measured. Its answers are lines of JSON.
"""

import gc
import itertools
import json
import math
import os
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
from assign.executor.compiled_memory import rehearse
from assign.memory.estimate import estimate
from assign.plan.plan import Assignment
from assign.tasks.batch import move
from assign.tracing.measuring import count_bytes, measure_peak
from assign.tracing.tracer import trace
from assign.training.loop import INITIAL_SCALE, needs_loss_scaling
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

_LEARNING_RATE = 3e-4


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to the log

    def answer(what: dict[str, Any]) -> None:
        answers.write(f"{json.dumps(facts.plain(what))}\n")
        answers.flush()

    try:
        measured = Measured(json.loads(sys.argv[1]))
    except UnavailableError as reason:
        answer({"status": "skipped", "reason": str(reason)})
        return
    answer({"status": "ready"})
    for line in sys.stdin:
        if line.strip() == "finish":
            answer(measured.finish())
            return
        answer({"status": "ready", "taken": measured.take(int(line))})


class Measured:
    """A compiled step of one configuration of one model, and everything that is measured of it.

    Raises:
        UnavailableError: it cannot run here.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        configuration = CONFIGURATIONS[job["configuration"]]
        device = self.device = torch.device(job["device"])
        torch.set_num_threads(job["threads"])
        check_available(configuration, device)
        torch.manual_seed(job["seed"])
        workload = make_workload(job["model"], small=job["small"], batch=job["batch"])
        model = self.model = workload.model().to(device).train()
        batch = self.batch = move(workload.batch(), device)
        batches = itertools.repeat(batch) if job["data"] is None else real_batches(workload, job["data"], device)
        start = time.perf_counter()
        plan = self.plan = make_plan(configuration, model, batch, workload)
        self.said = {
            "description": workload.description,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "real_data": job["data"] is not None,
            "plan_seconds": time.perf_counter() - start if plan else None,
            "low_ratio": plan.provenance.estimate["low_ratio"] if plan else None,
            "predicted_bytes": predict(plan, configuration, model, batch, workload) if plan else None,
        }
        compute = make_loss(configuration, model, workload, plan, device)
        scales = plan is not None and needs_loss_scaling(plan)
        self.step = Step(
            make_optimizer(configuration, model, plan, _LEARNING_RATE),
            lambda: compute(next(batches)),
            torch.amp.GradScaler(device.type, init_scale=INITIAL_SCALE) if scales else None,
        )
        self.warm_up = [timed(self.step, device) for _ in range(WARM_UP)]
        self.steady: list[float] = []

    def take(self, steps: int) -> list[float]:
        """Seconds of so many steps."""
        taken = [timed(self.step, self.device) for _ in range(steps)]
        self.steady += taken
        return taken

    def finish(self) -> dict[str, Any]:
        """Everything measured; bytes are measured now."""
        step, median = self.step, statistics.median(self.steady)
        states = [s for state in step.optimizer.state.values() for s in state.values() if isinstance(s, Tensor)]
        resident = [*self.model.parameters(), *self.model.buffers(), *states, *self.batch]
        saved = step.measure_saved(self.device)
        step.optimizer.zero_grad(set_to_none=True)
        peak = measure_peak(step, resident)
        return self.said | {
            "status": "ok" if all(map(math.isfinite, step.losses)) else "not finite",
            "seconds": self.steady,
            "median_seconds": median,
            "compile_seconds": max(0.0, sum(self.warm_up) - WARM_UP * median),
            "peak_bytes": peak,
            "saved_bytes": saved,
            "state_bytes": count_bytes(states),
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
