"""What do codes in blocks cost in time, against a plain copy, and how far from the values is what comes back?

Method: for each format of saved copies, 2 million elements from a normal distribution are encoded and decoded, in
float32 and in bfloat16; copy, encoding and decoding take turns, round after round in one process; medians. The error is
that of float32, relative, root of the mean square.

Assumptions: nothing else runs on the machine; one thread, where not said otherwise; a C++ compiler.

    python benchmarks/bench_blocks.py
    python benchmarks/bench_blocks.py --small     # a smoke test: few elements; writes nothing without --output
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from assign.formats.rows import SAVED_FORMATS
from assign.numerics.blocks import decode_blocks, encode_blocks
from benchmarks import facts

ELEMENTS = 2_000_000
WARM_UP = 3
DTYPES = (torch.float32, torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    elements = 20_000 if options.small else ELEMENTS
    names = [name for plain in SAVED_FORMATS for name in (plain, f"{plain}:sr")]
    rows = [measure(name, elements, options.rounds, torch.device(options.device)) for name in names]
    print(table(rows))
    path = options.output or (None if options.small else facts.default_path("blocks", options.device))
    if path:
        facts.write(path, {"elements": elements, "rows": rows, "facts": facts.gather(options.device, options.threads)})
        print(f"\nwrote {path.name}")


def measure(name: str, elements: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Error and median milliseconds of one format."""
    x = torch.randn(elements, generator=torch.Generator().manual_seed(0)).to(device)
    seed = torch.zeros((), dtype=torch.int64, device=device)
    found = decode_blocks(encode_blocks(x, name, seed=seed), name, x)
    row: dict[str, Any] = {"format": name, "relative_error": float((found - x).norm() / x.norm())}
    for dtype in DTYPES:
        row[str(dtype).removeprefix("torch.")] = take_turns(name, x.to(dtype), seed, rounds)
    return row


def take_turns(name: str, x: torch.Tensor, seed: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median milliseconds of a copy, of encoding and of decoding, each into fresh memory."""
    codes = encode_blocks(x, name, seed=seed)
    work = {
        "copy": lambda: torch.empty_like(x).copy_(x),
        "encode": lambda: encode_blocks(x, name, seed=seed),
        "decode": lambda: decode_blocks(codes, name, x),
    }
    times: dict[str, list[float]] = {what: [] for what in work}
    for number in range(WARM_UP + rounds):
        for what, run in work.items():
            start = time.perf_counter()
            run()
            if x.device.type == "cuda":
                torch.cuda.synchronize(x.device)
            if number >= WARM_UP:
                times[what].append(1e3 * (time.perf_counter() - start))
    return {what: statistics.median(each) for what, each in times.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| format | bits/element | error | float32: copy, encode, decode (ms) | bfloat16: copy, encode, decode (ms) |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        bits = SAVED_FORMATS[row["format"].removesuffix(":sr")].bits_per_element
        times = " | ".join(", ".join(f"{ms:.2f}" for ms in row[dtype].values()) for dtype in ("float32", "bfloat16"))
        lines.append(f"| {row['format']} | {bits:g} | {row['relative_error']:.2g} | {times} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
