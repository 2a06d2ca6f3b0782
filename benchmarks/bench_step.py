"""Is a plan as fast and as small as what people use today?

Claim: compiled, a plan of all bf16 takes at most the time of a step of autocast + compile; all low at most
1.3 times that on a CPU, and 1.05 on a GPU with fp8 products; and fewer bytes than any peer.

Method: a whole AdamW step (forward, loss, backward, optimizer) on one batch of random data, for each configuration in
``steps/configurations.py`` and each model in ``steps/workloads.py``, from the same seed. One process per configuration,
with a time limit: what fails or cannot run here is recorded with its reason, and the rest goes on. All configurations
run once for each round, in the opposite order every second time, so that a drift of the machine shows (column "drift":
the largest of the rounds' medians over the smallest); the baseline runs first and last. The time is the median of the
steady steps of all rounds. Compile seconds are those of the warm-up beyond as many steady steps: "cold" with an empty
Inductor cache, "again" in the next round, with what the first left. Saved: bytes that the forward pass leaves for the
backward pass. Peak: every byte alive at the worst moment of a step, parameters and states included. Losses are
compared with those of plain fp32 after as many steps. With ``--data`` every step has a batch of its own, the same for
all configurations, and the loss that is shown is the mean of the last 20.

Assumptions: nothing else runs on the machine (each run records the load); no dropout; fused AdamW for all but 8-bit
AdamW; fp32 products are full fp32, no TF32; our plans under ``hfp8`` run with loss scaling and without promotion.

    python benchmarks/bench_step.py --threads 2                   # on a CPU
    python benchmarks/bench_step.py --device cuda
    python benchmarks/bench_step.py --small                       # a smoke test
"""

import argparse
import dataclasses
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import facts
from benchmarks.steps.configurations import BASELINE, CONFIGURATIONS
from benchmarks.steps.processes import start_worker
from benchmarks.steps.workloads import DEFAULTS, WORKLOADS

FIRST = next(name for name, row in CONFIGURATIONS.items() if row.name == BASELINE)
_MB = 1e6


def main() -> None:
    options = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that the worker is ended too
    kind = torch.device(options.device).type
    models = options.models or DEFAULTS[kind]
    names = list(dict.fromkeys([FIRST, *(options.configs or CONFIGURATIONS)]))
    which = "".join(f"-{name}" for name in options.models or ())
    path = options.output or (None if options.small else facts.default_path(f"step{which}", options.device))
    result: dict[str, Any] = {
        "facts": facts.gather(options.device, options.threads),
        "options": {k: v.name if isinstance(v, Path) else str(v) for k, v in vars(options).items()},
        "configurations": {name: dataclasses.asdict(CONFIGURATIONS[name]) for name in names},
        "runs": [],
    }
    deadline = time.monotonic() + options.total_seconds
    with tempfile.TemporaryDirectory() as directory:
        for model in models:
            for index, name in schedule(names, options.rounds):
                run = run_one(options, Path(directory), model, name, index, result["runs"], deadline)
                result["runs"].append(run)
                print(progress(run), file=sys.stderr, flush=True)
                if path:
                    facts.write(path, result)
    for model in models:
        print(f"\n{table(model, names, result['runs'])}")
    if path:
        print(f"\nwrote {path.name}")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, help="those of the device, unless given")
    parser.add_argument("--configs", nargs="+", choices=CONFIGURATIONS, help="in this order, after the baseline")
    parser.add_argument("--steps", type=int, default=20, help="steady steps of each process")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, help="examples, in place of each model's own number")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--step-seconds", type=float, default=300, help="for the steady steps of a process, of 5 or more"
    )
    parser.add_argument("--run-seconds", type=float, default=1200, help="after which a process is ended")
    parser.add_argument("--total-seconds", type=float, default=float("inf"), help="after which no process starts")
    parser.add_argument("--data", type=Path, help="directory of data sets: real batches, a new one for each step")
    parser.add_argument("--small", action="store_true", help="tiny models; writes nothing without --output")
    parser.add_argument("--output", type=Path)
    return parser.parse_args(arguments)


