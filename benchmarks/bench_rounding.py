"""Does rounding run near the speed of memory, and does it agree with others where the definitions do?

Claim: ``assign.numerics.quantize`` of 10 million float32 takes at most 3 times a plain copy and a fifth of QPyTorch's
time, for any ``fp(e,m,b)``.

Method: every contender makes a new tensor from the same one; they take turns, round after round in one process, so
that a drift of the machine meets all; medians, over that of the copy (`torch.empty_like(x).copy_(x)`, the limit).
On a CPU twice: memory "fresh", as glibc has it, where the kernel finds and clears the pages of every tensor this large
anew, and that is most of a copy's time; and "kept", where freed pages are used again, as jemalloc and tcmalloc can,
which PyTorch's tuning guide recommends; here by two calls of ``mallopt``. On a GPU torch's allocator always keeps them.

First the results are compared bit for bit: with torch's casts, on finite values below the overflow; with QPyTorch's
``float_quantize``, nearest, whose ``(e, m)`` is our ``fp(e,m,0)`` (ties away from zero, no codes for inf and NaN),
on random bit patterns, counted by class. Where they part: QPyTorch turns NaN into its largest value and negative
zeros into positive ones, and rounds some subnormals twice (fp(6,9,0): -0x1.87fffcp-35, 24.49998 steps, becomes 25).

Assumptions: nothing else runs on the machine; a C++ compiler for QPyTorch, which is left out, with the reason, where it
cannot be loaded.

    python benchmarks/bench_rounding.py --threads 2
    python benchmarks/bench_rounding.py --small          # a smoke test: few elements; writes nothing without --output
"""

import argparse
import ctypes
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from assign.formats.parsing import parse_format
from assign.numerics.rounding import quantize
from benchmarks import facts

ELEMENTS = 10_000_000
FORMATS = ("fp(4,3,4)", "fp(5,2,0)", "fp(6,9,0)", "e4m3", "e5m2", "bf16", "e4m3:pow2")
CASTS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "bf16": torch.bfloat16}
QPYTORCH = {"fp(4,3,0)": (4, 3), "fp(5,2,0)": (5, 2), "fp(6,9,0)": (6, 9)}
COPY = "copy"
KEPT = "kept"
WARM_UP = 3

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h: see mallopt(3)

Contender = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    elements = 100_000 if options.small else ELEMENTS
    result = measure(torch.device(options.device), elements, options.rounds)
    result["facts"] = facts.gather(options.device, options.threads)
    print(table(result))
    path = options.output or (None if options.small else facts.default_path("rounding", options.device))
    if path:
        facts.write(path, result)
        print(f"\nwrote {path.name}")


def measure(device: torch.device, elements: int, rounds: int) -> dict[str, Any]:
    """Agreement, then the seconds of every contender in every round."""
    qpytorch, missing = load_qpytorch()
    x = torch.randn(elements, generator=torch.Generator().manual_seed(0)).to(device)
    agreement = agree_with_casts(device) + (agree_with_qpytorch(qpytorch, device) if qpytorch else [])
    left_out = {"QPyTorch": missing} if missing else {}
    memory = {}
    if device.type == "cpu":
        memory["fresh"] = timed(contenders(qpytorch), x, rounds)
        left_out |= keep_memory()
    if KEPT not in left_out:
        memory[KEPT] = timed(contenders(qpytorch), x, rounds)
    return {"elements": elements, "agreement": agreement, "left_out": left_out, "memory": memory}


def timed(contenders: dict[str, Contender], x: Tensor, rounds: int) -> dict[str, Any]:
    """Seconds, their medians, and these over the copy's."""
    seconds = take_turns(contenders, x, rounds)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "median_seconds": medians,
        "over_copy": {name: median / medians[COPY] for name, median in medians.items()},
        "seconds": seconds,
    }


def keep_memory() -> dict[str, str]:
    """From now on freed pages are used again; or what must be left out, and why."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return {KEPT: "this C library has no mallopt"}
    done = mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    return {} if done else {KEPT: "mallopt refused"}


def load_qpytorch() -> tuple[Any, str]:
    """QPyTorch's ``float_quantize``, or None and why."""
    try:
        from qtorch.quant import float_quantize  # compiles its extension when first imported
    except Exception as error:  # no package, no compiler, or one that fails
        return None, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return float_quantize, ""


