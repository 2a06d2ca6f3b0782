"""Tables of the results of audits and certificates."""

from collections.abc import Sequence

from rich.console import Group as Rows
from rich.console import RenderableType

from assign.analysis.audit import Finding, RangeReport
from assign.analysis.certificate import Certificate, quantiles
from assign.optim.monitor import LostUpdates
from assign.report.tables import new_table


def constants_table(found: Sequence[Finding]) -> RenderableType:
    """Return a table of constants that their format cannot represent well, with the values to set instead."""
    if not found:
        return "Constants: no eps or beta is lost."
    table = new_table(
        "Constants that are lost", ["where", "constant", "value", "becomes", "problem", "set it to"], right=2
    )
    for each in found:
        becomes = f"{each.becomes:.4g} ({each.format})"
        table.add_row(each.where, each.name, f"{each.value:g}", becomes, each.why, f"{each.advice:g}")
    return table


def range_table(report: RangeReport, limit: int = 20) -> RenderableType:
    """Return a table of a format's effect on tensors, those that lose most first; shares are of nonzero elements."""
    columns = ["tensor", "elements", "largest", "overflow", "too small", "lr · gradient\ntoo small", "updates\nlost"]
    table = new_table(f"Effect of {report.format}", columns)
    rows = sorted(report.rows, key=lambda row: (-row.overflowing, -(row.lost_updates or 0), -(row.small or 0)))
    for row in (report.weights, *rows[:limit]):
        shares = (_percent(share) for share in (row.small, row.small_gradients, row.lost_updates))
        table.add_row(row.name, f"{row.elements:,}", f"{row.largest:.4g}", f"{row.overflowing:,}", *shares)
    left_out = [f"and {len(rows) - limit} more tensors"] if len(rows) > limit else []
    verdict = "Nothing overflows." if report.fits else "Something overflows: it would be infinite."
    return Rows(table, *left_out, verdict)


def lost_table(lost: LostUpdates) -> RenderableType:
    """Return a table of the share of updates lost per parameter, the largest first."""
    table = new_table("Updates lost to rounding", ["parameter", "lost"])
    for name, share in sorted(lost.shares.items(), key=lambda item: -item[1]):
        table.add_row(name, _percent(share))
    return Rows(table, f"all parameters: {_percent(lost.share) or 'no updates seen'}")


def certificate_table(found: Certificate) -> RenderableType:
    """Return tables of the counts and of the distributions of margin and deviation."""
    head = new_table("Tolerance certificate", ["", "samples", "share"])
    counts = {
        "evaluated": found.samples,
        "certified (Γ > 2δ)": found.certified,
        "predicted differently": found.disagreements,
        "  of these, certified": found.violations,
        "not finite": found.non_finite,
    }
    for name, count in counts.items():
        head.add_row(name, f"{count:,}", _percent(count / found.samples))
    spread = new_table("Distribution over the samples", ["quantile", "margin Γ", "deviation δ"])
    margins, deviations = quantiles(found.margins), quantiles(found.deviations)
    for name, margin in margins.items():
        spread.add_row(name, f"{margin:.4g}", f"{deviations[name]:.4g}")
    return Rows(head, spread)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"
