"""What every result says about where it comes from: date, commit, device, versions; and how it is written."""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = ("torch", "torchao", "bitsandbytes", "qtorch", "transformers", "triton", "numpy")


def gather(device: str, threads: int | None = None) -> dict[str, Any]:
    """Date, commit, device and versions, as plain data."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "command": " ".join([Path(sys.argv[0]).name, *map(_told, sys.argv[1:])]),
        "device": device_name(device),
        "threads": threads or torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "cuda": torch.version.cuda,
    }


def _told(argument: str) -> str:
    """An argument as a result tells it: of an absolute path, whose folders are one machine's own, the name alone."""
    option, separator, value = argument.rpartition("=")
    return f"{option}{separator}…/{Path(value).name}" if Path(value).is_absolute() else argument


def commit(checkout: Path = ROOT) -> str:
    """Return the short hash of the commit that is checked out, or ``unknown``."""
    return _git("rev-parse", "--short", "HEAD", checkout=checkout) or "unknown"


def device_name(device: str) -> str:
    """The model of the processor or of the GPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def default_path(question: str, device: str) -> Path:
    """Where a result goes: date, question, device and commit in its name."""
    return RESULTS / f"{datetime.date.today().isoformat()}_{question}_{torch.device(device).type}_{commit()}.json"


def write(path: Path, data: Any) -> None:
    """Write as JSON, whole or not at all; see :func:`plain`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(plain(data), indent=1, allow_nan=False) + "\n")
    part.replace(path)


def plain(value: Any) -> Any:
    """What JSON can hold: numbers that are not finite as text, tuples as lists."""
    if isinstance(value, dict):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*args: str, checkout: Path = ROOT) -> str:
    try:
        return subprocess.run(["git", *args], cwd=checkout, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        return ""
