"""Draw what ``bench_step.py`` measured: peak bytes of a training step, each bar with its time beside the baseline's.

Several results of one model are put together: medians over them. Nothing is measured here.

    python benchmarks/draw_steps.py results/A.json results/B.json -o results/beside.png
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

sys.path.insert(0, str(Path(__file__).parents[1]))

from assign.report.pictures import save_picture
from benchmarks.bench_step import FIRST, beside, summary
from benchmarks.steps.configurations import BASELINE

OURS, PEERS = "#0072B2", "#999999"  # Okabe and Ito: told apart by the colour-blind
_MB = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="what bench_step.py wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, help=".svg or .png")
    options = parser.parse_args()
    save_picture(draw([json.loads(path.read_text()) for path in options.results]), options.output)
    print(f"wrote {options.output.name}")


def bars(results: list[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    """Each configuration of a model: its name, median peak, and seconds over the baseline's beside it."""
    rows = []
    for key, configuration in results[0]["configurations"].items():
        found, ratios = [], []
        for result in results:
            mine = {
                name: [run for run in result["runs"] if (run["model"], run["configuration"]) == (model, name)]
                for name in (FIRST, key)
            }
            one, base = summary(mine[key]), beside(mine[FIRST], mine[key])
            if one and base:
                found.append(one)
                ratios.append(one["time"] / base["time"])
        if found:
            rows.append(
                {
                    "name": configuration["name"],
                    "ours": bool(configuration["recipe"]),
                    "peak_bytes": statistics.median([one["peak_bytes"] for one in found]),
                    "seconds": statistics.median([one["time"] for one in found]),
                    "ratio": statistics.median(ratios),
                }
            )
    return sorted(rows, key=lambda row: -float(row["peak_bytes"]))


def draw(results: list[dict[str, Any]]) -> Any:
    """A chart below the other for each model of the results."""
    titles = {run["model"]: run["description"] for result in results for run in result["runs"] if run.get("seconds")}
    found = {title: bars(results, model) for model, title in titles.items()}
    sizes = [len(rows) for rows in found.values()]
    figure, charts = pyplot.subplots(
        len(found), 1, figsize=(9.4, 1.3 + 0.31 * sum(sizes)), height_ratios=sizes, layout="constrained", squeeze=False
    )
    for chart, (title, rows) in zip(charts[:, 0], found.items(), strict=True):
        _draw_bars(chart, title, rows)
    charts[-1, 0].set_xlabel("measured peak of one AdamW step, every byte alive (MB)")
    facts = results[0]["facts"]
    dates = ", ".join(sorted({result["facts"]["date"][:10] for result in results}))
    figure.suptitle(
        f"{facts['device']}, torch {facts['versions']['torch']}, {dates}; × is the time of a step beside {BASELINE}",
        fontsize=9,
        color="#555555",
        x=0.01,
        ha="left",
    )
    return figure


def _draw_bars(chart: Any, title: str, rows: list[dict[str, Any]]) -> None:
    names = [_short(row["name"]) for row in rows]
    sizes = [row["peak_bytes"] / _MB for row in rows]
    drawn = chart.barh(names, sizes, color=[OURS if row["ours"] else PEERS for row in rows], height=0.72)
    labels = [f" {size:.0f} MB, {row['ratio']:.2f} ×" for size, row in zip(sizes, rows, strict=True)]
    chart.bar_label(drawn, labels, fontsize=9)
    where = {"xy": (0.01, 1.04), "xycoords": ("figure fraction", "axes fraction")}
    chart.annotate(title, **where, fontsize=10, fontweight="bold", annotation_clip=False)
    chart.set_title(" ")  # room for it
    chart.set_xlim(0, 1.3 * max(sizes))
    chart.invert_yaxis()
    chart.spines[["top", "right", "left"]].set_visible(False)
    chart.tick_params(axis="y", length=0, labelsize=9)
    for label, row in zip(chart.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row["ours"] else "normal")


def _short(name: str) -> str:
    words = {"all three (torchao)": "8-bit AdamW + recompute budget 0.5 + fp8 activation pass"}
    name = name.removeprefix(f"{BASELINE} + ")
    found = words.get(name, name).replace(" (torchao)", "").removesuffix(", inductor")
    return found if found.startswith(("plan", "eager", BASELINE)) else f"… + {found}"


if __name__ == "__main__":
    main()
