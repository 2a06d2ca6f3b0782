"""How large is the report of a model with 500 tensors, and when does a browser answer?

Method: a chain of linear layers with normalisation is traced and a plan is searched for; the page is written and opened
in a headless Chromium, in a fresh context every time, at the width of a desktop and of a phone. The page says itself
when its tables can be searched and sorted and when each chart is drawn, in milliseconds from the start of loading;
medians. The time of ``assign report`` itself is not in it.

Assumptions: nothing else runs on the machine; Debian's ``chromium`` and Python's ``playwright`` are installed.

    python benchmarks/bench_report.py
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from assign.planner import search_table
from assign.report.page import Report, write_report
from assign.tracing.tracer import trace
from benchmarks import facts

SCREENS = {"desktop": (1280, 900), "phone": (390, 844)}
WIDTH, BATCH = 32, 64
PAUSE = 1000
_MARKS = "performance.getEntriesByType('mark').map(mark => [mark.name, mark.startTime])"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20, help="of the model; 20 make 506 tensors")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        tensors = write_page(page, options.layers)
        found = {"tensors": tensors, "bytes": page.stat().st_size}
        browser, found["milliseconds"] = measure(page, options.rounds, options.chromium)
    print(f"{tensors} tensors, {found['bytes'] / 1e6:.2f} MB")
    for screen, marks in found["milliseconds"].items():
        print(f"{screen}: " + ", ".join(f"{name} {median:.0f} ms" for name, median in marks.items()))
    path = options.output or facts.default_path("report", "cpu")
    facts.write(path, {**found, "rounds": options.rounds, "browser": browser, "facts": facts.gather("cpu")})
    print(f"\nwrote {path.name}")


def write_page(path: Path, layers: int) -> int:
    """The page of a chain of so many layers; returns how many tensors its step has."""
    parts = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.GELU()) for _ in range(layers)]
    model, batch = nn.Sequential(*parts), torch.randn(BATCH, WIDTH)
    table = trace(model, batch, lambda model, x: model(x).square().mean(), torch.optim.AdamW)
    plan = search_table(table, low_ratio=0.6)
    write_report(path, Report(name="plan.json", plan=plan, table=table))
    return len(table.tensors)


def measure(path: Path, rounds: int, chromium: str) -> tuple[str, dict[str, Any]]:
    """The browser's version, and for each screen the median milliseconds at which each part of the page answers."""
    from playwright.sync_api import sync_playwright

    found: dict[str, dict[str, list[float]]] = {screen: {} for screen in SCREENS}
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(rounds):
            for screen, (width, height) in SCREENS.items():
                context = browser.new_context(viewport={"width": width, "height": height})
                page = context.new_page()
                page.wait_for_timeout(PAUSE)  # until the page before is gone
                page.goto(path.as_uri())
                page.wait_for_selector("html[data-drawn=yes]")
                for name, start in page.evaluate(_MARKS):
                    found[screen].setdefault(name, []).append(start)
                context.close()
        version = browser.version
        browser.close()
    return version, {
        screen: {name: statistics.median(times) for name, times in marks.items()} for screen, marks in found.items()
    }


if __name__ == "__main__":
    main()
