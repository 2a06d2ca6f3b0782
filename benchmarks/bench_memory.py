"""Is the peak that is said before a run the one that is measured?

Claim: for every model and plan here, the predicted peak of a step is within 5 % of the measured one with the eager
backend, and within 10 % compiled; and a plan's is below that of every peer.

Method: a whole AdamW step of each model in ``steps/predicted.py`` under each plan, from one seed, models one after the
other, each in a process of its own. Predicted, before anything runs: ``assign.estimate`` of the traced table; of a
compiled step ``assign.rehearse``. Measured: every byte alive at the worst moment of the fourth step, by the profiler's
memory events, with parameters, states and batch. Beside the peers: the same, for the two models and the configurations
of ``bench_step.py``, each compiled in a process of its own, with its seconds per step.

Assumptions: torch's own AdamW, not fused; allocations below the tracked ones (Python, code) do not count.

    python benchmarks/bench_memory.py                             # all of it, an hour on two cores
    python benchmarks/bench_memory.py --models --beside gpt2      # beside the peers alone
    python benchmarks/bench_memory.py --backends eager --models mlp
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import facts
from benchmarks.steps.configurations import CONFIGURATIONS
from benchmarks.steps.predicted import MODELS, PLANS
from benchmarks.steps.processes import run_group
from benchmarks.steps.workloads import WORKLOADS

PEERS = (
    "fp32",
    "autocast",
    "autocast-compile",
    "adam8-budget",
    "adamfp8-budget",
    "best-peer",
    "low-adamfp8",
    "saved4-adamfp8",
)
"""What stands in the table beside the peers, in this order."""

WORKER = Path(__file__).parent / "steps" / "predicted.py"


def main() -> None:
    options = parse(sys.argv[1:])
    path = options.output or facts.default_path("memory", "cpu")
    result: dict[str, Any] = {"facts": facts.gather("cpu", options.threads), "rows": [], "failed": [], "beside": []}
    for model in options.models:
        rows, error = run(model, options)
        result["rows"] += rows
        if error:
            result["failed"].append({"model": model, "error": error})
        for row in rows:
            print(f"{line(row)}", flush=True)
        facts.write(path, result)
    for backend in options.backends:
        worst = max((row for row in result["rows"] if row["backend"] == backend), key=distance, default=None)
        if worst:
            print(f"worst, {backend}: {line(worst)}")
    with tempfile.TemporaryDirectory() as directory:
        for model in options.beside:
            print(f"\n### {model}\n\n| configuration | predicted MB | peak MB | s per step |\n|---|---|---|---|")
            for name in PEERS:
                result["beside"].append(beside(model, name, options, Path(directory)))
                print(peer_line(result["beside"][-1]), flush=True)
                facts.write(path, result)
    print(f"wrote {path.name}")


def run(model: str, options: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """The rows of one model, and what its process said at its end if it failed."""
    with tempfile.TemporaryDirectory() as directory:
        job, out = Path(directory) / "job.json", Path(directory) / "out.json"
        job.write_text(
            json.dumps(
                {
                    "model": model,
                    "plans": options.plans,
                    "backends": options.backends,
                    "threads": options.threads,
                    "seed": options.seed,
                }
            )
        )
        done = subprocess.run([sys.executable, str(WORKER), str(job), str(out)], capture_output=True, text=True)
        rows = json.loads(out.read_text()) if out.exists() else []
        return rows, "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1][:300]


def beside(model: str, name: str, options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """One configuration's step: bytes and seconds."""
    job = {"device": "cpu", "threads": options.threads, "seed": options.seed, "small": options.small, "batch": None}
    job |= {"data": None, "model": model, "configuration": name}
    (found,) = run_group(directory, [job], steps=options.steps, limit=1200)
    kept = ("status", "reason", "predicted_bytes", "peak_bytes", "saved_bytes", "state_bytes", "median_seconds")
    return {"model": model, "configuration": name, **{key: found[key] for key in kept if key in found}}


def peer_line(row: dict[str, Any]) -> str:
    """One row of the table beside the peers, in Markdown."""
    title = CONFIGURATIONS[row["configuration"]].name
    if "peak_bytes" not in row:
        return f"| {title} | | {row['status']}: {row['reason']} | |"
    said = f"{row['predicted_bytes'] / 1e6:.1f}" if row["predicted_bytes"] else ""
    return f"| {title} | {said} | {row['peak_bytes'] / 1e6:.1f} | {row['median_seconds']:.3f} |"


def distance(row: dict[str, Any]) -> float:
    """How far prediction and measurement are apart."""
    return abs(float(row["ratio"]) - 1)


def line(row: dict[str, Any]) -> str:
    """One row for a reader."""
    return (
        f"{row['model']:22} {row['plan']:36} {row['backend']:9} predicted {row['predicted_bytes'] / 1e6:8.2f} MB, "
        f"measured {row['measured_bytes'] / 1e6:8.2f} MB, {row['ratio']:.4f}"
    )


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--backends", nargs="+", choices=["eager", "inductor"], default=["eager", "inductor"])
    parser.add_argument("--beside", nargs="*", choices=WORKLOADS, default=["resnet-2.8m", "gpt2"])
    parser.add_argument("--steps", type=int, default=10, help="steady steps of each process beside the peers")
    parser.add_argument("--small", action="store_true", help="tiny models beside the peers: a smoke test")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
