"""Tables and sentences for the terminal; every number has its unit."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.console import Group as Rows
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from assign.executor.compiled_memory import Rehearsal
from assign.formats.rows import FORMATS, BlockFormat, Format
from assign.memory.estimate import Estimate
from assign.notebook import human_bytes
from assign.numerics.promotion import Promoted
from assign.plan.compute_dtype import Operator
from assign.plan.noise_table import NoiseTable
from assign.plan.table import Role, TensorTable
from assign.report.page.colours import ROLES
from assign.training.comparison import Comparison, Spread, Summary
from assign.training.history import TrainResult
from assign.training.tuning import Tuned

_LONGEST = 30
"""Greatest length of a bar in characters."""
_LOWERED = ("tensor", "operator", "rounded to", "runs in", "multiplies in", "reason")


def new_table(title: str, columns: Sequence[str], right: int = 1) -> Table:
    """Return an empty table in the common style; columns from number ``right`` on are right-aligned."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index >= right else "left", overflow="fold")
    return table


class Bar:
    """A bar in a table, of ``█`` and then ``░``, scaled to the width of its column.

    Args:
        dark: length of the ``█`` part, as a share of a full bar.
        light: length of both parts together, as a share of a full bar.
    """

    def __init__(self, dark: float, light: float = 0.0) -> None:
        self._dark, self._light = dark, light

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(_LONGEST, options.max_width)
        dark = round(width * self._dark)
        yield Text("█" * dark + "░" * (round(width * self._light) - dark), no_wrap=True, overflow="crop")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, _LONGEST).with_maximum(options.max_width)


def format_table(formats: Sequence[Format] | None = None) -> Table:
    """Return a table of formats: their values and how they are stored."""
    columns = [
        "format",
        "bits",
        "exponent",
        "mantissa",
        "largest",
        "smallest normal",
        "smallest",
        "rounding",
        "stored as",
        "computes in",
    ]
    table = new_table(
        "Number formats; also fp(e,m,b) and posit(n,es); all but fp32 and posits with ':sr' for stochastic rounding",
        columns,
    )
    for fmt in formats or [*FORMATS.values()]:
        cells = [fmt.bits, fmt.exponent_bits, fmt.mantissa_bits, f"{fmt.max_value:.6g}", f"{fmt.min_normal:.4g}"]
        cells += [f"{fmt.min_subnormal:.4g}", fmt.rounding, f"{fmt.code_bytes} B, {fmt.storage}", fmt.carrier]
        table.add_row(fmt.name, *map(str, cells))
    return table


def block_table(formats: Sequence[BlockFormat]) -> Table:
    """Return a table of block formats."""
    columns = ["format", "bits per element", "block", "code", "shared per block", "rounding"]
    table = new_table("Formats of saved activations only (--saved); also with ':sr' for stochastic rounding", columns)
    for fmt in formats:
        table.add_row(
            fmt.name,
            f"{fmt.bits_per_element:g}",
            str(fmt.block),
            f"{fmt.bits} bits, {fmt.code}",
            fmt.shared,
            fmt.rounding,
        )
    return table


def trace_table(table: TensorTable, limit: int = 20) -> RenderableType:
    """Return tables of the groups and of the largest tensors."""
    groups = new_table(
        f"{len(table.groups)} groups, {table.elements:,} elements in the paper's four roles",
        ["group", "elements", "share", "tensors", "first"],
    )
    for group in sorted(table.groups, key=lambda g: -g.elements)[:limit]:
        share = f"{group.elements / table.elements:.1%}"
        groups.add_row(str(group.id), f"{group.elements:,}", share, str(len(group.keys)), group.keys[0])
    rows = new_table(
        f"Largest of {len(table.tensors)} tensors", ["tensor", "role", "shape", "elements", "group", "source"], right=3
    )
    forward = [info for info in table.tensors if info.role in (Role.ACTIVATION, Role.WEIGHT)]
    for info in sorted(forward, key=lambda i: -i.elements)[:limit]:
        shape = "×".join(map(str, info.shape)) or "scalar"
        rows.add_row(info.key, info.role, shape, f"{info.elements:,}", str(info.group), info.source)
    notes = (
        ("The step was captured in several graphs, because the code needs a value at:", table.breaks),
        (f"{len(table.outside)} operators are not under the plan and run as in plain PyTorch:", table.outside),
    )
    texts = [Text("\n  ".join((title, *places))) for title, places in notes if places]
    return Rows(groups, rows, *texts)


