"""One architecture under plans, in a process of its own: prints a line of JSON.

python benchmarks/zoo/try_model.py transformers gpt2/modeling_gpt2 GPT2LMHeadModel
"""

import copy
import json
import os
import random
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from torch import nn

import assign
from assign.errors import AssignError
from assign.plan.assignment import Assignment, Entry
from assign.plan.recipes import get_recipe, initial
from assign.plan.tensors import Role, TensorTable
from assign.tasks.batch import tensors_in
from assign.training.measuring import measure_peak
from benchmarks.zoo.build import Name, build

Loss = Callable[[nn.Module, Any], torch.Tensor]

SEEDS = 5
AUTOCAST_FLOOR = 0.01
"""Relative gradient error below which a 16-bit plan is as good as any: two steps of bf16."""
FP8_STEPS = 32
"""A rounding step of e5m2, the narrowest format of an 8-bit plan, in steps of bf16."""


def main() -> None:
    print(json.dumps(find_row(Name(*sys.argv[1:4]))))


def send_row(sender: Connection, name: Name) -> None:
    """Find the row of a model and send it."""
    sender.send(find_row(name))


def find_row(name: Name) -> dict[str, Any]:
    """What came out for a model."""
    torch.set_num_threads(1)
    torch._logging.set_logs(all=50)
    warnings.simplefilter("ignore")
    row: dict[str, Any] = name._asdict()
    start = time.perf_counter()
    try:
        model, batch, loss = build(name)
        expected = run(copy.deepcopy(model), loss, batch)
    except Exception as error:
        row |= {"result": "not built", "reason": said(error)}
    else:
        try:
            row |= examine(model, batch, loss, expected)
        except AssignError as error:
            row |= {"result": "refused", "reason": said(error)}
        except Exception as error:
            row |= {"result": "raw", "reason": said(error)}
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def examine(model: nn.Module, batch: Any, loss: Loss, expected: Any) -> dict[str, Any]:
    """What came out under a plan that keeps what was loaded, and under plans of 16 and 8 bits beside autocast."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.random.get_rng_state()
    table = assign.trace(model, batch, loss)
    kept = all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    kept = kept and torch.equal(generator, torch.random.get_rng_state())
    row: dict[str, Any] = {
        "tensors": len(table.tensors),
        "breaks": len(table.breaks),
        "outside": list(table.outside),
        "share inside": share_inside(table),
        "tracing changes nothing": kept,
    }
    high = Assignment(
        entries={each.key: Entry(_loaded(each.dtype), False) for each in table.paper_tensors},
        recipe="native",
        fingerprint=table.fingerprint,
    )
    found = planned(model, batch, loss, high)
    row["as loaded"] = "eager" if same(found, expected) else ""
    if not row["as loaded"]:
        torch._dynamo.reset()
        compiled = copy.deepcopy(model)
        reference = run(compiled, torch.compile(loss, backend="aot_eager"), batch)
        row["as loaded"] = "aot_eager" if same(found, reference) else ""
        row["gradient error"] = distance(found, expected)
    plans = {"as loaded": high}
    for title, recipe, groups in (
        ("bf16", "bf16", frozenset[int]()),
        ("fp8", "native", frozenset(each.group for each in table.paper_tensors)),
    ):
        entries = initial(table, get_recipe(recipe), groups)
        plans[title] = Assignment(entries=entries, recipe=recipe, fingerprint=table.fingerprint)
    found_errors, measured = errors(model, batch, loss, plans)
    row |= {f"{title} error": found for title, found in found_errors.items()}
    row["peaks"] = {
        title: {"said": assign.estimate(table, plan).peak_bytes, "measured": measured[title]}
        for title, plan in plans.items()
    }
    bound = max(2 * row["autocast error"], AUTOCAST_FLOOR)
    wrong = {
        "tracing changed the model": not kept,
        "under the plan as loaded": not row["as loaded"] and row["gradient error"] >= 1e-5,
        "under bf16": not row["bf16 error"] <= bound,
        "under fp8": not row["fp8 error"] <= FP8_STEPS * bound,
    }
    row["result"] = "differs" if any(wrong.values()) else "ok"
    if row["result"] == "differs":
        row["reason"] = ", ".join(where for where, is_wrong in wrong.items() if is_wrong)
    return row


def errors(
    model: nn.Module, batch: Any, loss: Loss, plans: dict[str, Assignment]
) -> tuple[dict[str, float], dict[str, int]]:
    """The error of the gradient under autocast and under each plan, medians over some weights near the model's.

    Each error is measured against the same kind of step without rounding, because dropout draws other masks where
    AOTAutograd reorders operators.

    Args:
        plans: by title; that of ``"as loaded"`` rounds nothing.
    Returns:
        The errors by title, and the bytes at the worst moment of a forward and backward pass under each plan.
    """
    models = {title: copy.deepcopy(model) for title in ("plain", "autocast", *plans)}
    steps: dict[str, Any] = {"plain": loss, "autocast": autocast(loss)}
    for title, plan in plans.items():
        step = assign.planned_step(models[title], loss, plan, backend="eager")
        steps[title] = lambda _, batch, step=step: step(batch)
    state = copy.deepcopy(model.state_dict())
    found_errors: dict[str, list[float]] = {title: [] for title in ("autocast", *plans) if title != "as loaded"}
    for seed in range(SEEDS):
        found = {}
        for title, each in models.items():
            each.load_state_dict(state)
            each.zero_grad()
            generator = torch.Generator().manual_seed(seed)
            for parameter in each.parameters():
                if parameter.is_floating_point():
                    parameter.data.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator))
            found[title] = run(each, steps[title], batch)
        for title, those in found_errors.items():
            those.append(distance(found[title], found["plain" if title == "autocast" else "as loaded"]))
    del found
    measured = {}
    for title in plans:
        each = models[title]
        each.zero_grad()
        resident = [*each.parameters(), *each.buffers(), *tensors_in(batch)]
        measured[title] = measure_peak(lambda each=each, step=steps[title]: step(each, batch).backward(), resident)
    return {title: statistics.median(those) for title, those in found_errors.items()}, measured


def share_inside(table: TensorTable) -> float:
    """Of the elements that depend on a parameter: the share that operators in pieces make, which a plan covers."""
    weights = {each.key for each in table.tensors if each.role is Role.WEIGHT}
    for each in table.tensors:
        if each.role is Role.ACTIVATION and weights.intersection(each.inputs):
            weights.add(each.key)
    inside = sum(each.elements for each in table.tensors if each.role is Role.ACTIVATION and each.key in weights)
    outside = sum(int(each.rsplit(", ", 1)[1].split()[0].replace(",", "")) for each in table.outside)
    return inside / (inside + outside) if inside + outside else 1.0


def planned(model: nn.Module, batch: Any, loss: Loss, plan: Assignment) -> Any:
    copied = copy.deepcopy(model)
    step = assign.planned_step(copied, loss, plan, backend="eager")
    return run(copied, lambda _, each: step(each), batch)


def autocast(loss: Loss) -> Loss:
    def under(model: nn.Module, batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(model, batch)

    return under


def run(model: nn.Module, step: Any, batch: Any) -> Any:
    """Loss, gradients and buffers of one step."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    found = step(model, batch)
    found.backward()
    return found.detach(), [p.grad for p in model.parameters()], [b.clone() for b in model.buffers()]


def same(found: Any, expected: Any) -> bool:
    pairs = zip([found[0], *found[1], *found[2]], [expected[0], *expected[1], *expected[2]], strict=True)
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def distance(found: Any, expected: Any) -> float:
    """Relative error of the gradient of all parameters; infinite where one has a gradient and should not."""
    if any((a is None) != (b is None) for a, b in zip(found[1], expected[1], strict=True)):
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(found[1], expected[1], strict=True) if b is not None]
    error = sum(float((a - b).square().sum()) for a, b in pairs)
    size = sum(float(b.square().sum()) for _, b in pairs)
    return (error / size) ** 0.5 if size else 0.0


def _loaded(dtype: str) -> str:
    return {"bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}.get(dtype, "fp32")


def said(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()][:4]
    return f"{type(error).__name__} ({Path(where.filename).name}:{where.lineno}): {' | '.join(lines)}"[:600]


if __name__ == "__main__":
    main()
