"""Train several plans on one task with several seeds, and resume a stopped comparison from its file.

Every run starts from a task made anew: none depends on which ran before it, so a comparison stopped and started again
ends with the numbers of one that was not. A run that diverges is a result like any other.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import itertools
import json
import platform
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from assign.errors import AssignError, ComparisonError, nearest
from assign.executor.backends import Backend
from assign.numerics.promotion import THRESHOLD
from assign.plan.assignment import Assignment
from assign.plan.memory import estimate
from assign.plan.recipes import get_recipe
from assign.plan.tensors import TensorTable
from assign.tasks import Task, check_device
from assign.tasks.batch import move
from assign.tracing.tracer import trace
from assign.training.comparison import Comparison, Run, VariantRow
from assign.training.history import TrainResult
from assign.training.loop import Progress, train

FP32 = "fp32"
"""Name of the variant without a plan."""

OnStep = Callable[["Variant", int, Progress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to train.

    Attributes:
        plan: None is plain PyTorch in float32.
        promote_every: steps between two looks at what overflows; None is the recipe's own, 0 never. Without a plan
            there is nothing to promote.
        promote_threshold: share of overflowing elements at which a tensor is promoted.
    """

    name: str
    plan: Assignment | None
    promote_every: int | None = None
    promote_threshold: float = THRESHOLD

    @property
    def row(self) -> "VariantRow":
        """What a comparison's file says of it."""
        plan = self.plan
        usual = get_recipe(plan.recipe).promote_every if plan else 0
        return VariantRow(
            name=self.name,
            plan=_hash(plan) if plan else None,
            recipe=plan.recipe if plan else "",
            strategy=plan.provenance.strategy if plan else "",
            promote_every=usual if self.promote_every is None else self.promote_every,
            promote_threshold=self.promote_threshold,
        )


def compare(
    make_task: Callable[[int], Task],
    variants: Sequence[Variant],
    *,
    seeds: Sequence[int],
    file: Path | None = None,
    backend: str = "eager",
    device: str = "cpu",
    epochs: int | None = None,
    on_step: OnStep | None = None,
    on_run: Callable[[Run], None] | None = None,
) -> Comparison:
    """Train every variant with every seed, all variants of a seed before the next seed.

    Args:
        make_task: seed → the task; called anew for every run.
        file: written after every run. If it is there, its runs are not trained again; more variants and more seeds than
            it has may be asked for. A run that is under way has its checkpoint beside it and goes on from there.
        backend: as in ``assign.apply``.
        epochs: in place of the task's own number.
        on_step: told ``(variant, seed, progress)`` after every step; ``on_run``: every run that was trained.
    Returns:
        The comparison, with one run for each variant and seed.
    Raises:
        ComparisonError: nothing to compare, or ``file`` is of another comparison; before anything is trained.
        PlanError: a plan does not fit the task's model; before anything is trained.
        TaskError, TraceError: as :func:`assign.training.loop.train`.
    """
    _check(variants, seeds, backend)
    where = check_device(device)
    task = make_task(seeds[0])
    table = trace(task.make_model().to(where), move(task.first_batch(), where), task.loss, task.optimizer)
    for variant in variants:
        _check_fits(variant, table, task.name)
    comparison = Comparison(
        task=task.name,
        fingerprint=table.fingerprint,
        elements=table.elements,
        epochs=epochs or task.epochs,
        backend=backend,
        device=device,
        versions={"torch": torch.__version__, "python": platform.python_version()},
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seeds=tuple(seeds),
        variants=tuple(variant.row for variant in variants),
        runs=(),
    )
    goes_on = file is not None and file.exists()
    if file:
        comparison = _continued(comparison, Comparison.load(file), file) if goes_on else comparison
        comparison.save(file)
    for seed, variant in itertools.product(seeds, variants):
        checkpoint = _checkpoint(file, variant, seed) if file else None
        if not any(run.seed == seed for run in comparison.of(variant.name)):
            with _context(variant, seed, checkpoint):
                result = train(
                    make_task(seed),
                    variant.plan,
                    table=table,
                    backend=backend,
                    seed=seed,
                    epochs=epochs,
                    device=device,
                    checkpoint=checkpoint,
                    resume=bool(goes_on and checkpoint and checkpoint.exists()),
                    promote_every=variant.promote_every if variant.plan else None,
                    promote_threshold=variant.promote_threshold,
                    on_step=partial(on_step, variant, seed) if on_step else None,
                )
            run = _run(variant, seed, result, table, where)
            comparison = _with(comparison, run)
            if file:
                comparison.save(file)
            if on_run:
                on_run(run)
        if checkpoint:
            checkpoint.unlink(missing_ok=True)
    return comparison


