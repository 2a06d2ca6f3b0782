"""Kill commands at random moments, and look at what is left.

Each command is started, and after a random time its process alone gets SIGKILL, SIGTERM or SIGINT. Afterwards:

* five seconds later no process of its session is left;
* nothing that it wrote is a traceback; after SIGINT it has left with 130, and has said how to go on;
* what it had written can be read, and has no less in it than before;
* when the command is then let run to its end, no temporary file is left, and its result is that of a run which nobody
  disturbed (where the command is one whose result does not depend on time).

A signal comes a second after the start or later, when the first line of the package has run.

    python tests/attack/kills.py --kills 100 [--seed 0] [--commands train compare noise run search]
"""

import argparse
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
ORPHANS = 5.0
"""Seconds after which nothing of a killed command may run."""

Read = Callable[[Path], int]
"""Directory → how much of the work is done; raises where what is there cannot be read."""


def _counted(name: str, count: Callable[[Path], int]) -> Read:
    """Count the work in a file of a directory: 0 while there is no such file."""
    return lambda place: count(place / name) if (place / name).exists() else 0


def _steps(file: Path) -> int:
    return int(torch.load(file, weights_only=True)["history"]["steps"])


def _runs(file: Path) -> int:
    return len(json.loads(file.read_text())["runs"])


def _batches(file: Path) -> int:
    return sum(len(samples) for row in json.loads(file.read_text())["cells"].values() for samples in row.values())


def _tensors(file: Path) -> int:
    return len(json.loads(file.read_text())["tensors"])


def _trials(file: Path) -> int:
    with sqlite3.connect(file, timeout=30) as database:
        try:
            return int(
                database.execute("SELECT count(*) FROM trials WHERE state IN ('COMPLETE', 'PRUNED')").fetchone()[0]
            )
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):  # killed while it made the tables
                return 0
            raise


@dataclass(frozen=True)
class Command:
    """A command, what it writes, and for how long it is worth killing.

    Attributes:
        again: what to give besides where there is something to go on from.
        result: what must be the same in the end, however often it was killed; None where nothing must.
    """

    arguments: Sequence[str]
    read: Read
    seconds: float
    again: Callable[[Path], Sequence[str]] = lambda _: ()
    result: Callable[[Path], Any] | None = None


def _compared(place: Path) -> Any:
    runs = json.loads((place / "compare.json").read_text())["runs"]
    return [(run["variant"], run["seed"], run["result"]["loss"], run["result"]["metrics"]) for run in runs]


def _trained(place: Path) -> Any:
    found = json.loads((place / "train.json").read_text())
    return found["loss"], found["metrics"]


def _measured(place: Path) -> Any:
    return json.loads((place / "noise.json").read_text())["cells"]


COMMANDS = {
    "train": Command(
        ("train", "digits", "--epochs", "4", "--checkpoint", "train.pt", "--json", "train.json"),
        _counted("train.pt", _steps),
        20,
        lambda place: ("--resume",) if (place / "train.pt").exists() else (),
        _trained,
    ),
    "compare": Command(
        ("compare", "digits", "--plan", "low.json", "--seeds", "2", "--epochs", "1", "--json", "compare.json"),
        _counted("compare.json", _runs),
        20,
        result=_compared,
    ),
    "noise": Command(
        ("noise", "digits", "-o", "noise.json", "--max-batches", "3", "--rtol", "0", "--warm-up", "2"),
        _counted("noise.json", _batches),
        20,
        result=_measured,
    ),
    "run": Command(
        ("run", "digits", "--low-ratio", "0.5", "--epochs", "1", "-o", "plan.json"), _counted("plan.json", _tensors), 20
    ),
    "tune": Command(
        (
            *("tune", "digits", "--workers", "2", "--trials", "6", "--epochs", "1"),
            *("--budget", "90%", "-o", "tuned.json"),
        ),
        _counted("tuned.study.db", _trials),
        35,
    ),
}


@dataclass
class Found:
    """What came of the kills of one command."""

    kills: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)  # exit statuses
    faults: list[str] = field(default_factory=list)
    temporary: int = 0  # files that a kill left, and that a later start has to remove
    done_before: int = 0  # runs that had ended when the signal came


def start(command: Command, place: Path) -> subprocess.Popen[bytes]:
    """Start it in a session of its own, its output in files."""
    arguments = [*command.arguments, *command.again(place)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (place / "out.txt").open("wb") as out, (place / "err.txt").open("wb") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "assign", *arguments],
            cwd=place,
            env=environment,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )


