"""Tables about plans for the terminal: provenance, memory, formats, largest tensors, differences."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group as Rows
from rich.console import RenderableType
from rich.table import Table

from assign.memory.profile import Moments, moments, moments_of
from assign.notebook import human_bytes
from assign.plan.persistent_state import UpdateRounding
from assign.plan.plan import Assignment, Diff, Entry
from assign.plan.table import TensorTable
from assign.report.page.colours import ROLES
from assign.report.rows import Row, formats_of, tensor_rows
from assign.report.tables import Bar, new_table

LARGEST = 10
"""Number of tensors shown for a step."""


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """One step in fp32 and under a plan.

    Attributes:
        before: the step with all tensors in fp32.
        after: the step under the plan.
        rows: every tensor of the step, the one with the most bytes under the plan first.
    """

    before: Moments
    after: Moments
    rows: tuple[Row, ...]

    @property
    def by_role(self) -> dict[str, tuple[int, int]]:
        """Role → bytes alive at the peak in fp32, and at the plan's peak; the role with the most bytes first."""
        found = {
            role: (_at_peak(self.before, role), _at_peak(self.after, role))
            for role in dict.fromkeys([*self.before.by_role, *self.after.by_role])
        }
        return {role: sizes for role, sizes in sorted(found.items(), key=lambda each: -max(each[1])) if max(sizes)}

    def to_json(self) -> dict[str, Any]:
        """Return the step as plain data: bytes by role, and of the largest tensors."""
        facts = ("key", "role", "shape", "format", "fp32_bytes", "bytes", "peak_bytes")
        return {
            "peak_bytes": int(self.after.total.max()),
            "baseline_peak_bytes": int(self.before.total.max()),
            "by_role": {role: {"fp32": first, "plan": second} for role, (first, second) in self.by_role.items()},
            "largest": [{fact: getattr(row, fact) for fact in facts} for row in self.rows[:LARGEST]],
        }


def planned_step(table: TensorTable, plan: Assignment) -> PlannedStep:
    """Return one step in fp32 and under a plan.

    Raises:
        PlanError: no library can store what the plan asks for, or the plan is for another model.
    """
    plan.check_fits(table, where="show")
    before, after = moments(table, {}), moments_of(table, plan)
    rows = tensor_rows(table, plan, after)
    return PlannedStep(before=before, after=after, rows=tuple(sorted(rows, key=lambda row: -row.bytes)))


def plan_table(plan: Assignment, step: PlannedStep | None = None, *, everything: bool = False) -> RenderableType:
    """Return tables of a plan: provenance and formats, for a known step also memory by role and the largest tensors.

    Args:
        plan: the plan to show.
        step: the step under the plan, if the task of the plan is known.
        everything: whether to list every entry.
    """
    parts: list[RenderableType] = [_provenance(plan)]
    if step is not None:
        parts += [_roles(step), _formats(step.rows), _largest(step.rows)]
    else:
        parts.append(_counts(plan))
    return Rows(*parts, *([_entries(plan)] if everything else []))


def diff_table(diff: Diff) -> RenderableType:
    """Return tables of what changes from one plan to another: counts of each change, and every tensor."""
    if not diff:
        return "The two plans are the same."
    changes = Counter((_entry(first), _entry(second)) for first, second in diff.changed.values())
    counts = new_table("Changes", ["first", "second", "tensors"], right=2)
    for (first, second), count in changes.most_common():
        counts.add_row(first, second, str(count))
    for title, keys in (("only in the first", diff.only_here), ("only in the second", diff.only_there)):
        if keys:
            counts.add_row(*((title, "") if keys is diff.only_here else ("", title)), str(len(keys)))
    if diff.update_rounding:
        counts.add_row(*(f"updates rounded {each}" for each in diff.update_rounding), "")
    if diff.step:
        counts.add_row(*map(str, diff.step), "")
    table = new_table("Differences", ["tensor", "first", "second"], right=3)
    for key, (one, other) in diff.changed.items():
        table.add_row(key, _entry(one), _entry(other))
    for key in diff.only_here:
        table.add_row(key, "only in this plan", "")
    for key in diff.only_there:
        table.add_row(key, "", "only in this plan")
    return Rows(counts, table)


