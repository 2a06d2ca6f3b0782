"""One architecture under plans, in a process of its own: prints a line of JSON.

python benchmarks/zoo/try_model.py transformers gpt2/modeling_gpt2 GPT2LMHeadModel
python benchmarks/zoo/try_model.py transformers gpt2/modeling_gpt2 GPT2LMHeadModel inductor
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
from collections.abc import Callable, Iterable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

import assign
from assign.errors import AssignError
from assign.plan.keys import grad_key
from assign.plan.ops import GROUP_STARTS
from assign.plan.plan import Assignment
from assign.plan.recipes import get_recipe, initial
from assign.plan.table import Role, TensorTable
from assign.strategies.baselines import as_loaded
from assign.tasks.batch import tensors_in
from assign.tracing.measuring import measure_peak
from benchmarks.zoo.build import Name, build

Loss = Callable[[nn.Module, Any], torch.Tensor]

SEEDS = 5
AUTOCAST_FLOOR = 0.01
"""Relative gradient error below which a 16-bit plan is as good as any: two steps of bf16."""
DROWNED = 0.5
"""Relative gradient error from which rounding decides the gradient: nothing can be compared."""
FLOAT64_ERROR = 1e-9
"""Relative error of a float64 step that the order of its sums explains, also behind constants in float32."""
FP8_STEPS = 32
"""A rounding step of e5m2, the narrowest format of an 8-bit plan, in steps of bf16."""


def main() -> None:
    print(json.dumps(find_row(Name(*sys.argv[1:4]), *sys.argv[4:5])))


def send_row(sender: Connection, name: Name, backend: str) -> None:
    """Find the row of a model and send it."""
    sender.send(find_row(name, backend))


def find_row(name: Name, backend: str = "eager") -> dict[str, Any]:
    """What came out for a model."""
    torch.set_num_threads(1)
    torch._logging.set_logs(all=50)
    if backend == "inductor":
        torch._inductor.config.fallback_random = True  # the dropout masks of eager steps
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
            row |= examine(model, batch, loss, expected, backend)
        except AssignError as error:
            row |= {"result": "refused", "reason": said(error)}
        except Exception as error:
            row |= {"result": "raw", "reason": said(error)}
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def examine(model: nn.Module, batch: Any, loss: Loss, expected: Any, backend: str) -> dict[str, Any]:
    """Compare the plain step with planned steps: no format changed, bf16, and 8 bits.

    Args:
        model: in training mode.
        batch: as ``loss`` takes it.
        loss: ``loss(model, batch)`` → scalar tensor.
        expected: what :func:`run` returned for the plain step.
        backend: of the planned steps: ``eager`` or ``inductor``.
    """
    state = {key: value.clone() for key, value in model.state_dict().items()}
    seed_all()
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
    plans = plans_of(table)
    steps = {"plain": (copy.deepcopy(model), loss), "autocast": (copy.deepcopy(model), autocast(loss))}
    for title, plan in plans.items():
        steps[title] = planned(model, loss, plan, backend)
    row |= compare_with_plain(run(*steps["as loaded"], batch), expected, model, batch, loss, backend)
    row |= errors(steps, model.state_dict(), batch)
    if backend == "eager":
        row["peaks"] = {
            title: {"said": assign.estimate(table, plan).peak_bytes, "measured": peak(*steps[title], batch)}
            for title, plan in plans.items()
        }
    bound = bound_of(row)
    if bound < row["bf16 error"]:
        narrow = planned(model, loss, as_autocast(table, plans["bf16"]), backend)
        row |= errors({"as loaded": steps["as loaded"], "as autocast": narrow}, model.state_dict(), batch)
    return row | verdict(row, bound)


def bound_of(row: dict[str, Any]) -> float:
    """Allowed gradient error under bf16: twice that of autocast; any where nothing is left of autocast's gradient."""
    drowned = row["autocast error"] is not None and row["autocast error"] > DROWNED
    return float("inf") if drowned else max(2 * (row["autocast error"] or 0.0), AUTOCAST_FLOOR)


def verdict(row: dict[str, Any], bound: float) -> dict[str, str]:
    """Result and reason of a row, and notes: why an error beyond ``bound`` is no fault of the planned step."""
    narrowed_alike = "as autocast error" in row and row["as autocast error"] <= bound
    wrong = {
        "tracing changed the model": not row["tracing changes nothing"],
        "under the plan as loaded": not row["as loaded"],
        "under bf16": not (row["bf16 error"] <= bound or narrowed_alike),
        "under fp8": not row["fp8 error"] <= FP8_STEPS * bound,
    }
    notes = {
        "autocast itself fails": row["autocast error"] is None,
        "autocast's own gradient is mostly rounding error": bound == float("inf"),
        "as exact as autocast where it narrows what autocast narrows": narrowed_alike,
    }
    found = {"result": "differs" if any(wrong.values()) else "ok"}
    for title, those in (("reason", wrong), ("note", notes)):
        if any(those.values()):
            found[title] = ", ".join(each for each, applies in those.items() if applies)
    return found


