"""The shell: arguments in, tables and JSON out; no logic of its own."""

import sys

from assign.cli import looking, reporting, searching, training, verifying
from assign.cli.secrets import mask_text
from assign.cli.shell import app
from assign.errors import AssignError
from assign.report.terminal import Terminal

__all__ = ["app", "looking", "main", "reporting", "searching", "training", "verifying"]


def main() -> None:
    """Entry point: an AssignError is one message and exit status 2, not a traceback."""
    try:
        app()
    except AssignError as error:
        Terminal(stderr=True, soft_wrap=True).print(
            mask_text("\n  ".join([f"error: {error}", *getattr(error, "__notes__", ())])),
            style="red",
            highlight=False,
        )
        sys.exit(2)
