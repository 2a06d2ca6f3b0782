"""Is a plan right on this GPU, and how fast? Correctness first, then times, in ten minutes and one JSON.

Claim: every rounding gives on the device what it gives on the CPU, bit for bit; the all-fp32 plan is eager PyTorch, bit
for bit; promotion works; and the ratios that ``bench_step.py`` and ``bench_rounding.py`` claim hold.

Method: each check computes the same thing on the device and on the CPU (op by op, which the tests compare with an exact
oracle), on every bfloat16, random bit patterns, subnormals, ties and special values. Then ``bench_rounding.py`` and
``bench_step.py`` run as they are, each model with its share of the time that is left, the most telling configurations
first; what the time does not reach is recorded as such. The JSON is written anew after each part, so that an end by
force keeps what was done.

Assumptions: nothing else runs on the device; torch >= 2.11 and this package's dependencies; transformers for two of the
models, torchao and QPyTorch for the comparison with them (recorded as left out where missing).

    benchmarks/gpu.sh                                  # or: python benchmarks/gpu.py --device cuda
    DEVICE=cpu benchmarks/gpu.sh --small               # a smoke test of the same script
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: the identity needs it

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import facts
from benchmarks.device_checks import CHECKS
from benchmarks.steps.workloads import DEFAULTS

CONFIGURATIONS = (
    "bf16-inductor", "low-inductor", "float8-torchao", "greedy-inductor", "autocast", "fp32", "best-peer",
    "low-adam8", "adam8-torchao", "budget", "fp8-pass", "fp32-compile", "hfp8-inductor", "low-eager", "bf16-eager",
    "adam8-bitsandbytes",
)  # fmt: skip
"""The most telling first; the baseline runs before and after them."""

PARTS = ("checks", "rounding", "step")

_ROUNDING_SECONDS = 60
_RESERVE_SECONDS = 5  # to end processes and write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--total-seconds", type=float, default=570)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", nargs="+", help="as for bench_step.py; those of a GPU, unless given")
    parser.add_argument("--configs", nargs="+", default=CONFIGURATIONS)
    parser.add_argument("--small", action="store_true", help="tiny sizes; writes nothing without --output")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    deadline = time.monotonic() + options.total_seconds - _RESERVE_SECONDS
    torch.set_num_threads(options.threads)
    path = options.output or (None if options.small else facts.default_path("gpu", options.device))
    result: dict[str, Any] = {"facts": facts.gather(options.device, options.threads), "checks": []}

    def keep() -> None:
        if path:
            facts.write(path, result)

    for name, check in CHECKS.items() if "checks" in options.parts else ():
        result["checks"].append(run_check(name, check, torch.device(options.device)))
        keep()
    if "rounding" in options.parts:
        left = deadline - time.monotonic()
        result["rounding"] = run_script(options, "bench_rounding.py", [], min(_ROUNDING_SECONDS, left))
        keep()
    result["step"] = {}
    models = (options.models or DEFAULTS["cuda"]) if "step" in options.parts else ()
    for index, model in enumerate(models):
        share = (deadline - time.monotonic()) / (len(models) - index)
        arguments = ["--models", model, "--rounds", "1", "--total-seconds", str(share), "--step-seconds", "30"]
        arguments += ["--configs", *options.configs]
        result["step"][model] = run_script(options, "bench_step.py", arguments, share + _RESERVE_SECONDS)
        keep()
    if path:
        print(f"\nwrote {path.name}")
    bad = [check["name"] for check in result["checks"] if not check["ok"]]
    sys.exit(f"WRONG: {', '.join(bad)}" if bad else 0)


def run_check(name: str, check: Callable[[torch.device], str], device: torch.device) -> dict[str, Any]:
    """What came of one check, and how long it took."""
    start = time.perf_counter()
    try:
        ok, detail = True, check(device)
    except Exception as error:  # whatever is wrong here, the other checks still tell something
        ok, detail = False, f"{type(error).__name__}: {error}"
    print(f"{'ok   ' if ok else 'WRONG'} {name}: {detail[:500]}", flush=True)
    return {"name": name, "ok": ok, "detail": detail, "seconds": time.perf_counter() - start}


def run_script(options: argparse.Namespace, script: str, arguments: list[str], limit: float) -> dict[str, Any]:
    """A benchmark in a process of its own; what it wrote, or why it wrote nothing."""
    if limit <= 0:
        return {"status": "skipped", "reason": "the total time was over"}
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "result.json"
        command = [sys.executable, str(Path(__file__).parent / script), "--device", options.device]
        command += ["--threads", str(options.threads), "--output", str(output), *arguments]
        command += ["--small"] if options.small else []
        process = subprocess.Popen(command)
        try:
            code: int | str = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends its own processes
            process.wait()
            code = f"not done after {limit:.0f} s"
        found: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    return {"status": "ok" if code == 0 else f"failed: {code}", **found}


if __name__ == "__main__":
    main()
