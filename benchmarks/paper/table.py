"""Markdown tables of the paper's experiments, from the JSON files that `sweep.py` wrote.

python benchmarks/paper/table.py benchmarks/results/paper_accuracy_*.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from assign.training.comparison import Comparison, Spread, Summary


def main() -> None:
    for path in map(Path, sys.argv[1:]):
        comparison = Comparison.load(path)
        print(f"\n{comparison.task}, {comparison.epochs} epochs, {len(comparison.seeds)} seeds\n")
        print("| assignment | low ratio, elements / bits | accuracy | same weights in fp32 | promoted | diverged |")
        print("|---|---|---|---|---|---|")
        for summary in comparison.summaries():
            if summary.runs:
                print(f"| {summary.variant} | " + " | ".join(cells(summary)) + " |")


def cells(summary: Summary) -> list[str]:
    """What the table says of a variant."""
    ratios = "" if summary.low_ratio is None else f"{summary.low_ratio:.3f} / {summary.low_ratio_bits:.3f}"
    accuracy, same = (metrics.get("accuracy") for metrics in (summary.metrics, summary.fp32_metrics))
    promoted = "" if not summary.promotions.highest else f"{summary.promotions.mean:.1f}"
    return [ratios, percent(accuracy), percent(same), promoted, f"{summary.diverged} of {summary.runs}"]


def percent(spread: Spread | None) -> str:
    """``43.2 ± 0.5`` per cent: mean and sample standard deviation over the seeds."""
    if spread is None or spread.mean is None:
        return "—"
    return f"{100 * spread.mean:.1f}" + ("" if spread.deviation is None else f" ± {100 * spread.deviation:.1f}")


if __name__ == "__main__":
    main()