def estimate_table(costs: Estimate, compiled: Rehearsal | None = None, limit: int = 12) -> RenderableType:
    """Return tables of the peak against fp32, its split by role and the largest tensors at it.

    Args:
        costs: of the plan.
        compiled: peak of the compiled step, if it is known.
        limit: number of tensors.
    """
    ratio = costs.peak_bytes / costs.baseline_peak_bytes if costs.baseline_peak_bytes else 1.0
    head = new_table("Predicted for one training step", ["", "bytes"])
    head.add_row("peak, all in fp32", human_bytes(costs.baseline_peak_bytes))
    head.add_row("peak under the plan", f"{human_bytes(costs.peak_bytes)} ({ratio:.1%})")
    head.add_row("  reached in", costs.peak_at)
    if compiled:
        head.add_row("peak, compiled by Inductor", human_bytes(compiled.peak_bytes))
        head.add_row("  reached in", f"the {compiled.peak_in} pass" if compiled.peak_in != "optimizer" else "optimizer")
    head.add_row("saved for the backward pass", human_bytes(costs.saved_bytes))
    head.add_row("aggregate (the paper's measure)", human_bytes(costs.aggregate_bytes))
    head.add_row("low ratio, by elements", f"{costs.low_ratio:.4f} ({costs.groups_low} groups low)")
    head.add_row("low ratio, by bits", f"{costs.low_ratio_bits:.4f}")
    roles = new_table("Alive at the peak, by role", ["role", "bytes", "share", ""])
    for role, size in sorted(costs.by_role.items(), key=lambda item: -item[1]):
        share = size / max(costs.peak_bytes, 1)
        roles.add_row(ROLES[role][0], human_bytes(size), f"{share:.1%}", Bar(share))
    roles.columns[-1].justify = "left"
    alive = new_table("Largest at the peak", ["tensor", "role", "bytes"], right=2)
    for key, role, size in costs.alive[:limit]:
        alive.add_row(key, ROLES[role][0], human_bytes(size))
    return Rows(head, roles, timeline_table(costs), alive)