def as_autocast(table: TensorTable, bf16: Assignment) -> Assignment:
    """A plan that narrows what autocast narrows, operands and results of products, and keeps the rest as loaded."""
    products = [each for each in table.paper_tensors if each.role is Role.ACTIVATION and each.op in GROUP_STARTS]
    narrow = {key for each in products for key in (each.key, *each.inputs)}
    narrow |= {grad_key(key) for key in narrow}
    kept = as_loaded(table, get_recipe("bf16"))
    return replace(bf16, entries={key: bf16.entries[key] if key in narrow else kept[key] for key in kept})


def plans_of(table: TensorTable) -> dict[str, Assignment]:
    """Three plans by title: ``as loaded`` changes no format, ``bf16`` and ``fp8`` narrow every tensor they may."""
    groups = frozenset(each.group for each in table.paper_tensors)
    entries = {
        "as loaded": ("native", as_loaded(table, get_recipe("native"))),
        "bf16": ("bf16", initial(table, get_recipe("bf16"))),
        "fp8": ("native", initial(table, get_recipe("native"), groups)),
    }
    return {
        title: Assignment(entries=each, recipe=recipe, fingerprint=table.fingerprint)
        for title, (recipe, each) in entries.items()
    }


def compare_with_plain(
    found: Any, expected: Any, model: nn.Module, batch: Any, loss: Loss, backend: str
) -> dict[str, Any]:
    """Find which reference the step under the plan ``as loaded`` equals; ``""`` if none.

    An eager step must equal plain PyTorch or ``aot_eager`` bit for bit. Some models create layers in their first step.
    Tracing has already run their code once, so that the second plain step is a valid reference too.

    If graph breaks are in other places than Dynamo's, or if ``aot_eager`` fails, sums can have a third order. Then the
    step is compared in float64: a different order changes only the last digits, a fault stays as large as it is in
    float32. If the model creates float32 tensors, float64 fails; then the error may be at most twice that of a plain
    step whose weights are changed by one rounding step.

    A compiled step passes if its error against the plain eager step is at most twice the error of ``torch.compile``.
    """
    if same(found, expected):
        return {"as loaded": "eager"}
    expected = second_step(model, loss, batch)
    if same(found, expected):
        return {"as loaded": "eager, second step"}
    row: dict[str, Any] = {"gradient error": distance(found, expected)}
    reference = compiled_step(model, loss, batch, "aot_eager" if backend == "eager" else backend)
    if reference is None:
        row["torch.compile"] = "fails"
    if backend != "eager":
        own, others = (distance(reference, expected), others_distance(reference, expected)) if reference else (0.0, 0.0)
        near = row["gradient error"] <= max(2 * own, 1e-5)
        near = near and others_distance(found, expected) <= max(2 * others, 1e-5)
        return row | {"gradient error of torch.compile": own, "as loaded": backend if near else ""}
    if reference is not None and same(found, without_zeros(reference, expected)):
        return row | {"as loaded": "aot_eager"}
    row["gradient error in float64"] = error_in_float64(model, batch, loss)
    if row["gradient error in float64"] <= FLOAT64_ERROR:
        return row | {"as loaded": "float64"}
    row["gradient error of rounded weights"] = error_of_rounded_weights(model, batch, loss, expected)
    near = row["gradient error"] <= 2 * row["gradient error of rounded weights"]
    return row | {"as loaded": "near eager" if near else ""}


def compiled_step(model: nn.Module, loss: Loss, batch: Any, backend: str) -> Any:
    """What :func:`run` returns for a step by ``torch.compile``; None where that fails."""
    torch._dynamo.reset()
    try:
        with torch._dynamo.config.patch(allow_rnn=True):
            return run(copy.deepcopy(model), torch.compile(loss, backend=backend), batch)
    except Exception:  # of any kind: it is not under test
        return None


def error_in_float64(model: nn.Module, batch: Any, loss: Loss) -> float:
    """Largest relative error of gradient, loss and buffers in float64, with no format changed; infinite on failure."""
    model, batch = copy.deepcopy(model).double(), pytree.tree_map(in_float64, batch)
    try:
        expected = run(copy.deepcopy(model), loss, batch)
    except RuntimeError:  # a library's own float32 tensors
        return float("inf")
    seed_all()
    plan = plans_of(assign.trace(model, batch, loss))["as loaded"]
    found = run(*planned(model, loss, plan, "eager"), batch)
    return max(distance(found, expected), others_distance(found, expected))


def error_of_rounded_weights(model: nn.Module, batch: Any, loss: Loss, expected: Any) -> float:
    """Relative gradient error of a plain step whose weights are off by one rounding of float32, of either sign."""
    copied, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for parameter in copied.parameters():
        if parameter.dtype == torch.float32:
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.data.mul_(1 + signs * 2.0**-24)
    return distance(run(copied, loss, batch), expected)


