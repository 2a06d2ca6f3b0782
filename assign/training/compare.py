"""Train several plans on one task with several seeds, and resume a stopped comparison from its file.

Every run starts from a new task, so no run depends on those before it, and a resumed comparison has the same numbers as
an uninterrupted one. A run that diverges is a result like any other.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from assign.errors import AssignError, ComparisonError, suggest
from assign.executor.backends import Backend
from assign.memory.estimate import estimate
from assign.numerics.promotion import PromotionOptions
from assign.options import accept_former
from assign.plan.plan import Assignment
from assign.plan.recipes import get_recipe
from assign.plan.step_options import StepOptions
from assign.plan.table import TensorTable
from assign.tasks import Task, check_device
from assign.tasks.batch import move
from assign.tracing.tracer import trace
from assign.training.comparison import Comparison, Run, VariantRow
from assign.training.history import TrainResult
from assign.training.loop import Progress, train
from assign.training.options import TrainOptions

FP32 = "fp32"
"""Name of the variant without a plan."""

OnStep = Callable[["Variant", int, Progress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to train.

    Attributes:
        name: of the variant.
        plan: None is plain PyTorch in float32.
        promotion: when tensors are promoted. Default: as in the options of the comparison.
    """

    name: str
    plan: Assignment | None
    promotion: PromotionOptions | None = None

    @property
    def micro_batches(self) -> int:
        """Number of parts in which a step runs a batch."""
        return self.plan.step.micro_batches if self.plan else 1

    def options(self, shared: TrainOptions) -> TrainOptions:
        """Return the options of the comparison with the promotion of this variant; nothing is promoted in float32."""
        if self.plan is None:
            return replace(shared, promotion=PromotionOptions())
        return shared if self.promotion is None else replace(shared, promotion=self.promotion)

    def row(self, shared: TrainOptions) -> VariantRow:
        """Return the row for this variant in the file of a comparison."""
        plan, promotion = self.plan, self.options(shared).promotion
        usual = get_recipe(plan.recipe).promote_every if plan else 0
        return VariantRow(
            name=self.name,
            plan=_hash(plan) if plan else None,
            recipe=plan.recipe if plan else "",
            strategy=plan.provenance.strategy if plan else "",
            promote_every=usual if promotion.every is None else promotion.every,
            promote_threshold=promotion.threshold,
        )


@accept_former(options=TrainOptions)
def compare(
    make_task: Callable[[int], Task],
    variants: Sequence[Variant],
    *,
    seeds: Sequence[int],
    file: Path | None = None,
    options: TrainOptions | None = None,
    on_step: OnStep | None = None,
    on_run: Callable[[Run], None] | None = None,
) -> Comparison:
    """Train every variant with every seed, all variants of a seed before the next seed.

    Args:
        make_task: seed → task; called again for every run.
        variants: ways to train; their names must differ.
        seeds: each trains every variant once.
        file: written after every run. If it exists, its runs are not trained again; variants and seeds may be added.
            The checkpoint of an unfinished run is stored in the same folder, and the run resumes from it.
        options: backend, device, epochs and promotion of all runs.
        on_step: called with ``(variant, seed, progress)`` after every step.
        on_run: called with every run that was trained.
    Returns:
        The comparison, with one run for each variant and seed.
    Raises:
        ComparisonError: there is nothing to compare, an option is one that each run sets itself, or ``file`` belongs to
            another comparison. Raised before training.
        PlanError: a plan does not fit the task's model. Raised before training.
        TaskError, TraceError: as for :func:`assign.training.loop.train`.
    """
    options = options or TrainOptions()
    _check(variants, seeds, options)
    task = make_task(seeds[0])
    tables = _traced(task, variants, options.device)
    for variant in variants:
        _check_fits(variant, tables[variant.micro_batches], task.name)
    table = next(iter(tables.values()))
    comparison = _empty(task, table, variants, seeds, options)
    goes_on = file is not None and file.exists()
    if file:
        comparison = _continued(comparison, Comparison.load(file), file) if goes_on else comparison
        comparison.save(file)
    for seed, variant in itertools.product(seeds, variants):
        checkpoint = _checkpoint(file, variant, seed) if file else None
        if not any(run.seed == seed for run in comparison.of(variant.name)):
            resume = bool(goes_on and checkpoint and checkpoint.exists())
            with _context(variant, seed, checkpoint):
                result = train(
                    make_task(seed),
                    variant.plan,
                    table=tables[variant.micro_batches],
                    options=replace(variant.options(options), seed=seed, checkpoint=checkpoint, resume=resume),
                    on_step=partial(on_step, variant, seed) if on_step else None,
                )
            run = _run(variant, seed, result, tables[variant.micro_batches], check_device(options.device))
            comparison = _with(comparison, run)
            if file:
                comparison.save(file)
            if on_run:
                on_run(run)
        if checkpoint:
            checkpoint.unlink(missing_ok=True)
    return comparison


