"""Read and write checkpoints: written atomically, verified, and refused for another run."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from assign.atomic_write import check_writable, replacing
from assign.errors import TaskError
from assign.json_file import shown

UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    OSError,
    zipfile.BadZipFile,
)
"""Errors that ``torch.load`` and ``load_state_dict`` raise for a damaged file or another model."""


def check(path: Path) -> None:
    """Check, before the training, that a checkpoint can be written to ``path``.

    Raises:
        TaskError: it cannot.
    """
    try:
        check_writable(path)
    except OSError as error:
        raise _unwritable(path, error) from error


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` to ``path`` atomically: if the process is killed meanwhile, the old file remains.

    Raises:
        TaskError: the file cannot be written.
    """
    try:
        with replacing(path) as file:
            torch.save(dict(state), file)
    except (OSError, RuntimeError) as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: Exception) -> TaskError:
    return TaskError(f"cannot write the checkpoint {path}: {error}. Give a regular file in a directory that exists.")


def load(path: Path, identity: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the state saved in ``path``, after checking that its identity is ``identity``.

    Raises:
        TaskError: the file does not exist, is not a checkpoint, or belongs to another run.
    """
    if not path.is_file():
        raise TaskError(f"there is no checkpoint {path} to resume from. Start without resume; training writes it.")
    try:
        state = read(path, device)
        found = state["identity"]
        if not isinstance(found, Mapping):
            raise ValueError(f"its identity is a {type(found).__name__}")
    except UNREADABLE as error:
        raise TaskError(
            f"{path} is not a checkpoint, or it was cut off or damaged: {error}. Start again without resume."
        ) from error
    for name, wanted in identity.items():
        given = found.get(name)
        if type(given) is not type(wanted) or given != wanted:
            raise TaskError(
                f"the checkpoint {path} belongs to another run: its {name} is {shown(repr(given))}, not {wanted!r}. "
                "Resume with the options of that run, or start without resume."
            )
    return state


def read(path: Path, device: torch.device) -> dict[str, Any]:
    """Return what ``torch.save`` wrote to ``path``, tensors and plain values, after verifying its checksums.

    ``torch.load`` does not verify the checksums that ``torch.save`` writes.

    Raises:
        One of ``UNREADABLE``.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed, which torch.save does not do")
            damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"the checksum of its part {damaged!r} is wrong")
    state = torch.load(path, map_location=device, weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}")
    return state


def check_like(own: Mapping[str, Any], found: Any) -> None:
    """Check that a loaded state has the same names and types of values as the current state of the object.

    torch's schedulers store any state that they are given, so a wrong one would raise only some steps later.

    Raises:
        ValueError: they differ.
    """
    if not isinstance(found, Mapping) or found.keys() != own.keys():
        raise ValueError(f"it does not have exactly the entries {', '.join(map(str, own))}")
    for name, value in own.items():
        kinds = (int, float) if type(value) in (int, float) else type(value)
        if value is not None and found[name] is not None and not isinstance(found[name], kinds):
            raise ValueError(f"its {name} is a {type(found[name]).__name__}, not a {type(value).__name__}")