def _at_peak(found: Moments, role: str) -> int:
    return int(found.by_role[role][found.peak]) if role in found.by_role else 0


def _provenance(plan: Assignment) -> Table:
    head = new_table("Plan", ["", ""], right=2)
    head.show_header = False
    source = plan.provenance
    head.add_row("recipe", plan.recipe)
    head.add_row("model's fingerprint", plan.fingerprint)
    if plan.update_rounding != UpdateRounding.NEAREST:
        head.add_row("rounding of 16-bit updates", plan.update_rounding)
    if plan.sums_inside:
        head.add_row("a step runs", str(plan.step))
    head.add_row("strategy", f"{source.strategy or 'unknown'}, seed {source.seed}")
    head.add_row("made by", source.command or "unknown")
    versions = ", ".join(f"{name} {version}" for name, version in source.versions.items())
    head.add_row("made on", f"{source.created or 'unknown'}; {versions}")
    for name, value in source.estimate.items():
        text = _cost(name, value)
        words = name.removesuffix("_bytes").replace("_", " ")
        if name == "seconds":
            head.add_row("search time", f"{text} s")
        else:
            head.add_row(words if words.startswith("trained") else f"predicted {words}", text)
    return head


def _cost(name: str, value: Any) -> str:
    """Return the text for one cost in a plan's file; a value that is not a number is shown as it is."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return str(value)
    return human_bytes(value) if name.endswith("bytes") else f"{value:.4g}"


def _roles(step: PlannedStep) -> Table:
    first, second = int(step.before.total.max()), int(step.after.total.max())
    title = "Memory at the peak of a step: █ under the plan, ░ saved by the plan"
    table = new_table(title, ["role", "all in fp32", "under the plan", ""])
    most = max((max(sizes) for sizes in step.by_role.values()), default=1)
    for role, (before, after) in step.by_role.items():
        bar = Bar(after / most, before / most)
        table.add_row(ROLES[role][0], human_bytes(before), human_bytes(after), bar)
    table.add_section()
    table.add_row("total", human_bytes(first), human_bytes(second), f"{second / max(first, 1):.1%} of fp32")
    table.columns[-1].justify = "left"
    return table


def _formats(rows: Sequence[Row]) -> Table:
    """Return the table of formats, by share of the elements."""
    total = sum(row.elements for row in rows) or 1
    table = new_table(f"Formats of {len(rows)} tensors", ["format", "tensors", "bytes", "elements", ""])
    for name in formats_of(rows):
        found = [row for row in rows if row.format == name]
        share = sum(row.elements for row in found) / total
        size = human_bytes(sum(row.bytes for row in found))
        table.add_row(name, str(len(found)), size, f"{share:.1%}", Bar(share))
    table.columns[-1].justify = "left"
    return table


def _counts(plan: Assignment) -> Table:
    counts = Counter(entry.format for entry in plan.entries.values())
    table = new_table(f"Formats of {len(plan.entries)} tensors", ["format", "tensors", "share", ""])
    for name, count in counts.most_common():
        share = count / len(plan.entries)
        table.add_row(name, str(count), f"{share:.1%}", Bar(share))
    table.columns[-1].justify = "left"
    return table


def _largest(rows: Sequence[Row]) -> Table:
    shown = rows[:LARGEST]
    most = max((row.fp32_bytes for row in shown), default=1) or 1
    columns = ["tensor", "shape", "format", "in fp32", "planned", ""]
    table = new_table(f"The {len(shown)} largest of {len(rows)} tensors", columns, right=3)
    for column in table.columns[1:-1]:
        column.no_wrap = True  # in a narrow terminal, keys are folded instead
    for row in shown:
        shape = "×".join(map(str, row.shape)) or "scalar"
        sizes = (human_bytes(row.fp32_bytes), human_bytes(row.bytes))
        table.add_row(row.key, shape, row.format, *sizes, Bar(row.bytes / most, row.fp32_bytes / most))
    table.columns[-1].justify = "left"
    return table


def _entries(plan: Assignment) -> Table:
    table = new_table("Entries", ["tensor", "format", "low"], right=3)
    for key, entry in plan.entries.items():
        table.add_row(key, entry.format, "low" if entry.low else "")
    return table


def _entry(entry: Entry) -> str:
    return f"{entry.format}{' (low)' if entry.low else ''}"