def load_variants(
    plans: Sequence[Path],
    *,
    promote_every: int | None = None,
    promote_threshold: float = THRESHOLD,
    fp32: bool = True,
) -> tuple[Variant, ...]:
    """Variants of plans' files, plain fp32 first.

    A plan is called by the stem of its file; plans whose stems are equal, or ``fp32``, by their paths.

    Raises:
        ComparisonError: no plan, or one twice.
        PlanError: a file cannot be read.
    """
    if not plans:
        raise ComparisonError("compare: there is no plan to compare. Give at least one: --plan a.json --plan b.json.")
    twice = [str(path) for path, count in Counter(path.resolve() for path in plans).items() if count > 1]
    if twice:
        raise ComparisonError(f"compare: the plan {twice[0]} is given twice. Give each plan once.")
    stems = Counter([FP32, *(path.stem for path in plans)])
    variants = [Variant(name=FP32, plan=None, promote_every=0)] if fp32 else []
    for path in plans:
        variants.append(
            Variant(
                name=path.stem if stems[path.stem] == 1 else str(path),
                plan=Assignment.load(path),
                promote_every=promote_every,
                promote_threshold=promote_threshold,
            )
        )
    return tuple(variants)


def seed_range(count: int) -> range:
    """The seeds 0 to ``count`` − 1.

    Raises:
        ComparisonError: that is none.
    """
    if count < 1:
        raise ComparisonError(f"compare: {count} seeds were asked for. Give a number of at least 1: --seeds 3.")
    return range(count)


def _check(variants: Sequence[Variant], seeds: Sequence[int], backend: str) -> None:
    names = [variant.name for variant in variants]
    if not variants:
        raise ComparisonError("compare: there is no variant to train. Give at least one.")
    for what, given in (("variant", names), ("seed", seeds)):
        twice = [value for value, count in Counter(given).items() if count > 1]
        if twice:
            raise ComparisonError(f"compare: the {what} {twice[0]!r} is given twice. Give each {what} once.")
    if not seeds:
        raise ComparisonError("compare: there is no seed to train with. Ask for at least one.")
    for name in names:
        if not name:
            raise ComparisonError("compare: a variant has no name. Give each a name of its own.")
    for variant in variants:
        if variant.promote_every is not None and variant.promote_every < 0:
            raise ComparisonError(
                f"compare: variant {variant.name!r} promotes every {variant.promote_every} steps. "
                "Give a number of steps of at least 1, or 0 for never."
            )
    if backend not in list(Backend):
        near = nearest(backend, Backend)
        raise ComparisonError(
            f"compare: backend {backend!r} is not known{f', did you mean {near}' if near else ''}. "
            f"Choose one of: {', '.join(Backend)}."
        )


def _check_fits(variant: Variant, table: TensorTable, task: str) -> None:
    if variant.plan is None:
        return
    try:
        get_recipe(variant.plan.recipe)
        variant.plan.check_fits(table, where=f"the plan {variant.name!r}")
    except AssignError as error:
        error.add_note(f"compare: nothing was trained; the model is that of the task {task!r}.")
        raise


