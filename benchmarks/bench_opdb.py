"""Does every differentiable operator and module of torch train under a plan as without one?

Claim: of the first three samples of each in PyTorch's own databases (``op_db`` and ``module_db`` of ``torch.testing``,
float32 on CPU), at least 99 % give, under a plan that keeps every tensor in float32, the loss and the gradients of
plain PyTorch bit for bit, or those of ``torch.compile(backend="aot_eager")`` where AOTAutograd itself sums in another
order; and at least 99 %, under an all-bf16 plan, are finite where plain PyTorch is, with an error of at most 1 %, or of
at most twice that of the plain step in bf16, under autocast, or on parameters and inputs rounded to bf16. The others
are listed in ``benchmarks/opdb/exceptions.py``, each with its reason.

Method: a tiny model calls the operator with the sample's arguments; what the sample wants a gradient of is a parameter,
the rest is the batch; the loss is a weighted sum of all results. A second step under the bf16 plan says which of
torch's operators really made 16-bit values. Those that AOTAutograd takes apart, and computes in float32 between a bf16
operand and a bf16 result, are told apart.

Assumptions: eager backend, one thread. Skipped are samples whose plain step fails in this model: they are listed.

    python benchmarks/bench_opdb.py --jobs 2
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import facts
from benchmarks.opdb.exceptions import is_good, reason

WORKER = Path(__file__).parent / "opdb" / "try_samples.py"
PARTS = {"op_db": 12, "module_db": 3}
"""Into how many processes each database is divided; each takes minutes."""

Row = dict[str, Any]


def main() -> None:
    options = parse(sys.argv[1:])
    parts = [(database, part) for database, number in PARTS.items() for part in range(1, number + 1)]
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = [row for found in pool.map(lambda each: run(*each), parts) for row in found]
    result = {"facts": facts.gather("cpu", 1), **summary(rows)}
    facts.write(options.output or facts.default_path("opdb", "cpu"), result)
    print(table(result))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DATE_opdb_cpu_COMMIT.json")
    return parser.parse_args(arguments)


def run(database: str, part: int) -> list[Row]:
    """The rows of one part of a database.

    Raises:
        RuntimeError: its process has not ended well.
    """
    command = [sys.executable, str(WORKER), database, "--part", f"{part}/{PARTS[database]}"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    if ended.returncode:
        raise RuntimeError(f"{database}, part {part}: {ended.stderr[-2000:]}")
    lines = (line for line in ended.stdout.splitlines() if line.startswith("RESULT "))
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


def summary(rows: list[Row]) -> dict[str, Any]:
    """Counts, exceptions, and which operators ran in which dtype under the all-bf16 plan."""
    tried = [row for row in rows if "skipped" not in row]
    counts = {}
    for database in PARTS:
        own = [row for row in tried if row["database"] == database]
        counts[database] = {
            "samples": len(own),
            "skipped": sum(row["database"] == database for row in rows) - len(own),
            "fp32: as eager": sum(row["fp32"] == "eager" for row in own),
            "fp32: as aot_eager": sum(row["fp32"] == "aot_eager" for row in own),
            "bf16: near": sum(row["bf16"] == "ok" for row in own),
        }
    return {
        "counts": counts,
        "exceptions": [short(row) | {"reason": reason(row)} for row in tried if not is_good(row)],
        "skipped": [short(row) for row in rows if "skipped" in row],
        "operators under the all-bf16 plan": by_dtype(tried),
    }


def short(row: Row) -> Row:
    kept = ("database", "name", "sample", "skipped", "fp32", "bf16", "error", "rounded", "autocast", "low")
    return {name: row[name] for name in kept if name in row}


def by_dtype(rows: list[Row]) -> dict[str, list[str]]:
    """Names of the table's operators by the dtype in which they ran."""
    found: dict[str, set[str]] = {}
    for row in rows:
        for operator, dtype in row.get("operators", {}).items():
            inside = dtype == "bfloat16" and len(row["operators"]) == 1 and not row["ran"]
            found.setdefault("bfloat16, float32 inside" if inside else dtype, set()).add(operator)
    return {dtype: sorted(names) for dtype, names in sorted(found.items())}


def table(result: dict[str, Any]) -> str:
    """What came out, for a person."""
    lines = [f"{database}: {counts}" for database, counts in result["counts"].items()]
    lines += [f"  {row}" for row in result["exceptions"]]
    operators: Iterable[tuple[str, list[str]]] = result["operators under the all-bf16 plan"].items()
    lines += [f"{dtype}: {', '.join(names)}" for dtype, names in operators]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
