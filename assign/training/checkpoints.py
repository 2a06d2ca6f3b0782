"""A run's checkpoint as a file: never half written, refused where it belongs to another run."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from assign.errors import TaskError


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` to ``path``; whoever is killed meanwhile leaves the old file.

    Raises:
        TaskError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        torch.save(dict(state), temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise TaskError(
            f"cannot write the checkpoint {path}: {error}. Give a file in a directory that exists."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path, identity: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The state saved in ``path``, whose ``identity`` must be this one.

    Raises:
        TaskError: it is not there, not a checkpoint, or of another run.
    """
    if not path.is_file():
        raise TaskError(f"there is no checkpoint {path} to go on from. Start without resume; training writes it.")
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        found = state["identity"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, ValueError, OSError) as error:
        raise TaskError(f"{path} is not a checkpoint, or it was cut off. Start again without resume.") from error
    for name, wanted in identity.items():
        if found.get(name) != wanted:
            raise TaskError(
                f"the checkpoint {path} is of another run: its {name} is {found.get(name)!r}, not {wanted!r}. "
                "Go on with what it was made with, or start without resume."
            )
    return state
