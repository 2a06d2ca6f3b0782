"""Is the peak that is said before a run the one that is measured?

Claim: for every model and plan here, the predicted peak of a step is within 5 % of the measured one with the eager
backend, and within 10 % compiled.

Method: a whole AdamW step of each model in ``steps/predicted.py`` under each plan, from one seed, models one after the
other, each in a process of its own. Predicted, before anything runs: ``assign.estimate`` of the traced table; of a
compiled step ``assign.rehearse``. Measured: every byte alive at the worst moment of the fourth step, by the profiler's
memory events, with parameters, states and batch.

Assumptions: torch's own AdamW, not fused; allocations below the tracked ones (Python, code) do not count.

    python benchmarks/bench_memory.py                             # both backends, half an hour on two cores
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
from benchmarks.steps.predicted import MODELS, PLANS

WORKER = Path(__file__).parent / "steps" / "predicted.py"


def main() -> None:
    options = parse(sys.argv[1:])
    path = options.output or facts.default_path("memory", "cpu")
    result: dict[str, Any] = {"facts": facts.gather("cpu", options.threads), "rows": [], "failed": []}
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
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--backends", nargs="+", choices=["eager", "inductor"], default=["eager", "inductor"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
