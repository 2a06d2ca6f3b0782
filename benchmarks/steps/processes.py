"""Configurations of a model, each in a process of its own; those of a group take turns and so meet the same machine."""

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[2]
TURN = 2
"""Steps that a process takes before the next one's turn."""
FEWEST_STEPS = 5
"""Steps that each process takes even where its time is over."""


def run_group(
    directory: Path,
    jobs: Sequence[dict[str, Any]],
    *,
    steps: int,
    step_seconds: float = math.inf,
    limit: float = math.inf,
    deadline: float = math.inf,
    tell: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Start a worker for each job, one after the other; let them step by turns; and what each found, or why nothing.

    Args:
        directory: where their caches stay: a second run of the same configuration of the same model finds them.
        jobs: what ``worker.py`` reads; ``checkout``: directory of the repository whose ``worker.py`` it is.
        steps: the most steps of each worker, after the warm-up.
        step_seconds: no more steps of a worker once its own have taken these seconds.
        limit: seconds for any one answer: to compile, a turn, the end.
        deadline: of ``time.monotonic``, after which all end.
        tell: told of each worker that is ready.
    """
    workers: list[_Worker] = []
    try:
        for job in jobs:
            workers.append(_Worker(directory, job, limit, deadline))
            workers[-1].hear()
            tell(f"{job['model']}, {job['configuration']}: {workers[-1].found['status']}")
        while stepping := [each for each in workers if each.wants_more(steps, step_seconds)]:
            for worker in stepping:
                worker.ask(min(TURN, steps - len(worker.seconds)))
        for worker in workers:
            worker.ask("finish")
        return [worker.found for worker in workers]
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process, and what it last said."""

    def __init__(self, directory: Path, job: dict[str, Any], limit: float, deadline: float) -> None:
        self.limit, self.deadline = limit, deadline
        self.found: dict[str, Any] = {"status": "not started"}
        self.seconds: list[float] = []
        checkout = Path(job.get("checkout", CHECKOUT))
        place = directory / f"{job['model']}-{job['configuration']}-{checkout.name}"
        place.mkdir(exist_ok=True)
        threads = str(job["threads"])
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TORCHINDUCTOR_CACHE_DIR": str(place / "cache"),
            "TRITON_CACHE_DIR": str(place / "triton"),
        }
        self.log = (place / "log.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(checkout / "benchmarks/steps/worker.py"), json.dumps(job)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            start_new_session=True,
        )

    @property
    def ready(self) -> bool:
        return self.found["status"] == "ready"

    def wants_more(self, steps: int, seconds: float) -> bool:
        """Whether it has steps to take."""
        over = sum(self.seconds) > seconds and len(self.seconds) >= FEWEST_STEPS
        return self.ready and len(self.seconds) < steps and not over

    def ask(self, what: int | str) -> None:
        """Let it take steps, or ``finish``; nothing if it has ended."""
        if not self.ready:
            return
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{what}\n")
            self.process.stdin.flush()
        self.hear()

    def hear(self) -> None:
        """Wait for its answer."""
        assert self.process.stdout is not None
        left = self.deadline - time.monotonic()
        wait = max(0.0, min(self.limit, left))
        heard, _, _ = select.select([self.process.stdout], [], [], None if math.isinf(wait) else wait)
        if not heard:
            late = "the total time was over" if left < self.limit else f"no answer after {self.limit:.0f} s"
            self.found = {"status": "failed", "reason": late}
            return
        line = self.process.stdout.readline()
        self.found = json.loads(line) if line.endswith("\n") else {"status": "failed", "reason": self._last_words()}
        self.seconds += self.found.get("taken", ())

    def _last_words(self) -> str:
        code = self.process.wait()
        self.log.seek(0)
        lines = [line.strip() for line in self.log if line.strip()]
        errors = [line for line in lines if "Error" in line or "error:" in line] or lines
        return f"exit {code}: {' … '.join(errors[-2:])[:400]}"

    def end(self) -> None:
        """End it with the compiler's processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.log):
            assert file is not None
            with contextlib.suppress(BrokenPipeError):
                file.close()
