"""The README is true: its commands exist and run, in its order, and so do its blocks of Python."""

import functools
import importlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from shell import run
from typer.main import get_command

import assign
from assign.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SMALL = """
import dataclasses
from assign.tasks import TaskOptions, load_task

def task():
    digits = load_task("digits", TaskOptions(width=0.5))
    return dataclasses.replace(digits, train=list(digits.train)[:2], epochs=1)
"""
"""The built-in digits with fewer channels and two batches, so that all commands together take a minute."""


def commands(program):
    """The README's that begin so, in its order: of its blocks for a shell, and of the first column of its tables."""
    blocks = [
        text for language, text in re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M) if language in ("", "sh")
    ]
    lines = itertools.chain.from_iterable(re.sub(r"\\\n", " ", block).splitlines() for block in blocks)
    parts = [part.partition("#")[0].strip() for line in lines for part in line.split("&&")]
    rows = re.findall(r"^\| `(assign [^`]+)` \|", README, re.M)
    found = [part for part in [*parts, *rows] if part.startswith(f"{program} ")]
    return sorted(found, key=lambda part: README.index(part[:60]))  # one line of it


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where they run, one after the other: the next reads what the one before wrote."""
    path = tmp_path_factory.mktemp("readme")
    (path / "small.py").write_text(SMALL)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("command", commands("assign"))
def test_every_command_of_the_readme_runs(command, folder, monkeypatch):
    monkeypatch.chdir(folder)
    arguments = ["small.py" if part in ("digits", "TASK") else part for part in shlex.split(command)]
    if arguments[1] in ("report", "show"):  # which find a built-in task by themselves
        arguments += ["--task", "small.py"]
    monkeypatch.setattr(sys, "argv", arguments)
    ticks = functools.partial(assign.measure_times, clock=itertools.count().__next__)  # every operator takes as long
    monkeypatch.setattr("assign.cli.searching.measure_times", ticks)
    run(*arguments[1:])


@pytest.mark.slow
@pytest.mark.parametrize("command", commands("python"))
def test_every_script_of_the_readme_runs(command, tmp_path, monkeypatch):
    """On a few random images, with few plans: what is added goes before what the README gives."""
    for part in ("train", "test"):
        delta = np.random.default_rng(0).integers(0, 256, (3, 128, 32, 32), dtype=np.uint8)
        np.savez(tmp_path / f"cifar10-{part}.npz", delta=delta, labels=np.arange(128, dtype=np.uint8) % 10)
    script, *arguments = [str(tmp_path) if part == "DIR" else part for part in shlex.split(command)[1:]]
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(module, "RATIOS", (0.5,))
    smaller = ["--width", "0.05", "--epochs", "1", "--examples", "128", "--test-examples", "32", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", [script, *arguments, *smaller])
    module.main()
    (result,) = tmp_path.glob("paper_*.json")
    runs = json.loads(result.read_text())["runs"]
    assert [run["variant"] for run in runs] == ["fp32", "π_op", "π_op′", "greedy 0.5", "greedy 0.5, no promotion"]


def test_every_command_and_option_of_the_readme_exists():
    known = get_command(app).commands
    spans = re.findall(r"`assign ([a-z]+)([^`]*)`", README)
    assert {name for name, _ in spans} == set(known)
    for name, flags in spans:
        options = {option for parameter in known[name].params for option in parameter.opts}
        assert set(re.findall(r"(?<!\S)--?[a-z-]+", flags)) <= options


def test_every_file_that_the_readme_names_is_there():
    named = re.findall(r"(?:\]\(|`|python )((?:benchmarks|tests|notebooks|\.ci)/[^\s)`]*|assign/\w+\.py)", README)
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("block", re.findall(r"^```python\n(.*?)^```", README, re.S | re.M))
def test_every_python_block_of_the_readme_runs(block, tmp_path):
    (tmp_path / "block.py").write_text(block + "\nif 'task' in globals():\n    task()\n")
    two = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost", "--nproc-per-node", "2"]
    command = [sys.executable, *(two if "init_process_group" in block else []), "block.py"]
    here = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}  # the machine's own name need not resolve
    for _ in range(2 if "init_process_group" in block else 1):
        done = subprocess.run(command, cwd=tmp_path, env=here, timeout=120, capture_output=True, text=True)
        if "SIGABRT" not in done.stderr:  # of gloo's threads, once in many runs, while the processes part
            break
    assert done.returncode == 0, done.stderr[:3000] + done.stderr[-3000:]