def session(leader: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split() if entry.name.isdigit() else []
        except OSError:  # it has ended meanwhile
            continue
        if fields and int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(entry.name))
    return found


def kill(name: str, place: Path, number: signal.Signals, seconds: float, found: Found) -> None:
    """Start a command, send a signal after so many seconds, and note what is wrong afterwards."""
    command = COMMANDS[name]
    before = command.read(place)
    process = start(command, place)
    try:
        process.wait(seconds)
        found.done_before += 1
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        found.kills[number.name] += 1
    where = f"{name}, {number.name} after {seconds:.2f} s"
    try:
        status = process.wait(30)
    except subprocess.TimeoutExpired:
        found.faults.append(f"{where}: it still runs 30 s later")
        os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    found.left[str(status)] += 1
    until = time.monotonic() + ORPHANS
    while session(process.pid) and time.monotonic() < until:
        time.sleep(0.1)
    if orphans := session(process.pid):
        found.faults.append(f"{where}: {len(orphans)} processes run {ORPHANS:.0f} s later")
        os.killpg(process.pid, signal.SIGKILL)
    said = (place / "err.txt").read_text(errors="replace") + (place / "out.txt").read_text(errors="replace")
    if "Traceback" in said:
        found.faults.append(f"{where}: a traceback:\n{said[-1500:]}")
    if (
        number is signal.SIGINT
        and status != 0
        and (status != 130 or "stopped." not in said or ("again" not in said and "--resume" not in said))
    ):
        found.faults.append(f"{where}: it left with {status} and said {said[-300:]!r}")
    try:
        after = command.read(place)
    except Exception as error:  # whatever a half file raises
        found.faults.append(f"{where}: what it wrote cannot be read: {error!r}")
    else:
        if after < before:
            found.faults.append(f"{where}: {before} were done before, {after} afterwards")
    found.temporary = max(found.temporary, len(temporary_files(place)))


def temporary_files(place: Path) -> list[str]:
    """Names of what is no result: hidden, or with the ending of a temporary file; SQLite's journal aside."""
    return [each.name for each in place.rglob("*") if each.name.startswith(".") or each.suffix == ".tmp"]


def finish(name: str, place: Path, found: Found) -> Any:
    """Let a command run to its end; returns its result."""
    command = COMMANDS[name]
    process = start(command, place)
    status = process.wait()
    if status not in (0, 1):  # 1: the training diverged, which is a result
        found.faults.append(f"{name}: let alone, it left with {status}: {(place / 'err.txt').read_text()[-1000:]}")
        return None
    if left := temporary_files(place):
        found.faults.append(f"{name}: {left} are left when it has ended")
    return command.result(place) if command.result else None


def attack(name: str, kills: int, seed: int, directory: Path) -> Found:
    """Kill one command so many times, each time going on from what is there, and let it end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and what they start
    rng, found = random.Random(f"{name} {seed}"), Found()
    reference, place = directory / f"{name}-alone", directory / f"{name}-killed"
    for each in (reference, place):
        each.mkdir()
        (each / "low.json").write_text((directory / "low.json").read_text())
    start_time = time.monotonic()
    expected = finish(name, reference, found)
    longest = min(COMMANDS[name].seconds, time.monotonic() - start_time)
    for number in range(kills):
        kill(name, place, SIGNALS[number % len(SIGNALS)], rng.uniform(1.0, max(2.0, longest)), found)
    result = finish(name, place, found)
    if result != expected:
        found.faults.append(f"{name}: killed {kills} times, it ends with another result")
    return found


def make_plan(directory: Path) -> None:
    """The plan that ``compare`` trains under."""
    subprocess.run(
        [sys.executable, "-m", "assign", "search", "digits", "--low-ratio", "0.5", "-o", "low.json"],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        stdout=subprocess.DEVNULL,
    )


def main() -> int:
    """Print what came of it; returns 1 where anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of all commands together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=[*COMMANDS])
    options = parser.parse_args()
    faults = 0
    with tempfile.TemporaryDirectory() as directory:
        make_plan(Path(directory))
        for name in options.commands:
            found = attack(name, -(-options.kills // len(options.commands)), options.seed, Path(directory))
            faults += len(found.faults)
            print(
                f"{name}: {dict(found.kills)}, {found.done_before} had ended before; exit statuses {dict(found.left)}; "
                f"at most {found.temporary} temporary files after a kill; {len(found.faults)} faults",
                flush=True,
            )
            for each in found.faults:
                print(f"  {each}", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