def _traced(task: Task, variants: Iterable[Variant], device: str) -> dict[int, TensorTable]:
    """Return the task's step by number of micro-batches, for all variants."""
    where = check_device(device)
    model, batch = task.make_model().to(where), move(task.first_batch(), where)
    numbers = dict.fromkeys(variant.micro_batches for variant in variants)
    return {n: trace(model, batch, task.loss, task.optimizer, micro_batches=n).table for n in numbers}


def _empty(
    task: Task, table: TensorTable, variants: Sequence[Variant], seeds: Sequence[int], options: TrainOptions
) -> Comparison:
    """Return the comparison before anything is trained."""
    return Comparison(
        task=task.name,
        fingerprint=table.fingerprint,
        elements=table.elements,
        epochs=options.epochs or task.epochs,
        backend=str(options.backend),
        device=options.device,
        versions={"torch": torch.__version__, "python": platform.python_version()},
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seeds=tuple(seeds),
        variants=tuple(variant.row(options) for variant in variants),
        runs=(),
    )


def load_variants(plans: Sequence[Path], *, fp32: bool = True) -> tuple[Variant, ...]:
    """Return the variants for the files of plans, plain fp32 first.

    The name of a variant is the stem of its file, or the path if two stems are equal or a stem is ``fp32``.

    Raises:
        ComparisonError: there is no plan, or one is given twice.
        PlanError: a file cannot be read.
    """
    if not plans:
        raise ComparisonError("compare: there is no plan to compare. Give at least one: --plan a.json --plan b.json.")
    twice = [str(path) for path, count in Counter(path.resolve() for path in plans).items() if count > 1]
    if twice:
        raise ComparisonError(f"compare: the plan {twice[0]} is given twice. Give each plan once.")
    stems = Counter([FP32, *(path.stem for path in plans)])
    variants = [Variant(name=FP32, plan=None)] if fp32 else []
    for path in plans:
        name = path.stem if stems[path.stem] == 1 else str(path)
        variants.append(Variant(name=name, plan=Assignment.load(path)))
    return tuple(variants)


def seed_range(count: int) -> range:
    """Return the seeds 0 to ``count`` − 1.

    Raises:
        ComparisonError: ``count`` is below 1.
    """
    if count < 1:
        raise ComparisonError(f"compare: {count} seeds were requested. Give a number of at least 1: --seeds 3.")
    return range(count)


_SHARED = ("backend", "device", "epochs", "promotion")
"""Training options that all runs of a comparison share."""


def _check(variants: Sequence[Variant], seeds: Sequence[int], options: TrainOptions) -> None:
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
    if options != TrainOptions(**{name: getattr(options, name) for name in _SHARED}):
        raise ComparisonError(
            "compare: options were given that compare sets for each run.\n"
            f"  Allowed: {', '.join(_SHARED)}.\n  Leave out the others; give the seeds with seeds=."
        )
    backend = options.backend
    if backend not in list(Backend):
        near = suggest(backend, Backend)
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
    """Return ``wanted`` with the runs of ``stored``, after checking that both are the same comparison."""
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
    requested = {row.name: row for row in wanted.variants}
    for row in stored.variants:
        new = requested.get(row.name)
        if new is None:
            differ.append(f"it has the variant {row.name!r}, which was not requested")
        elif new.plan != row.plan:
            differ.append(f"its variant {row.name!r} has {_described(row)}, not {_described(new)}")
        for rule in ("promote_every", "promote_threshold"):
            if new is not None and getattr(new, rule) != getattr(row, rule):
                differ.append(f"its variant {row.name!r} has {rule} {getattr(row, rule)}, not {getattr(new, rule)}")
    gone = [seed for seed in stored.seeds if seed not in wanted.seeds]
    if gone:
        differ.append(f"it has the seeds {', '.join(map(str, gone))}, which were not requested")
    if differ:
        raise ComparisonError(
            "\n  ".join(
                [
                    f"{file} is the file of another comparison:",
                    *differ,
                    "Request the same comparison (more variants or seeds are allowed), or give another file.",
                ]
            )
        )
    return _with(dataclasses.replace(wanted, created=stored.created), *stored.runs)


def _with(comparison: Comparison, *runs: Run) -> Comparison:
    order = {row.name: number for number, row in enumerate(comparison.variants)}
    ordered = sorted([*comparison.runs, *runs], key=lambda run: (order[run.variant], run.seed))
    return dataclasses.replace(comparison, runs=tuple(ordered))


def _described(row: VariantRow) -> str:
    return f"the plan {row.plan}" if row.plan else "no plan"


def _checkpoint(file: Path, variant: Variant, seed: int) -> Path:
    name = urllib.parse.quote(variant.name, safe="")  # a name may be a path; different names stay different
    return file.with_name(f"{file.name}.{name}-{seed}.ckpt")


@contextlib.contextmanager
def _context(variant: Variant, seed: int, checkpoint: Path | None) -> Iterator[None]:
    """Add to an error which run it stopped."""
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
    step = [plan.step] if plan.step != StepOptions() else []
    return hashlib.sha256(repr([plan.recipe, entries, *step]).encode()).hexdigest()[:16]