def timeline_table(costs: Estimate, limit: int = 24) -> Table:
    """Return a table of bytes alive over the step: about ``limit`` intervals, each with its operator of most bytes."""
    table = new_table("Memory over the step", ["pass", "operator", "bytes", ""], right=2)
    stretches = _stretches(costs.timeline, max(1, -(-len(costs.timeline) // limit)))
    most = max((row[2] for row in stretches), default=0)
    for operator, phase, size in stretches:
        peak = "peak: " if size == most else ""
        table.add_row(phase, operator or "sum of gradients", peak + human_bytes(size), Bar(size / max(most, 1)))
    table.columns[-1].justify = "left"
    return table


def _stretches(timeline: Sequence[tuple[str, str, int]], length: int) -> list[tuple[str, str, int]]:
    """Return the largest of each ``length`` consecutive rows of one pass."""
    found = []
    for _, rows in itertools.groupby(timeline, key=lambda row: row[1]):
        phase = list(rows)
        parts = (phase[start : start + length] for start in range(0, len(phase), length))
        found += [max(part, key=lambda row: row[2]) for part in parts]
    return found


def trial_line(number: int, state: str, facts: Mapping[str, Any]) -> str:
    """Return the line for one trial of a study."""
    peak = f", {human_bytes(facts['peak_bytes'])}" if "peak_bytes" in facts else ""
    metric = f": {facts['metric']:.4g}" if "metric" in facts else ""
    why = f" ({facts['diverged']})" if "diverged" in facts else ""
    return f"trial {number} {state.lower()}{metric}{peak}{why}"


def front_table(found: Tuned, names: Mapping[int, str]) -> Table:
    """Return a table of the plans on a Pareto front, the smallest peak first."""
    table = new_table(
        f"Pareto front of {len(found.front)} plans; {found.trained} trained, {found.pruned} stopped early",
        ["plan", found.metric, "peak", "low ratio"],
        right=1,
    )
    for each in found.front:
        low = f"{each.costs['low_ratio']:.3f}"
        table.add_row(names[each.trial], f"{each.metric:.4g}", human_bytes(each.peak_bytes), low)
    return table


def searched_front_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of the plans on a front, the lowest peak first. Each row is an estimate and the path of a plan."""
    noisy = all("noise" in row for row in rows)
    table = new_table(
        f"{len(rows)} plans", ["plan", "peak", "× fp32", "low ratio", *(["noise"] if noisy else [])], right=1
    )
    for row in rows:
        share = row["peak_bytes"] / row["baseline_peak_bytes"]
        noise = [f"{row['noise']:.3g}"] if noisy else []
        table.add_row(row["plan"], human_bytes(row["peak_bytes"]), f"{share:.3f}", f"{row['low_ratio']:.3f}", *noise)
    return table


def lowered_table(operators: Sequence[Operator]) -> RenderableType:
    """Return a table of the dtype in which each operator runs and why, and the number of matrix products per dtype."""
    table = new_table("Operators of the forward pass; each has the same dtype in the backward pass", _LOWERED, right=6)
    for each in operators:
        multiplies = each.multiplies if each.product else ""
        table.add_row(each.key, each.op, each.format, each.dtype, multiplies, each.why)
    products = Counter(each.multiplies for each in operators if each.product)
    counts = ", ".join(f"{count} in {dtype}" for dtype, count in products.most_common())
    return Rows(table, f"matrix products: {counts or 'none'}")


def promotion_line(past: Promoted) -> str:
    """Return a sentence about one promotion."""
    return (
        f"step {past.step}: {past.key} promoted from {past.from_format} to {past.to_format}, "
        f"{past.overflow_ratio:.2%} of it overflowed"
    )


def result_table(results: Mapping[str, TrainResult]) -> RenderableType:
    """Return a table of trainings side by side; for two of them, with the ratio of the second to the first."""
    names = list(results)
    table = new_table("Training", ["", *names, *(["ratio"] if len(names) == 2 else [])])
    metrics = dict.fromkeys(name for result in results.values() for name in result.metrics)
    for metric in metrics:
        table.add_row(metric, *(_number(result.metrics.get(metric)) for result in results.values()), *_blank(names))
    for metric in dict.fromkeys(name for result in results.values() for name in result.fp32_metrics):
        same = (_number(result.fp32_metrics.get(metric)) for result in results.values())
        table.add_row(f"{metric}, same weights in fp32", *same, *_blank(names))
    rows: list[tuple[str, list[Any], Callable[[Any], str]]] = [
        ("last training loss", [result.loss for result in results.values()], _number),
        ("measured peak", [result.measured_peak_bytes for result in results.values()], human_bytes),
        ("predicted peak", [result.predicted_peak_bytes for result in results.values()], human_bytes),
        ("seconds per step", [result.step_seconds for result in results.values()], _number),
    ]
    if any(result.promotions for result in results.values()):
        rows.append(("tensors promoted", [len(result.promotions) for result in results.values()], str))
    for title, values, show in rows:
        ratio = [_ratio(values)] if len(names) == 2 else []
        table.add_row(title, *("" if value is None else show(value) for value in values), *ratio)
    notes = [f"{name}: {result.message}" for name, result in results.items() if result.diverged]
    return Rows(table, *notes)


def comparison_table(comparison: Comparison) -> RenderableType:
    """Return a table of variants over their seeds; runs that diverged are counted, but not averaged."""
    metric = comparison.metric
    judged_by = [metric, f"{metric}\nin fp32"] if metric else ["last\ntraining loss"]
    columns = ["variant", "low ratio\n(elements)", "low ratio\n(bits)", *judged_by]
    columns += ["peak MiB", "s/step", "tensors\npromoted", "diverged"]
    seeds = f"{len(comparison.seeds)} seeds" if len(comparison.seeds) > 1 else "1 seed"
    table = new_table(f"{comparison.task}: {comparison.epochs} epochs, {seeds}, {comparison.device}", columns)
    for summary in comparison.summaries():
        judged = [_metric(summary, summary.loss)]
        if metric:
            judged = [_metric(summary, found.get(metric)) for found in (summary.metrics, summary.fp32_metrics)]
        table.add_row(
            summary.variant,
            _fall(summary.low_ratio, summary.final_low_ratio),
            _fall(summary.low_ratio_bits, summary.final_low_ratio_bits),
            *judged,
            "" if summary.peak_bytes.mean is None else f"{summary.peak_bytes.mean / 2**20:.1f}",
            _number(summary.step_seconds.mean),
            _mean_count(summary.promotions),
            f"{summary.diverged} of {summary.runs}",
        )
    notes = ["Means over seeds ± sample standard deviation (n − 1)."] if len(comparison.seeds) > 1 else []
    if any(summary.diverged for summary in comparison.summaries()):
        notes.append("Metrics do not include runs that diverged.")
    return Rows(table, *notes, *_first_messages(comparison))


def _metric(summary: Summary, spread: Spread | None) -> str:
    if summary.runs and summary.diverged == summary.runs:
        return "diverged"
    if spread is None or spread.mean is None:
        return ""
    return _number(spread.mean) + ("" if spread.deviation is None else f" ± {spread.deviation:.4f}")


def _fall(start: float | None, end: Spread) -> str:
    """Return the text for a low ratio, and for its final value if promotion changed it."""
    if start is None or end.mean is None:
        return ""
    return f"{start:.4f}" if all(value == start for value in end.values) else f"{start:.4f} → {end.mean:.4f}"


def _mean_count(counts: Spread) -> str:
    return "" if counts.mean is None else f"{counts.mean:.0f}" if counts.mean.is_integer() else f"{counts.mean:.1f}"


def _first_messages(comparison: Comparison) -> list[str]:
    """Return the message of the first run of each variant that diverged."""
    found: dict[str, str] = {}
    for run in comparison.runs:
        if run.facts.diverged:
            found.setdefault(run.variant, f"{run.variant}, seed {run.seed}: {run.facts.message}")
    return [*found.values()]


def _blank(names: Sequence[str]) -> list[str]:
    return [""] if len(names) == 2 else []


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _ratio(values: Sequence[float | None]) -> str:
    first, second = values
    return "" if not first or second is None else f"{second / first:.3f}×"


def noise_rows(noise: NoiseTable) -> list[dict[str, Any]]:
    """Return every choice as plain data, the one with the most noise first."""
    rows = [
        {
            "key": key,
            "format": name,
            "noise": noise.noise(key, name),
            "relative_standard_error": _share(noise.standard_error(key, name), noise.noise(key, name)),
            "cosine": noise.cosine(key, name),
            "loss_change": noise.loss(key, name),
        }
        for key, name in noise.cells
    ]
    return sorted(rows, key=lambda row: -float(row["noise"]))


def noise_table(noise: NoiseTable, limit: int = 20) -> RenderableType:
    """Return a table of the choices with the most noise."""
    rows = noise_rows(noise)
    title = f"Noise of {len(rows)} choices, {noise.method}, {noise.batches} batches"
    table = new_table(title, ["tensor", "format", "noise", "± relative", "cosine", "loss change"], right=2)
    for row in rows[:limit]:
        share = row["relative_standard_error"]
        table.add_row(
            row["key"],
            row["format"],
            f"{row['noise']:.3g}",
            "" if share is None else f"{share:.2f}",
            f"{row['cosine']:.6f}",
            f"{row['loss_change']:+.2g}",
        )
    return table


def noise_line(figures: Mapping[str, Any]) -> str:
    """Return a sentence about the noise of a plan that a search found."""
    gap = figures.get("optimality_gap")
    words = "" if gap is None else f"; at these bytes it could be at most {gap:.2%} lower"
    greedy = " (the greedy plan was no worse)" if figures.get("by_greedy") else ""
    time = f"; a step takes {figures['step_seconds']:.4g} s" if "step_seconds" in figures else ""
    return f"predicted noise of the gradient {figures['noise']:.4g}{words}{greedy}{time}"


def _share(error: float, mean: float) -> float | None:
    return error / mean if mean > 0 and math.isfinite(error) else None
