"""Do models of libraries work as their users have them: nothing refused, nothing silently wrong?

Claim: of the architectures whose plain step works, at least 97 % trace and train under a plan; loss, gradients and
buffers under a plan that keeps every tensor as it was loaded equal those of plain PyTorch bit for bit, or those of
``torch.compile(backend="aot_eager")`` where AOTAutograd itself sums in another order; under bf16 the gradient is no
further from the plain one than twice autocast's.

Method: each architecture of transformers that a tiny configuration builds (causal and masked language models,
sequence-to-sequence, image classification), models of diffusers, LoRA by peft on bf16 bases; one process a model, one
step from one seed each. Dropout is left as the configuration has it, so a bit-for-bit result includes its masks.

Assumptions: eager backend, one thread. "not built" is a model whose own plain step fails with these sizes: it counts
against the sizes here and is listed. A run that is stopped goes on with the models that its file does not have.

    python benchmarks/bench_zoo.py                        # all of it: hours
    python benchmarks/bench_zoo.py --tasks peft diffusers
    python benchmarks/bench_zoo.py --every 5              # each fifth name
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import facts
from benchmarks.zoo.build import TASKS, all_names

WORKER = Path(__file__).parent / "zoo" / "try_model.py"
SECONDS = 300
"""After which a model counts as not ended."""


def main() -> None:
    options = parse(sys.argv[1:])
    path = options.output or facts.default_path("zoo", "cpu")
    result = json.loads(path.read_text()) if path.exists() else {"facts": facts.gather("cpu", 1), "rows": []}
    done = {(row["task"], row["name"]) for row in result["rows"]}
    missing = [each for each in list(all_names(options.tasks))[:: options.every] if each not in done]
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(lambda each: run(*each), missing):
            result["rows"].append(row)
            path.write_text(json.dumps(result, indent=1) + "\n")
            print(line(row), flush=True)
    print(table(result["rows"]))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--every", type=int, default=1, help="of the names of a task, each so many-th")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DATE_zoo_cpu_COMMIT.json")
    return parser.parse_args(arguments)


def run(task: str, name: str) -> dict[str, Any]:
    """The worker's row."""
    command = [sys.executable, str(WORKER), task, name]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"task": task, "name": name, "result": "not ended", "reason": f"more than {SECONDS} s"}
    rows = [each for each in ended.stdout.splitlines() if each.startswith("RESULT ")]
    if rows:
        found: dict[str, Any] = json.loads(rows[-1].removeprefix("RESULT "))
        return found
    return {"task": task, "name": name, "result": "crashed", "reason": ended.stderr[-300:]}


def line(row: dict[str, Any]) -> str:
    facts_of = [f"{row['breaks']} breaks", f"{len(row['outside'])} outside"] if "breaks" in row else []
    return "  ".join([f"{row['task']:10s} {row['name']:28s} {row['result']:10s}", *facts_of, row.get("reason", "")])


def table(rows: list[dict[str, Any]]) -> str:
    """Counts by task and result."""
    results = sorted({row["result"] for row in rows}, key=lambda each: (each != "ok", each))
    counts = Counter((row["task"], row["result"]) for row in rows)
    lines = ["| task | " + " | ".join(results) + " |", "|---|" + "---|" * len(results)]
    lines += [
        f"| {task} | " + " | ".join(str(counts[task, each]) for each in results) + " |"
        for task in dict.fromkeys(row["task"] for row in rows)
    ]
    built = [row for row in rows if row["result"] != "not built"]
    good = sum(row["result"] == "ok" for row in built)
    exact = sum(bool(row.get("as loaded")) for row in built)
    lines.append(f"\n{good} of {len(built)} whose plain step works; {exact} bit for bit as loaded.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
