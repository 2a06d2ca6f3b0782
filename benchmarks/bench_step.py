"""Is a plan as fast and as small as what people use today?

Claim: compiled, a plan of all bf16 takes at most the time of a step of autocast + compile; all low at most
1.3 times that on a CPU, and 1.05 on a GPU with fp8 products; and fewer bytes than any peer.

Method: a whole AdamW step (forward, loss, backward, optimizer) on one batch of random data, for each configuration in
``steps/configurations.py`` and each model in ``steps/workloads.py``, from the same seed. One process per configuration.
On a CPU some live at a time, the baseline always among them, and step by turns, a few steps each: a machine that slows
down or speeds up does so for all. On a GPU, whose memory they would share, each lives by itself (``--together 0``). All
run once for each round, in the opposite order every second time. The time is the median of the steady steps of all
rounds, the ratio that over the baseline's beside it; column "drift": the largest of the rounds' medians over the
smallest. Compile seconds are those of the warm-up beyond as many steady steps: "cold" with an empty Inductor cache,
"again" with what an earlier process left. Saved: bytes that the forward pass leaves for the backward pass. Peak: every
byte alive at the worst moment of a step, parameters and states included. Losses are compared with those of plain fp32
after as many steps. With ``--against`` each plan of ours also runs as another checkout of this repository runs it, in
the same group (``name@other``): has a change made steps slower or larger? With ``--data`` every step has a batch of its
own, the same for all configurations, and the loss that is shown is the mean of the last 20. What fails or cannot run
here is recorded with its reason; the rest goes on.

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
from benchmarks.steps.configurations import BASELINE, CONFIGURATIONS, Configuration
from benchmarks.steps.processes import run_group
from benchmarks.steps.workloads import DEFAULTS, WORKLOADS

OTHER = "@other"
"""Ends the name of a configuration that the checkout of ``--against`` runs."""
FIRST = next(name for name, row in CONFIGURATIONS.items() if row.name == BASELINE)
_TOGETHER = 4
_MB = 1e6


def main() -> None:
    options = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that the worker is ended too
    kind = torch.device(options.device).type
    models = options.models or DEFAULTS[kind]
    names = list(dict.fromkeys([FIRST, *(options.configs or CONFIGURATIONS)]))
    if options.against:
        names = [each for name in names for each in ((name, name + OTHER) if CONFIGURATIONS[name].recipe else (name,))]
    which = "".join(f"-{name}" for name in options.models or ())
    path = options.output or (None if options.small else facts.default_path(f"step{which}", options.device))
    result: dict[str, Any] = {
        "facts": facts.gather(options.device, options.threads),
        "other_commit": facts.commit(options.against) if options.against else None,
        "options": {k: v.name if isinstance(v, Path) else str(v) for k, v in vars(options).items()},
        "configurations": {name: dataclasses.asdict(configuration(name)) for name in names},
        "runs": [],
    }
    deadline = time.monotonic() + options.total_seconds
    with tempfile.TemporaryDirectory() as directory:
        for model in models:
            for number, (index, group) in enumerate(schedule(names, options.rounds, options.together)):
                where = {"model": model, "round": index, "group": number if options.together else 0}
                for run in run_together(options, Path(directory), where, group, result["runs"], deadline):
                    result["runs"].append(run)
                    tell(progress(run))
                if path:
                    facts.write(path, result)
    for model in models:
        print(f"\n{table(model, names, result['runs'])}")
    if path:
        print(f"\nwrote {path.name}")


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, help="those of the device, unless given")
    parser.add_argument("--configs", nargs="+", choices=CONFIGURATIONS, help="in this order, after the baseline")
    parser.add_argument("--steps", type=int, default=20, help="steady steps of each process")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch", type=int, help="examples, in place of each model's own number")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--together", type=int, help="that live at a time beside the baseline: on a CPU 4, else 0")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step-seconds", type=float, default=300, help="for the steady steps of a process, 5 or more")
    parser.add_argument("--run-seconds", type=float, default=1200, help="after which a silent process is ended")
    parser.add_argument("--total-seconds", type=float, default=float("inf"), help="after which all processes end")
    parser.add_argument("--data", type=Path, help="directory of data sets: real batches, a new one for each step")
    parser.add_argument("--small", action="store_true", help="tiny models; writes nothing without --output")
    parser.add_argument("--against", type=Path, help="another checkout of this repository, to compare with")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    if options.together is None:
        options.together = _TOGETHER if torch.device(options.device).type == "cpu" else 0
    if options.against and not (options.against / "benchmarks/steps/worker.py").is_file():
        parser.error(f"--against {options.against}: no checkout of this repository")
    return options


def configuration(name: str) -> Configuration:
    """Return the configuration of a name, whichever checkout runs it."""
    row = CONFIGURATIONS[name.removesuffix(OTHER)]
    return dataclasses.replace(row, name=f"{row.name}, other checkout") if name.endswith(OTHER) else row


def schedule(names: list[str], rounds: int, together: int) -> Iterator[tuple[int, list[str]]]:
    """Round and configurations of each group: the first and so many others, or each by itself.

    By itself the first runs a second time at the end of a single round.
    """
    first, others = names[0], names[1:]
    if together and others:
        groups = [[first, *others[start : start + together]] for start in range(0, len(others), together)]
    else:
        groups = [[name] for name in names]
    for index in range(rounds):
        yield from ((index, group[::-1] if index % 2 else group) for group in (groups[::-1] if index % 2 else groups))
    if rounds == 1 and len(groups) > 1 and not together:
        yield 1, [first]


def run_together(
    options: argparse.Namespace,
    directory: Path,
    where: dict[str, Any],
    group: list[str],
    before: list[dict[str, Any]],
    deadline: float,
) -> list[dict[str, Any]]:
    """A group's processes, side by side; what each found, or why it found nothing. What failed before is left out."""
    failed = {
        r["configuration"]: {"status": "skipped", "reason": f"{r['status']} before: {r['reason']}"}
        for r in reversed(before)
        if r["model"] == where["model"] and not r.get("seconds")
    }
    load, start = os.getloadavg()[0], time.monotonic()
    job = {key: getattr(options, key) for key in ("device", "threads", "seed", "small", "batch")}
    job |= {"model": where["model"], "data": str(options.data.resolve()) if options.data else None}
    alive = [name for name in group if name not in failed]
    if start < deadline:
        found = run_group(
            directory,
            [{**job, **checkout(options, name), "configuration": name.removesuffix(OTHER)} for name in alive],
            steps=options.steps,
            step_seconds=options.step_seconds,
            limit=options.run_seconds,
            deadline=deadline,
            tell=tell,
        )
    else:
        found = [{"status": "skipped", "reason": "the total time was over"}] * len(alive)
    took = {"load": load, "group_seconds": time.monotonic() - start}
    outcomes = failed | dict(zip(alive, found, strict=True))
    return [{**where, "configuration": name, **took, **outcomes[name]} for name in group]


def checkout(options: argparse.Namespace, name: str) -> dict[str, str]:
    return {"checkout": str(options.against.resolve())} if name.endswith(OTHER) else {}


# ---- what is printed


def progress(run: dict[str, Any]) -> str:
    where = f"{run['model']}, {configuration(run['configuration']).name}, round {run['round']}: {run['status']}"
    if "median_seconds" not in run:
        return f"{where}: {run['reason']}"
    return f"{where}, {run['median_seconds']:.4f} s per step, its group {run['group_seconds']:.0f} s"


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
    return "\n".join([*head, *(row(name, mine[name], beside(mine[FIRST], mine[name]), fp32) for name in names)])


def beside(base: list[dict[str, Any]], runs: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The baseline's rounds that ran in the groups of these."""
    groups = {run.get("group") for run in runs}
    return summary([run for run in base if run.get("group") in groups])


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
    title, found = configuration(name).name, summary(runs)
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