def schedule(names: list[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Round and configuration of each process, in order; a single round has its baseline a second time at its end."""
    for index in range(rounds):
        yield from ((index, name) for name in (names[::-1] if index % 2 else names))
    if rounds == 1 and len(names) > 1:
        yield 1, names[0]


def run_one(
    options: argparse.Namespace,
    directory: Path,
    model: str,
    name: str,
    index: int,
    before: list[dict[str, Any]],
    deadline: float,
) -> dict[str, Any]:
    """Start one process and wait for it; what it found, or why it found nothing."""
    run = {"model": model, "configuration": name, "round": index, "load": os.getloadavg()[0]}
    failed = next(
        (r for r in before if (r["model"], r["configuration"]) == (model, name) and not r.get("seconds")), None
    )
    if failed:
        return {**run, "status": "skipped", "reason": f"{failed['status']} before: {failed['reason']}"}
    left = deadline - time.monotonic()
    if left <= 0:
        return {**run, "status": "skipped", "reason": "the total time was over"}
    job = {
        key: getattr(options, key) for key in ("device", "threads", "seed", "steps", "small", "batch", "step_seconds")
    }
    job["data"] = str(options.data.resolve()) if options.data else None
    start = time.monotonic()
    outcome = start_worker(directory, {**job, "model": model, "configuration": name}, min(options.run_seconds, left))
    if left < options.run_seconds and outcome["status"] == "failed" and time.monotonic() >= deadline:
        outcome["reason"] = f"the total time was over: {outcome['reason']}"
    return {**run, **outcome, "process_seconds": time.monotonic() - start}


# ---- what is printed


def progress(run: dict[str, Any]) -> str:
    where = f"{run['model']}, {CONFIGURATIONS[run['configuration']].name}, round {run['round']}: {run['status']}"
    if "median_seconds" not in run:
        return f"{where}: {run['reason']}"
    return f"{where}, {run['median_seconds']:.4f} s per step, {run['process_seconds']:.0f} s in all"


def table(model: str, names: list[str], runs: list[dict[str, Any]]) -> str:
    """Markdown: times and bytes over the baseline's, losses beside those of fp32."""
    mine = {name: [r for r in runs if (r["model"], r["configuration"]) == (model, name)] for name in names}
    base = summary(mine[FIRST])
    fp32 = summary(mine["fp32"]) if "fp32" in mine else None
    head = [
        f"### {base['description'] if base else model}",
        "",
        f"| configuration | s per step | / {BASELINE} | drift | peak MB | / {BASELINE} | saved MB | states MB "
        "| compile s, cold | again | last loss | − fp32's | |",
        "|---|" + "---|" * 12,
    ]
    return "\n".join([*head, *(row(name, mine[name], base, fp32) for name in names)])


def summary(runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """One configuration's rounds together; None if none ran."""
    done = [run for run in runs if run.get("seconds")]
    if not done:
        return None
    medians = [run["median_seconds"] for run in done]
    return {
        **done[0],
        "time": statistics.median([second for run in done for second in run["seconds"]]),
        "drift": max(medians) / min(medians),
        "again": done[1]["compile_seconds"] if len(done) > 1 else None,
    }


def final_loss(found: dict[str, Any], count: int | None = None) -> float:
    """Loss of the last of the first ``count`` steps; where each has its own batch, the mean of twenty."""
    losses = [float(loss) for loss in found["losses"][:count]]  # not finite numbers are text in the results
    return statistics.mean(losses[-20:]) if found["real_data"] else losses[-1]


def row(name: str, runs: list[dict[str, Any]], base: dict[str, Any] | None, fp32: dict[str, Any] | None) -> str:
    title, found = CONFIGURATIONS[name].name, summary(runs)
    if found is None:
        reason = runs[0] if runs else {"status": "not run", "reason": ""}
        return f"| {title} |" + " |" * 11 + f" {reason['status']}: {reason['reason'].replace('|', '/')} |"
    count = min(len(found["losses"]), len(fp32["losses"])) if fp32 else 0
    loss, other = final_loss(found), final_loss(fp32, count) if fp32 else None
    cells = [
        title,
        f"{found['time']:.4f}",
        f"{found['time'] / base['time']:.3f}" if base else "",
        f"{found['drift']:.3f}",
        f"{found['peak_bytes'] / _MB:.1f}",
        f"{found['peak_bytes'] / base['peak_bytes']:.3f}" if base else "",
        f"{found['saved_bytes'] / _MB:.1f}",
        f"{found['state_bytes'] / _MB:.1f}",
        f"{found['compile_seconds']:.1f}",
        "" if found["again"] is None else f"{found['again']:.1f}",
        f"{loss:.4f}",
        "" if other is None else f"{final_loss(found, count) - other:+.4f}",
        found["status"] if found["status"] != "ok" else "",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