def contenders(qpytorch: Any) -> dict[str, Contender]:
    """Everything that is timed, by name."""
    found: dict[str, Contender] = {COPY: lambda x: torch.empty_like(x).copy_(x)}
    found |= {f"quantize {name}": partial(quantize, fmt=name) for name in FORMATS}
    found |= {f"cast {name} and back": partial(_cast, dtype=dtype) for name, dtype in CASTS.items()}
    if qpytorch:
        found |= {
            f"QPyTorch {name}": partial(qpytorch, exp=e, man=m, rounding="nearest") for name, (e, m) in QPYTORCH.items()
        }
    return found


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).to(torch.float32)


def take_turns(contenders: dict[str, Contender], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(WARM_UP + rounds):
        for name, run in contenders.items():
            _wait(x.device)
            start = time.perf_counter()
            run(x)
            _wait(x.device)
            seconds[name].append(time.perf_counter() - start)
    return {name: times[WARM_UP:] for name, times in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- agreement


def agree_with_casts(device: torch.device) -> list[dict[str, Any]]:
    """Against torch's casts, finite and below the overflow, where all releases mean the same."""
    x = random_bits(device)
    found = []
    for name, dtype in CASTS.items():
        ours, theirs = quantize(x, name), _cast(x, dtype)
        inside = x.isfinite() & (x.abs() < parse_format(name).overflow_threshold)
        found.append({"with": f"torch cast {name}", **count({"finite, no overflow": inside}, ours, theirs)})
    return found


def agree_with_qpytorch(qpytorch: Any, device: torch.device) -> list[dict[str, Any]]:
    """Against QPyTorch, by class of input."""
    x = random_bits(device)
    found = []
    for name, (e, m) in QPYTORCH.items():
        fmt = parse_format(name)
        ours, theirs = quantize(x, name), qpytorch(x, exp=e, man=m, rounding="nearest")
        magnitude, finite = x.abs(), x.isfinite()
        classes = {
            "normal": finite & (magnitude >= fmt.min_normal) & (magnitude < fmt.overflow_threshold),
            "subnormal": finite & (magnitude > fmt.underflow_threshold) & (magnitude < fmt.min_normal),
            "underflow, positive": (magnitude <= fmt.underflow_threshold) & ~x.signbit(),
            "underflow, negative": (magnitude <= fmt.underflow_threshold) & x.signbit(),
            "overflow": finite & (magnitude >= fmt.overflow_threshold),
            "inf": x.isinf(),
            "NaN": x.isnan(),
        }
        found.append({"with": f"QPyTorch {name}", **count(classes, ours, theirs)})
    return found


def random_bits(device: torch.device, elements: int = 2**20) -> Tensor:
    """Half any bit pattern, all exponents, inf and NaN included; half around 1, every fourth a tie of few bits."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (elements,), generator=generator, dtype=torch.int64)
    bits[: elements // 2] = torch.randn(elements // 2, generator=generator).view(torch.int32)
    bits[: elements // 2 : 4] &= ~((1 << 19) - 1)
    bits[:4] = torch.tensor([math.inf, -math.inf, math.nan, -0.0]).view(torch.int32)
    return bits.to(torch.int32).view(torch.float32).to(device)


def count(classes: dict[str, Tensor], ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """How many results differ in any bit, of how many, by class; one NaN is as good as another."""
    differ = (ours.view(torch.int32) != theirs.view(torch.int32)) & ~(ours.isnan() & theirs.isnan())
    return {
        "differ": {name: int((differ & inside).sum()) for name, inside in classes.items()},
        "of": {name: int(inside.sum()) for name, inside in classes.items()},
    }


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| agreement | differ, of how many |", "|---|---|"]
    for row in result["agreement"]:
        counts = ", ".join(f"{name}: {n} of {row['of'][name]}" for name, n in row["differ"].items())
        lines.append(f"| {row['with']} | {counts} |")
    for memory, found in result["memory"].items():
        lines += ["", f"| {result['elements']} float32, memory {memory} | ms | / copy | spread |", "|---|---|---|---|"]
        for name, median in found["median_seconds"].items():
            times = sorted(found["seconds"][name])
            spread = (times[len(times) * 3 // 4] - times[len(times) // 4]) / median
            lines.append(f"| {name} | {1000 * median:.2f} | {found['over_copy'][name]:.2f} | {spread:.0%} |")
    lines += [f"\nleft out: {name}: {reason}" for name, reason in result["left_out"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
