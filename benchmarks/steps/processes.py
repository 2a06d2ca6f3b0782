"""One configuration of one model in a process of its own, started and ended."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parent / "worker.py"


def start_worker(directory: Path, job: dict[str, Any], limit: float) -> dict[str, Any]:
    """Run the worker on a job, for ``limit`` seconds; what it found, or why it found nothing.

    Its caches stay in ``directory``: a second run of the same configuration of the same model finds them.
    """
    place = directory / f"{job['model']}-{job['configuration']}"
    place.mkdir(exist_ok=True)
    (place / "job.json").write_text(json.dumps(job))
    (place / "result.json").unlink(missing_ok=True)
    threads = job["threads"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": str(place / "cache"),
        "TRITON_CACHE_DIR": str(place / "triton"),
    }
    command = [sys.executable, str(WORKER), str(place / "job.json"), str(place / "result.json")]
    with (place / "log.txt").open("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return {"status": "failed", "reason": f"not done after {limit:.0f} s"}
        finally:
            end(process)
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    if process.returncode or not (place / "result.json").exists():
        errors = [line for line in lines if "Error" in line or "error:" in line] or lines
        return {"status": "failed", "reason": f"exit {process.returncode}: {' … '.join(errors[-2:])[:400]}"}
    found: dict[str, Any] = json.loads((place / "result.json").read_text())
    return found


def end(process: subprocess.Popen[bytes]) -> None:
    """End a worker with the compiler's processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
