"""Does a plan keep its promise on real data: the bytes it predicts, the accuracy of fp32, and at which speed?

Method: the built-in task ``digits`` (a small ResNet on scikit-learn's digits) trained in plain fp32 and under plans for
several budgets, three seeds, one after the other in one process; the peak is every byte alive at the worst moment of a
whole step. Assumptions: nothing else runs on the machine. Prints a markdown table and writes one JSON.

    python benchmarks/bench_main_job.py
"""

import datetime
import json
import platform
import statistics
import subprocess
from pathlib import Path

import torch

from assign.planner import search_table
from assign.tasks import TaskOptions, load_task
from assign.tracing.tracer import trace
from assign.training.loop import train
from assign.training.options import TrainOptions

BUDGETS = ("60%", "40%")
SEEDS = (0, 1, 2)


def main() -> None:
    rows: dict[str, list[dict]] = {name: [] for name in ("fp32", *BUDGETS)}
    for seed in SEEDS:
        task = load_task("digits", TaskOptions(seed=seed))
        table = trace(task.make_model(), task.first_batch(), task.loss, task.optimizer)
        for name, runs in rows.items():
            plan = None if name == "fp32" else search_table(table, budget=name)
            result = train(task, plan, table=table, options=TrainOptions(seed=seed)).to_json()
            estimate = plan.provenance.estimate if plan else {"low_ratio": None}
            runs.append({**result, "seed": seed, "low_ratio": estimate["low_ratio"]})
    summary = {name: summarise(runs, rows["fp32"]) for name, runs in rows.items()}
    print("| | peak / fp32 | predicted / measured | accuracy | seconds per step / fp32 |\n|---|---|---|---|---|")
    for name, s in summary.items():
        print(f"| {name} | {s['peak']:.3f} | {s['predicted']:.4f} | {s['accuracy']:.4f} | {s['seconds']:.2f} |")
    sha = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    today = datetime.date.today().isoformat()
    facts = {"date": today, "commit": sha, "device": f"cpu, {torch.get_num_threads()} threads", "seeds": SEEDS}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    path = Path(__file__).parent / "results" / f"{today}_main_job_cpu_{sha}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**facts, "versions": versions, "summary": summary, "runs": rows}, indent=1) + "\n")
    print(f"wrote {path.name}")


def summarise(runs: list[dict], baseline: list[dict]) -> dict[str, float]:
    """Medians over the seeds of the ratios to fp32 in the same seed."""
    pairs = list(zip(runs, baseline, strict=True))
    return {
        "peak": statistics.median(a["measured_peak_bytes"] / b["measured_peak_bytes"] for a, b in pairs),
        "predicted": statistics.median(a["predicted_peak_bytes"] / a["measured_peak_bytes"] for a, _ in pairs),
        "accuracy": statistics.mean(a["metrics"]["accuracy"] for a, _ in pairs),
        "accuracy_spread": statistics.pstdev(a["metrics"]["accuracy"] for a, _ in pairs),
        "seconds": statistics.median(a["step_seconds"] / b["step_seconds"] for a, b in pairs),
    }


if __name__ == "__main__":
    main()
