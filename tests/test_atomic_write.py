"""Outputs: written whole or not at all, regular files only, and never one of the command's inputs."""

import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from shell import fails, run

from assign.atomic_write import check_writable, remove_leftovers, replacing, write_whole
from assign.plan.plan import Assignment, Entry


def test_the_mode_of_the_old_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_whole(path, "old")
    for mode in (0o600, 0o640, 0o666):
        path.chmod(mode)
        write_whole(path, "new")
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_of_a_link_the_file_behind_it_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "second").symlink_to(tmp_path / "real" / "plan.json")
    (tmp_path / "first").symlink_to("second")
    write_whole(tmp_path / "first", "text")
    assert (tmp_path / "real" / "plan.json").read_text() == "text"
    assert (tmp_path / "first").is_symlink()
    assert (tmp_path / "second").is_symlink()


@pytest.mark.parametrize("write", [check_writable, lambda path: write_whole(path, "text")])
def test_what_is_no_regular_file_is_refused(tmp_path: Path, write) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    wanted = {
        "pipe": "a named pipe, not a regular file",
        ".": "a directory, not a regular file",
        "/dev/null": "a character device, not a regular file",
        "loop": "Too many levels of symbolic links",
        "x" * 300: "File name too long",
        "a\0b": "null",
        "nowhere/plan.json": "No such file or directory",
    }
    for name, fact in wanted.items():
        with pytest.raises(OSError, match=fact):
            write(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["loop", "pipe"]


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    write_whole(tmp_path / ("x" * 255), "text")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_whole(path, "old")
    half = b"x" * 2**20
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(half) // 2, limit[1]))  # to a file this is what a full disk is
    try:
        with pytest.raises(OSError, match="File too large"):
            write_whole(path, half.decode())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_killed_writer_leaves_nothing_for_the_next(tmp_path: Path) -> None:
    """Its file is removed by the next writer of the same file; that of a writer that lives is not."""
    path = tmp_path / "plan.json"
    code = (
        "import sys, time; from assign.atomic_write import replacing\n"
        "with replacing(sys.argv[1]) as file: file.write(b'half'); print('open', flush=True); time.sleep(60)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for each in processes:
        assert each.stdout is not None
        assert each.stdout.readline() == "open\n"
    assert len(os.listdir(tmp_path)) == 2
    processes[0].kill()
    processes[0].wait()
    remove_leftovers(path)
    assert len(os.listdir(tmp_path)) == 1
    processes[1].kill()
    processes[1].wait()
    check_writable(path)
    assert os.listdir(tmp_path) == []
    for each in processes:
        each.stdout.close()


def test_a_planted_link_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr("secrets.token_hex", lambda _: "0" * 16)
    with replacing(tmp_path / "plan.json"):
        temporary = next(name for name in os.listdir(tmp_path) if name.endswith(".tmp"))
    (tmp_path / temporary).symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "plan.json", "text")
    assert victim.read_text() == "mine"


TASK = """
import torch, assign
def task():
    return assign.Task(
        model=lambda: torch.nn.Linear(4, 4),
        loss=lambda model, batch: model(batch).square().mean(),
        train=[torch.randn(8, 4)],
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-2),
        epochs=1,
    )
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(TASK)
    plan = Assignment(entries={"a": Entry("bf16", True)}, recipe="native", fingerprint="f")
    plan.save("plan.json")
    plan.save("other.json")
    return tmp_path


INPUTS = [
    ("report", "plan.json", "-o", "plan.json"),
    ("report", "plan.json", "--run", "other.json", "-o", "other.json"),
    ("search", "mine.py:task", "-o", "mine.py", "--low-ratio", "0.5"),
    ("search", "mine.py:task", "-o", "x.json", "--json", "x.json", "--low-ratio", "0.5"),
    ("run", "mine.py:task", "-o", "./mine.py", "--low-ratio", "0.5"),
    ("show", "plan.json", "--json", "plan.json"),
    ("diff", "plan.json", "other.json", "--json", "other.json"),
    ("trace", "mine.py:task", "--json", "mine.py"),
    ("estimate", "mine.py:task", "--plan", "plan.json", "--json", "plan.json"),
    ("train", "mine.py:task", "--plan", "plan.json", "--checkpoint", "plan.json"),
    ("noise", "mine.py:task", "-o", "mine.py"),
    ("compare", "mine.py:task", "--plan", "plan.json", "--json", "plan.json"),
    ("audit", "mine.py:task", "--json", "mine.py"),
    ("certify", "mine.py:task", "--plan", "plan.json", "--json", "plan.json"),
]
UNWRITABLE = [
    ("show", "plan.json", "--json", "nowhere/x.json"),
    ("train", "mine.py:task", "--json", "/dev/null"),
    ("run", "mine.py:task", "--low-ratio", "0.5", "-o", "nowhere/plan.json"),
    ("noise", "mine.py:task", "-o", "-"),
    ("search", "mine.py:task", "--pareto", "3", "-o", "plan.json/plans"),
    ("compare", "mine.py:task", "--plan", "plan.json", "--json", "nowhere/x.json"),
]


@pytest.mark.parametrize("arguments", INPUTS, ids=lambda each: " ".join(each))
def test_no_command_writes_what_it_reads(here, capsys, monkeypatch, arguments) -> None:
    before = {path.name: path.read_bytes() for path in here.iterdir()}
    error = fails(capsys, monkeypatch, *arguments)
    assert "both read and written" in error or "given for two outputs" in error
    assert {path.name: path.read_bytes() for path in here.iterdir()} == before


@pytest.mark.parametrize("arguments", UNWRITABLE, ids=lambda each: " ".join(each))
def test_an_output_that_cannot_be_written_is_found_before_the_work(here, capsys, monkeypatch, arguments) -> None:
    monkeypatch.setattr("assign.cli.shell.load_task", lambda *_: pytest.fail("the work began"))
    error = fails(capsys, monkeypatch, *arguments)
    assert "annot" in error


def test_a_dash_is_standard_output(here) -> None:
    """Standard output holds only the plan; messages go to standard error."""
    found = subprocess.run(
        [sys.executable, "-m", "assign", "search", "mine.py:task", "--low-ratio", "0.5", "-o", "-"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert Assignment.from_json(found.stdout).entries
    assert "wrote -" in found.stderr
    assert not (here / "-").exists()
    assert "wrote" not in run("show", "plan.json")


URL = "postgresql://me:hun%40ter2@nowhere.invalid/db?sslpassword=tre/sor&connect_timeout=1"


@pytest.mark.parametrize("storage", [("--storage", URL), (f"--storage={URL}",)])
def test_no_output_has_the_password_of_a_url(here, storage) -> None:
    """The command stands in the plan, in what `show` prints, and in the page."""
    command = [sys.executable, "-c", _MADE, "search", "mine.py:task", "--strategy", "optuna", *storage]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    shown = run("show", "made.json") + run("show", "made.json", "--all", "--json", "shown.json")
    everything = [found.stdout, found.stderr, shown, *(path.read_text(errors="replace") for path in here.iterdir())]
    assert "me:***@nowhere.invalid" in (here / "made.json").read_text()
    for text in everything:
        for part in ("hun%40ter2", "hun@ter2", "tre/sor"):
            assert part not in text


_MADE = """
import dataclasses, sys
from assign.cli.shell import command_line
from assign.plan.plan import Assignment
plan = Assignment.load("plan.json")
plan.with_provenance(dataclasses.replace(plan.provenance, command=command_line())).save("made.json")
print(command_line())
"""
