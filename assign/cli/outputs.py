"""Check the output files of a command before its work begins; none may be an input of the same command."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from assign.atomic_write import check_writable, is_stdout, remove_leftovers, write_whole
from assign.cli.shell import console
from assign.errors import OutputError


def check_outputs(
    *outputs: Path | None, inputs: Iterable[Path | str | None] = (), continued: Iterable[Path | None] = ()
) -> None:
    """Check that a command can write all its outputs.

    If one of the outputs is standard output, tables and messages go to standard error.

    Args:
        outputs: files written once, at the end; None for an output that was not requested.
        inputs: files that the command reads. A task ``FILE.py:FUNCTION`` means its file, a directory its JSON files.
        continued: files that are written repeatedly, and read when the command is resumed.
    Raises:
        OutputError: an output cannot be written, is also an input, or is given twice.
    """
    once = [path for path in outputs if path is not None]
    often = [path for path in continued if path is not None]
    console.stderr = any(is_stdout(path) for path in once)
    for path in often:
        if is_stdout(path):
            raise OutputError(
                "this output cannot be standard output, '-', because a resumed command reads it. Give a file."
            )
    read = {os.path.realpath(path): path for path in _files(inputs)}
    seen: set[str] = set()
    for path in (*once, *often):
        where = str(path) if is_stdout(path) else os.path.realpath(path)
        if where in read and not is_stdout(path):
            raise OutputError(f"{path} is both read and written by the command. Give another file for the output.")
        if where in seen:
            raise OutputError(f"{path} is given for two outputs. Give each output a file of its own.")
        seen.add(where)
        try:
            check_writable(path)
        except OSError as error:
            raise _unwritable(path, error) from error


def check_directory(directory: Path) -> None:
    """Check that files can be written into a directory, which may not exist yet.

    Raises:
        OutputError: files cannot be written there.
    """
    nearest = next(each for each in (directory, *directory.absolute().parents) if each.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write into {directory}: {nearest} is not a directory that you may write to.")
    remove_leftovers(directory / "plan.json")


def write_json(path: Path | None, data: Any) -> None:
    """Write the result that ``--json FILE`` requests, atomically; do nothing without a path.

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
    """Return the error for an output that cannot be written."""
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
