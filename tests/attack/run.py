"""Attack every reader with damaged files and say, as JSON, what was found.

    python tests/attack/run.py --count 100000 --seed 0

Found is: an error that is not ours (foreign), a file that took more than two seconds of the process's own time (slow),
something imported, executed, connected or written outside the output while a file was read (leaks).
"""

import argparse
import collections
import json
import math
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from kinds import Kind, Subjects

from assign.errors import AssignError

SLOW = 2.0
"""Seconds of processor time that one file may take."""

_LEAKS = (
    "import",
    "exec",
    "compile",
    "socket.",
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
    "ctypes.",
    "shutil.",
)


class Watch:
    """An audit hook: what Python is asked to do while a damaged file is open; hooks cannot be removed, only ignored."""

    def __init__(self, folder: Path) -> None:
        self.on, self.found = False, []
        self._folder = os.path.realpath(folder)
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        self.on = False  # what is done here is not what is looked for
        try:
            if event == "open":
                path, _, flags = arguments
                writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                if writes and isinstance(path, (str, bytes)) and not self._inside(os.fsdecode(path)):
                    self.found.append(f"open {path!r} to write")
            elif event.startswith(_LEAKS) and not _of_libraries(event, arguments):
                self.found.append(f"{event} {str(arguments)[:100]}")
            elif event in ("os.remove", "os.rename") and not self._inside(str(arguments[0])):
                self.found.append(f"{event} {arguments[0]!r}")
        finally:
            self.on = True

    def _inside(self, path: str) -> bool:
        return os.path.realpath(path).startswith(self._folder)


_INSTALLED = (
    "template.html",
    os.path.join("", "optuna", "storages", ""),
    os.path.join("", "sqlalchemy", ""),
    os.path.join("", "torch", "fx", "graph_module.py"),
)


def _of_libraries(event: str, arguments: tuple[Any, ...]) -> bool:
    """Return whether code that runs is a library's own.

    Jinja compiles the page's template, SQLAlchemy the ``__init__`` of its tables, Optuna runs the steps between the
    versions of its database, and torch compiles the graph of the model that continues from a checkpoint.
    """
    if event not in ("compile", "exec"):
        return False
    file = str(arguments[1]) if event == "compile" else getattr(arguments[0], "co_filename", "")
    caller = sys._getframe(2).f_code.co_filename
    return any(each in name for each in _INSTALLED for name in (file, caller))


def attack(kind: Kind, folder: Path, watch: Watch, contents: Iterator[bytes]) -> dict[str, Any]:
    """What some files of one kind did."""
    path = folder / f"damaged-{kind.name}{kind.suffix}"
    counts: collections.Counter[str] = collections.Counter()
    problems: dict[str, tuple[str, bytes]] = {}
    slowest = 0.0
    for content in contents:
        path.write_bytes(content)
        counts["files"] += 1
        start = time.process_time()
        watch.found.clear()
        watch.on = True
        try:
            loaded = kind.load(path)
            counts["loaded"] += 1
            kind.use(path, loaded)
            watch.on = False
            if kind.train is not None and (counts["files"] < 10 or counts["loaded"] % 50 == 0):
                counts["trained"] += 1
                kind.train(loaded)
        except AssignError:
            counts["refused"] += 1
        except BaseException as error:
            watch.on = False
            counts["foreign"] += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            name = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:150]}"
            problems.setdefault(name, ("".join(traceback.format_exception(error)[-6:]), content))
        finally:
            watch.on = False
        took = time.process_time() - start
        slowest = max(slowest, took)
        if took > SLOW:
            counts["slow"] += 1
            problems.setdefault(f"{took:.1f} seconds", ("", content))
        if watch.found:
            counts["leaks"] += 1
            problems.setdefault(f"leak: {watch.found[0]}", ("", content))
    return {**counts, "slowest_seconds": round(slowest, 3), "problems": problems}


def damaged(kind: Kind, count: int, seed: int, deadline: float = math.inf) -> Iterator[bytes]:
    """The first ``count`` damaged files of a kind and a seed; fewer where the time is over."""
    for number in range(count):
        if time.perf_counter() > deadline:
            return
        draw = random.Random(f"{kind.name} {seed} {number}")
        yield kind.damage(draw.choice(kind.whole), draw)


def attack_all(folder: Path, count: int, seed: int, only: str = "", seconds: float = math.inf) -> dict[str, Any]:
    """Attack all kinds, each with its share of ``count`` files; first, whole files show that all of it works."""
    watch, found = Watch(folder), {}
    subjects = Subjects(folder)
    kinds = [*subjects.kinds()]
    total = sum(kind.share for kind in kinds)
    start, done = time.perf_counter(), 0
    for kind in kinds:
        done += kind.share
        if only and kind.name != only:
            continue
        subjects.first()
        whole = attack(kind, folder, watch, iter([*kind.whole, *kind.whole]))
        bad = {name: whole["problems"][name][0] for name in whole["problems"] if not name.startswith("leak")}
        if bad or whole.get("refused"):
            raise SystemExit(f"whole files of the kind {kind.name} are refused or fail: {whole.get('refused')} {bad}")
        files = damaged(kind, max(1, count * kind.share // total), seed, start + seconds * done / total)
        found[kind.name] = attack(kind, folder, watch, files)
    return found


def main() -> None:
    """Run the attack and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a kind of file")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop by then, with fewer files")
    parser.add_argument("--keep", type=Path, help="directory for the files that did what they may not")
    options = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = attack_all(Path(folder), options.count, options.seed, options.only, options.seconds)
    for name, result in found.items():
        for number, (problem, (trace, content)) in enumerate(result["problems"].items()):
            if options.keep:
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / f"{name}-{number}").write_bytes(content)
                (options.keep / f"{name}-{number}.txt").write_text(f"{problem}\n{trace}")
        result["problems"] = [*result["problems"]]
    names = ("files", "loaded", "trained", "refused", "foreign", "slow", "leaks")
    totals = {name: sum(result.get(name, 0) for result in found.values()) for name in names}
    print(
        json.dumps({**totals, "seconds": round(time.perf_counter() - start, 1), "seed": options.seed, "kinds": found})
    )


if __name__ == "__main__":
    main()
