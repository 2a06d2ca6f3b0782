"""Do models of libraries work as their users have them: nothing refused, nothing silently wrong?

Claim: of the architectures whose plain step works, at least 97 % trace and train under a plan; loss, gradients and
buffers under a plan that keeps every tensor as it was loaded equal those of plain PyTorch bit for bit, or those of
``torch.compile(backend="aot_eager")`` where AOTAutograd itself sums in another order; under bf16 the gradient is no
further from the plain one than twice autocast's, and in 8 bits than as many times that as e5m2's step is wider. Where
bf16 in every tensor is further away, a plan that narrows only what autocast narrows must not be; the row says so.

Method: one model of each modelling file of transformers and of timm, with a tiny configuration, models of diffusers
and torch_geometric, LoRA by peft on bf16 bases: those of ``benchmarks/zoo/names.txt``, with the model's own loss or
else the mean square of its output; one process a model, one step from one seed each. Dropout is left as the
configuration has it, so a bit-for-bit result includes its masks.

Compiled: twenty models drawn by a fixed seed, half of them in several pieces. The error of a step under the plan as
loaded is at most twice that of ``torch.compile``, both against the eager step; the rest as above.

Assumptions: eager backend, one thread. "not built" is a model whose own plain step fails with these sizes: it counts
against the sizes here and is listed. A run that is stopped goes on with the models that its file does not have; each
row tells the commit that made it.

Packages: ``pip install -e '.[bench]' torch_geometric``, and ``pip install --no-deps timm``: no torchvision is needed.

    python benchmarks/bench_zoo.py                        # all of it: hours
    python benchmarks/bench_zoo.py --libraries peft diffusers
    python benchmarks/bench_zoo.py --every 5              # each fifth name
    python benchmarks/bench_zoo.py --compiled RESULT.json # twenty models of a result with the compiled backend
    python benchmarks/zoo/build.py                        # the list again, for other versions of the libraries
"""

import argparse
import json
import multiprocessing
import random
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import facts
from benchmarks.zoo.build import LIBRARIES, Name, names
from benchmarks.zoo.try_model import send_row

_CONTEXT = multiprocessing.get_context("forkserver")  # its processes need not import the libraries again
_CONTEXT.set_forkserver_preload(["benchmarks.zoo.preloaded"])
SECONDS = {"eager": 600, "inductor": 1800}
"""Backend → seconds after which a model counts as not ended."""
DRAWN = 20
"""Models that are tried compiled."""


def main() -> None:
    options = parse(sys.argv[1:])
    backend = "inductor" if options.compiled else "eager"
    path = options.output or facts.default_path("zoo-compiled" if options.compiled else "zoo", "cpu")
    result = json.loads(path.read_text()) if path.exists() else {"facts": facts.gather("cpu", 1), "rows": []}
    done = {Name(row["package"], row["file"], row["name"]) for row in result["rows"]}
    wanted = draw(options.compiled) if options.compiled else names(options.libraries)[:: options.every]
    missing = [each for each in wanted if each not in done]
    with ThreadPoolExecutor(options.jobs) as pool:
        for ended in as_completed([pool.submit(run, each, backend) for each in missing]):
            row = ended.result() | {"commit": facts.commit()}
            result["rows"].append(row)
            facts.write(path, result)
            print(line(row), flush=True)
    print(table(result["rows"]))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--every", type=int, default=1, help="of the names, each so many-th")
    parser.add_argument("--compiled", type=Path, metavar="RESULT", help="instead, compiled: some models of this result")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DATE_zoo_cpu_COMMIT.json")
    return parser.parse_args(arguments)


def draw(result: Path) -> list[Name]:
    """Models that work, by a fixed seed: as many in several pieces as in one."""
    rows = [row for row in json.loads(result.read_text())["rows"] if row["result"] == "ok"]
    rows.sort(key=lambda row: (row["package"], row["file"], row["name"]))
    kinds = [[row for row in rows if bool(row["breaks"]) is several] for several in (True, False)]
    chosen = [row for kind in kinds for row in random.Random(0).sample(kind, DRAWN // 2)]
    return [Name(row["package"], row["file"], row["name"]) for row in chosen]


def run(name: Name, backend: str) -> dict[str, Any]:
    """The row of a model, which a process of its own finds out."""
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=send_row, args=(sender, name, backend))
    process.start()
    sender.close()
    try:
        if receiver.poll(SECONDS[backend]):
            found: dict[str, Any] = receiver.recv()
            return found
        return name._asdict() | {"result": "not ended", "reason": f"more than {SECONDS[backend]} s"}
    except EOFError:
        process.join()
        return name._asdict() | {"result": "crashed", "reason": f"exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def line(row: dict[str, Any]) -> str:
    facts_of = [f"{row['breaks']} breaks", f"{len(row['outside'])} outside"] if "breaks" in row else []
    return "  ".join([f"{row['package']:15s} {row['name']:40s} {row['result']:10s}", *facts_of, row.get("reason", "")])


def table(rows: list[dict[str, Any]]) -> str:
    """Counts by library and result, then by reason."""
    results = sorted({row["result"] for row in rows}, key=lambda each: (each != "ok", each))
    counts = Counter((row["package"], row["result"]) for row in rows)
    lines = ["| library | " + " | ".join(results) + " |", "|---|" + "---|" * len(results)]
    lines += [
        f"| {library} | " + " | ".join(str(counts[library, each]) for each in results) + " |"
        for library in dict.fromkeys(row["package"] for row in rows)
    ]
    reasons = Counter((row["result"], kind_of(row)) for row in rows if row["result"] != "ok")
    lines += ["", "| result | reason | models |", "|---|---|---|"]
    lines += [f"| {result} | {reason} | {count} |" for (result, reason), count in reasons.most_common()]
    notes = Counter(row["note"] for row in rows if "note" in row)
    lines += ["", "| note | models |", "|---|---|"]
    lines += [f"| {note} | {count} |" for note, count in notes.most_common()]
    built = [row for row in rows if row["result"] != "not built"]
    good = sum(row["result"] == "ok" for row in built)
    exact = sum(bool(row.get("as loaded")) for row in built)
    lines.append(f"\n{good} of {len(built)} whose plain step works; {exact} bit for bit as loaded.")
    return "\n".join(lines)


def kind_of(row: dict[str, Any]) -> str:
    """The type of the error and the place where it was raised, without the numbers and names of one model."""
    reason = str(row.get("reason", ""))
    return reason.split("): ")[0] + ")" if "): " in reason else reason[:80].replace("\n", " ")


if __name__ == "__main__":
    main()
