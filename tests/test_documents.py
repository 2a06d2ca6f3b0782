"""Every command and block of Python in the README and the pages runs, in the order of its page."""

import functools
import importlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from documents import PAGES, ROOT, Block, blocks, commands, prose, shell_lines
from shell import run
from typer.main import get_command

import assign
from assign.cli import app

SMALL = """
import dataclasses
from assign.tasks import TaskOptions, load_task

def task():
    digits = load_task("digits", TaskOptions(width=0.5, batch_size=32))
    return dataclasses.replace(digits, train=list(digits.train)[:2], epochs=1)
"""
"""The built-in task digits with fewer channels and two small batches; trials and seeds are two as well."""

NOT_RUN = {"pip", "pytest", ".ci/run"}
"""Programs that install the package or run the tests, of which this is one."""

RUNNER = """
import sys
path, line = sys.argv[1:]
names = {"__name__": "__main__"}
exec(compile("\\n" * (int(line) - 1) + open("block.py").read(), path, "exec"), names)
if "task" in names:
    names["task"]()
"""
"""Runs a block with the lines of its page in tracebacks; a task that it only defines is made."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each page, where its commands run one after the other: the next reads what the one before wrote."""

    @functools.cache
    def folder(page):
        path = tmp_path_factory.mktemp(re.sub(r"\W", "-", page))
        (path / "small.py").write_text(SMALL)
        for block in blocks(page, "python"):
            if block.file:
                (path / block.file).write_text(block.text)
        return path

    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), [(page, each) for page in PAGES for each in commands(page, "assign")])
def test_every_command_runs(page, command, folders, monkeypatch):
    monkeypatch.chdir(folders(page))
    fewer = re.sub(r"(--trials|--seeds) \d+", r"\1 2", command)
    arguments = ["small.py" if part in ("digits", "TASK") else part for part in shlex.split(fewer)]
    if arguments[1] in ("report", "show") and "--task" not in arguments:  # which find a built-in task by themselves
        arguments += ["--task", "small.py"]
    monkeypatch.setattr(sys, "argv", arguments)
    ticks = functools.partial(assign.measure_times, clock=itertools.count().__next__)  # every operator takes as long
    monkeypatch.setattr("assign.planner.measure_times", ticks)
    monkeypatch.setattr("assign.noise.options.WARM_UP", 2)
    run(*arguments[1:])


@pytest.mark.slow
@pytest.mark.parametrize("command", [each for page in PAGES for each in commands(page, "python")])
def test_every_script_runs(command, tmp_path, monkeypatch):
    """On a few random images, with few plans: what is added goes before what the page gives."""
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


def _python_blocks():
    """Every block of Python; those of the README are run also where slow tests are left out."""
    for page in PAGES:
        for block in blocks(page, "python"):
            marks = () if page == "README.md" else pytest.mark.slow
            yield pytest.param(block, id=f"{page}:{block.line}", marks=marks)


@pytest.mark.parametrize("block", [*_python_blocks()])
def test_every_python_block_runs(block: Block, tmp_path):
    (tmp_path / "block.py").write_text(block.text)
    (tmp_path / "runner.py").write_text(RUNNER)
    several = "init_process_group" in block.text
    two = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost", "--nproc-per-node", "2"]
    command = [sys.executable, *(two if several else []), "runner.py", block.page, str(block.line)]
    here = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}  # the machine's own name need not resolve
    for _ in range(2 if several else 1):
        done = subprocess.run(command, cwd=tmp_path, env=here, timeout=120, capture_output=True, text=True)
        if "SIGABRT" not in done.stderr:  # of gloo's threads, once in many runs, while the processes part
            break
    assert done.returncode == 0, done.stderr[:3000] + done.stderr[-3000:]


def test_no_block_is_left_out():
    """Every block has a language that a test runs, or is nothing that can be run."""
    for page in PAGES:
        for block in blocks(page):
            assert block.language in {"python", "sh", "bibtex", "", "{toctree}", "{glossary}", "{eval-rst}"}, block
            assert block.language or not re.search(r"^(assign|import|pip|python) ", block.text, re.M), block
        for line in shell_lines(page):
            assert line.split()[0] in {"assign", "python"} | NOT_RUN, (page, line)


def test_every_command_and_option_exists():
    known = get_command(app).commands
    options = {name: {o for p in each.params for o in p.opts} for name, each in known.items()}
    spans = [(page, *span) for page in PAGES for span in re.findall(r"`assign ([a-z]+)([^`]*)`", prose(page))]
    assert {name for _, name, _ in spans} == set(known)
    for page, name, flags in spans:
        assert set(re.findall(r"(?<!\S)--?[a-z-]+", flags)) <= options[name], (page, name, flags)
    others = {"--steps"}  # of benchmarks
    for page in PAGES:
        for flag in re.findall(r"`(--[a-z-]+)", prose(page)):
            assert flag in set().union(others, *options.values()), (page, flag)


def test_every_file_that_a_page_names_is_there():
    named = [
        (page, name)
        for page in PAGES
        for name in re.findall(
            r"(?:`|python )((?:benchmarks|tests|notebooks|docs|\.ci)/[^\s)`]*|assign/[\w/]+(?:\.py|/(?=`)))",
            PAGES[page],
        )
    ]
    assert len(named) > 20
    assert [each for each in named if not (ROOT / each[1]).exists()] == []


def test_every_relative_link_leads_to_a_file():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose(page)):
            path = (ROOT / page).parent / target
            assert path.exists() or path.with_suffix(".ipynb").exists(), (page, target)


def test_pages_are_in_plain_english():
    """No absolute path, which only one machine has, and none of the phrases that readers did not understand."""
    private = re.compile(
        r"(?<![\w./:])/\w[\w.-]*/|\bbehind\b|\bstands\b|\bwhat .{1,20} is true\b|\bwait(s|ing)? for the backward"
    )
    for page in PAGES:
        assert not private.search(prose(page)), (page, private.search(prose(page)))