def _continued(wanted: Comparison, stored: Comparison, file: Path) -> Comparison:
    """``wanted`` with the runs of ``stored``, if they are runs of the same comparison."""
    facts = {
        "task": "task",
        "model's fingerprint": "fingerprint",
        "number of elements in a step (it depends on the batch size)": "elements",
        "number of epochs": "epochs",
        "backend": "backend",
        "device": "device",
        "versions": "versions",
    }
    differ = [
        f"its {what} is {getattr(stored, name)!r}, not {getattr(wanted, name)!r}"
        for what, name in facts.items()
        if getattr(stored, name) != getattr(wanted, name)
    ]
    asked = {row.name: row for row in wanted.variants}
    for row in stored.variants:
        new = asked.get(row.name)
        if new is None:
            differ.append(f"it has the variant {row.name!r}, which was not asked for")
        elif new.plan != row.plan:
            differ.append(f"its variant {row.name!r} has {_told(row)}, not {_told(new)}")
        for rule in ("promote_every", "promote_threshold"):
            if new is not None and getattr(new, rule) != getattr(row, rule):
                differ.append(f"its variant {row.name!r} has {rule} {getattr(row, rule)}, not {getattr(new, rule)}")
    gone = [seed for seed in stored.seeds if seed not in wanted.seeds]
    if gone:
        differ.append(f"it has the seeds {', '.join(map(str, gone))}, which were not asked for")
    if differ:
        raise ComparisonError(
            "\n  ".join(
                [
                    f"{file} is the file of another comparison:",
                    *differ,
                    "Ask for what it was made with (more variants or seeds are fine), or give another file.",
                ]
            )
        )
    return _with(dataclasses.replace(wanted, created=stored.created), *stored.runs)


def _with(comparison: Comparison, *runs: Run) -> Comparison:
    order = {row.name: number for number, row in enumerate(comparison.variants)}
    ordered = sorted([*comparison.runs, *runs], key=lambda run: (order[run.variant], run.seed))
    return dataclasses.replace(comparison, runs=tuple(ordered))


def _told(row: VariantRow) -> str:
    return f"the plan {row.plan}" if row.plan else "no plan"


def _checkpoint(file: Path, variant: Variant, seed: int) -> Path:
    name = urllib.parse.quote(variant.name, safe="")  # a name may be a path; no two names become one
    return file.with_name(f"{file.name}.{name}-{seed}.ckpt")


@contextlib.contextmanager
def _context(variant: Variant, seed: int, checkpoint: Path | None) -> Iterator[None]:
    """Say of an error which run it stopped."""
    try:
        yield
    except AssignError as error:
        error.add_note(f"compare: while training {variant.name!r} with seed {seed}; runs finished before are kept.")
        if checkpoint and checkpoint.exists():
            error.add_note(f"To start this run from its beginning, delete {checkpoint}.")
        raise


def _run(variant: Variant, seed: int, result: TrainResult, table: TensorTable, device: torch.device) -> Run:
    start, end = _low_ratios(variant.plan, table), _low_ratios(result.plan, table)
    return Run(
        variant=variant.name,
        seed=seed,
        low_ratio=start[0],
        low_ratio_bits=start[1],
        final_low_ratio=end[0],
        final_low_ratio_bits=end[1],
        result=json.loads(json.dumps(result.to_json(), allow_nan=False)),
        hardware=_hardware(device),
    )


def _low_ratios(plan: Assignment | None, table: TensorTable) -> tuple[float | None, float | None]:
    if plan is None:
        return None, None
    costs = estimate(table, plan)
    return costs.low_ratio, costs.low_ratio_bits


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _hash(plan: Assignment) -> str:
    entries = sorted((key, entry.format, entry.low) for key, entry in plan.entries.items())
    return hashlib.sha256(repr([plan.recipe, entries]).encode()).hexdigest()[:16]