def in_float64(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def second_step(model: nn.Module, loss: Loss, batch: Any) -> Any:
    """What :func:`run` returns for a plain step with weights and buffers as they were before the first."""
    copied = copy.deepcopy(model)
    run(copied, loss, batch)
    copied.load_state_dict(model.state_dict())
    copied.zero_grad()
    return run(copied, loss, batch)


def without_zeros(found: Any, expected: Any) -> Any:
    """``found`` with no gradient where plain PyTorch has none and AOTAutograd has zeros."""
    unused = [b is None and a is not None and not a.any() for a, b in zip(found[1], expected[1], strict=True)]
    return found[0], [None if zeros else each for zeros, each in zip(unused, found[1], strict=True)], found[2]


def errors(
    steps: dict[str, tuple[nn.Module, Loss]], state: dict[str, torch.Tensor], batch: Any
) -> dict[str, float | None]:
    """Relative gradient error under autocast and under each plan: the median over ``SEEDS`` perturbed sets of weights.

    None where autocast's own step fails.

    Each error is measured against the same kind of step without rounding, because dropout draws other masks where
    AOTAutograd reorders operators.

    Args:
        steps: model and loss by title: ``plain``, ``autocast`` and those under plans; ``as loaded`` rounds nothing.
        state: of the model.
        batch: as the losses take it.
    """
    references = {title: "plain" if title == "autocast" else "as loaded" for title in steps}
    for unrounded in ("plain", "as loaded"):
        references.pop(unrounded, None)
    found_errors: dict[str, list[float]] = {title: [] for title in references}
    for seed in range(SEEDS):
        found = {}
        for title, (model, loss) in steps.items():
            model.load_state_dict(state)
            model.zero_grad()
            generator = torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.data.mul_(1 + 0.05 * torch.randn(parameter.shape, generator=generator))
            try:
                found[title] = run(model, loss, batch)
            except RuntimeError:
                if title != "autocast":
                    raise
        for title, reference in references.items():
            if title in found:
                found_errors[title].append(distance(found[title], found[reference]))
    return {f"{title} error": statistics.median(those) if those else None for title, those in found_errors.items()}


def peak(model: nn.Module, loss: Loss, batch: Any) -> int:
    """Measured peak memory of a forward and backward pass, in bytes; the step must have run once before."""
    model.zero_grad()
    seed_all()
    return measure_peak(
        lambda: loss(model, batch).backward(), [*model.parameters(), *model.buffers(), *tensors_in(batch)]
    )


def share_inside(table: TensorTable) -> float:
    """Of the elements that depend on a parameter: the share that operators in pieces make, which a plan covers."""
    weights = {each.key for each in table.tensors if each.role is Role.WEIGHT}
    for each in table.tensors:
        if each.role is Role.ACTIVATION and weights.intersection(each.inputs):
            weights.add(each.key)
    inside = sum(each.elements for each in table.tensors if each.role is Role.ACTIVATION and each.key in weights)
    outside = sum(int(each.rsplit(", ", 1)[1].split()[0].replace(",", "")) for each in table.outside)
    return inside / (inside + outside) if inside + outside else 1.0


def planned(model: nn.Module, loss: Loss, plan: Assignment, backend: str) -> tuple[nn.Module, Loss]:
    """Copy the model, and return the copy and its step under the plan."""
    copied = copy.deepcopy(model)
    step = assign.planned_step(copied, loss, plan, backend=backend)
    return copied, lambda _, batch: step(batch)


def autocast(loss: Loss) -> Loss:
    def under(model: nn.Module, batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(model, batch)

    return under


def run(model: nn.Module, step: Any, batch: Any) -> Any:
    """Loss, gradients and buffers of one step."""
    seed_all()
    found = step(model, batch)
    found.backward()
    return found.detach(), [p.grad for p in model.parameters()], [b.clone() for b in model.buffers()]


def seed_all() -> None:
    """The same random numbers for every step, so that layers that are left out at random are the same ones."""
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


def same(found: Any, expected: Any) -> bool:
    pairs = zip([found[0], *found[1], *found[2]], [expected[0], *expected[1], *expected[2]], strict=True)
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def distance(found: Any, expected: Any) -> float:
    """Relative error of the gradient of all parameters; infinite where one has a gradient and should not."""
    if any((a is None) != (b is None) for a, b in zip(found[1], expected[1], strict=True)):
        return float("inf")
    return _relative((a, b) for a, b in zip(found[1], expected[1], strict=True) if b is not None)


def others_distance(found: Any, expected: Any) -> float:
    """Relative error of the loss and the buffers."""
    return _relative(zip([found[0], *found[2]], [expected[0], *expected[2]], strict=True))


def _relative(values: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    pairs = [(a.double(), b.double()) for a, b in values]
    error = sum(float((a - b).square().sum()) for a, b in pairs)
    size = sum(float(b.square().sum()) for _, b in pairs)
    return (error / size) ** 0.5 if size else 0.0


def said(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()][:4]
    return f"{type(error).__name__} ({Path(where.filename).name}:{where.lineno}): {' | '.join(lines)}"[:600]


if __name__ == "__main__":
    main()
