"""Samples of PyTorch's databases under plans: prints a line of JSON for each.

python benchmarks/opdb/try_samples.py op_db nn.functional.avg_pool3d softmax
python benchmarks/opdb/try_samples.py module_db            # all of them
python benchmarks/opdb/try_samples.py op_db --part 3/12    # the third of twelve parts
"""

import argparse
import contextlib
import copy
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import assign
from assign.errors import AssignError
from assign.formats.rows import loaded_format
from assign.plan.compute_dtype import operators
from assign.plan.plan import Assignment, Entry
from assign.plan.recipes import get_recipe, initial
from benchmarks.opdb.samples import DATABASES, Sample, loss, names, samples, seed, size
from benchmarks.zoo.try_model import said

FLOOR = 0.01
"""Relative error below which a bf16 plan is as good as any: two and a half steps of bf16."""

MOVES = {
    "assign.quantize.default", "aten._to_copy.default", "aten.clone.default", "aten.copy_.default",
    "aten._unsafe_view.default", "aten.view.default",
}  # fmt: skip
"""Operators of torch that compute nothing."""

Result = tuple[Tensor, list[Tensor | None]]


def main() -> None:
    options = parse(sys.argv[1:])
    torch.set_num_threads(1)
    torch._logging.set_logs(all=50)
    warnings.simplefilter("ignore")
    part, parts = map(int, options.part.split("/"))
    chosen = [name for database, name in names() if database == options.database]
    for name in options.names or chosen[part - 1 :: parts]:
        for number, sample in enumerate(samples(options.database, name)):
            row = {"database": options.database, "name": name, "sample": number, **examine(sample)}
            print("RESULT " + json.dumps(row), flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("database", choices=DATABASES)
    parser.add_argument("names", nargs="*", help="of operators or modules; default: all")
    parser.add_argument("--part", default="1/1", help="of the names, each so many-th")
    return parser.parse_args(arguments)


def examine(sample: Sample) -> dict[str, Any]:
    """What came out of one step under an all-fp32 plan, and under an all-bf16 one."""
    torch._dynamo.reset()
    try:
        expected = run(sample, loss)
        scale = size(copy.deepcopy(sample), sample.batch)
    except Exception as error:
        return {"skipped": f"the plain step fails: {said(error)}"}
    row: dict[str, Any] = {}
    try:
        table = assign.trace(copy.deepcopy(sample), sample.batch, loss)
        row["breaks"] = len(table.breaks)
    except Exception as error:
        return {"fp32": kind_of(error), "bf16": kind_of(error)}
    try:
        row["fp32"] = as_loaded(sample, table, expected)
    except Exception as error:
        row["fp32"] = kind_of(error)
    try:
        row |= in_bf16(sample, table, expected, scale)
    except Exception as error:
        row["bf16"] = kind_of(error)
    return row


def kind_of(error: Exception) -> str:
    return ("refused: " if isinstance(error, AssignError) else "raw: ") + said(error)


def as_loaded(sample: Sample, table: Any, expected: Result) -> str:
    """What a step equals under a plan that keeps every tensor as it is."""
    entries = {each.key: Entry(loaded_format(each.dtype).name, False) for each in table.paper_tensors}
    found = planned(sample, Assignment(entries=entries, recipe="native", fingerprint=table.fingerprint))[0]
    if same(found, expected):
        return "eager"
    torch._dynamo.reset()
    reference = run(sample, torch.compile(loss, backend="aot_eager"))
    return "aot_eager" if same(found, reference) else f"differs: {distance(found, expected, 1.0):.2g}"


def in_bf16(sample: Sample, table: Any, expected: Result, scale: float) -> dict[str, Any]:
    """Errors of a step in bf16, and what ran so."""
    plan = Assignment(entries=initial(table, get_recipe("bf16")), recipe="bf16", fingerprint=table.fingerprint)
    torch._dynamo.reset()
    found, ran = planned(sample, plan)
    made = {each.op: each.dtype for each in operators(table, plan.entries) if each.key[:5] != "loss/"}
    row: dict[str, Any] = {"operators": made, "ran": sorted(ran)}
    error = row["error"] = distance(found, expected, scale)
    limit = FLOOR
    for other in (rounded, autocast, low) if error > FLOOR else ():
        with contextlib.suppress(Exception):  # some operators take no bf16
            row[other.__name__] = distance(other(sample), expected, scale)
            limit = max(limit, 2 * row[other.__name__])
    near = "ok" if error <= limit else "differs"
    row["bf16"] = near if error < float("inf") else "not finite"
    return row


def planned(sample: Sample, plan: Assignment) -> tuple[Result, set[str]]:
    """One step under a plan; and torch's operators that make 16-bit values in a second one."""
    model = copy.deepcopy(sample)
    step = assign.planned_step(model, loss, plan, backend="eager")
    found = run(model, lambda _, batch: step(batch), copied=False)
    with _Watch() as watch:
        seed()
        step([each.clone() for each in sample.batch])
    return found, watch.found


class _Watch(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(each, Tensor) and each.dtype == torch.bfloat16 and not func.is_view:
                self.found |= {str(func)} - MOVES
        return made


def rounded(sample: Sample) -> Result:
    """The plain step on parameters and inputs rounded to bf16."""
    model = copy.deepcopy(sample)
    low, again = {torch.float32: torch.bfloat16}, {torch.bfloat16: torch.float32}
    _convert(model, low)
    _convert(model, again)
    return run(model, loss, copied=False)


def low(sample: Sample) -> Result:
    """The plain step of a model and a batch in bf16."""
    model = copy.deepcopy(sample)
    _convert(model, {torch.float32: torch.bfloat16})
    return run(model, loss, copied=False)


def _convert(model: Sample, dtypes: dict[torch.dtype, torch.dtype]) -> None:
    for each in model.parameters():
        each.data = each.data.to(dtypes.get(each.dtype, each.dtype))
    model.batch = [each.to(dtypes.get(each.dtype, each.dtype)) for each in model.batch]


def autocast(sample: Sample) -> Result:
    def step(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(model, batch)

    return run(sample, step)


def run(sample: Sample, step: Callable[..., Tensor], *, copied: bool = True) -> Result:
    """Loss and gradients of one step."""
    model = copy.deepcopy(sample) if copied else sample
    seed()
    found = step(model, [each.clone() for each in model.batch])
    found.backward()
    return found.detach(), [p.grad for p in model.parameters()]


def same(found: Result, expected: Result) -> bool:
    pairs = zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True)
    return all(a is b or (a is not None and b is not None and _equal(a, b)) for a, b in pairs)


def _equal(a: Tensor, b: Tensor) -> bool:
    a, b = (each.to_dense() if each.layout != torch.strided else each for each in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def distance(found: Result, expected: Result, scale: float) -> float:
    """Relative error of the gradient, or of the loss if that is larger, where plain PyTorch's is finite.

    Infinite where a value is not finite that should be, and where a gradient is missing.
    """
    pairs = list(zip(found[1], expected[1], strict=True))
    if any((a is None) != (b is None) for a, b in pairs):
        return float("inf")
    lost = total = 0.0
    for a, b in pairs:
        if a is not None and b is not None:
            a, b = a.to_dense().double(), b.to_dense().double()
            kept = b.isfinite()
            if not a[kept].isfinite().all():
                return float("inf")
            lost += float((a - b)[kept].square().sum())
            total += float(b[kept].square().sum())
    error = (lost / (total or 1.0)) ** 0.5
    if not expected[0].isfinite():
        return error
    if not found[0].isfinite():
        return float("inf")
    return max(error, abs(float(found[0] - expected[0])) / (scale or 1.0))


if __name__ == "__main__":
    main()
