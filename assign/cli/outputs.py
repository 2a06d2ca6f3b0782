"""What a command may write: known and tried before its work begins, and never what it reads."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from assign.cli.shell import console
from assign.errors import OutputError
from assign.files import check_writable, is_stdout, remove_leftovers, write_whole


def check_outputs(
    *outputs: Path | None, inputs: Iterable[Path | str | None] = (), continued: Iterable[Path | None] = ()
) -> None:
    """Make sure, before the work, that a command can write what it is to write.

    Where one of the outputs is standard output, tables and messages go to standard error.

    Args:
        outputs: files that are written once, at the end; None is not asked for.
        inputs: files that the command reads; a task ``FILE.py:FUNCTION`` is its file, a directory the files in it.
        continued: files that are written many times and read when the same command goes on.
    Raises:
        OutputError: one cannot be written, is read too, or is given twice.
    """
    once = [path for path in outputs if path is not None]
    often = [path for path in continued if path is not None]
    console.stderr = any(is_stdout(path) for path in once)
    for path in often:
        if is_stdout(path):
            raise OutputError(
                "this output cannot go to standard output, '-': it is read again when the command goes on. Give a file."
            )
    read = {os.path.realpath(path): path for path in _files(inputs)}
    seen: set[str] = set()
    for path in (*once, *often):
        where = str(path) if is_stdout(path) else os.path.realpath(path)
        if where in read and not is_stdout(path):
            raise OutputError(f"{path} is to be written, and the command reads it. Give another file for the output.")
        if where in seen:
            raise OutputError(f"{path} is to be written twice. Give each output a file of its own.")
        seen.add(where)
        try:
            check_writable(path)
        except OSError as error:
            raise _unwritable(path, error) from error


def check_directory(directory: Path) -> None:
    """Make sure, before the work, that files can be written into a directory, which may be made.

    Raises:
        OutputError: they cannot.
    """
    nearest = next(each for each in (directory, *directory.absolute().parents) if each.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write into {directory}: {nearest} is no directory that you may write to.")
    remove_leftovers(directory / "plan.json")


def write_json(path: Path | None, data: Any) -> None:
    """What ``--json FILE`` asks for, written whole; nothing without a path.

    Raises:
        OutputError: the file cannot be written.
    """
    if path is None:
        return
    try:
        write_whole(path, json.dumps(data, indent=2) + "\n")
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> OutputError:
    """The error of an output that cannot be written."""
    return OutputError(
        f"cannot write {path}: {error.strerror or error}. "
        "Give a regular file in a directory that exists and that you may write to, or '-' for standard output."
    )


def _files(inputs: Iterable[Path | str | None]) -> Iterable[Path]:
    for given in inputs:
        if given is None:
            continue
        path = Path(given)
        if path.is_dir():
            yield from path.glob("*.json")
        else:
            yield path
            yield Path(str(given).rpartition(":")[0] or given)
