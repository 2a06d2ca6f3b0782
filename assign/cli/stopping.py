"""Stop on Ctrl-C and say how to continue. This module may run during imports, so it imports nothing of the package."""

import signal
import sys
import threading
from collections.abc import Sequence

_AGAIN = 0.05  # seconds after which a lost Ctrl-C is repeated


def repeat_lost_interrupts() -> None:
    """Repeat Ctrl-C for this process whenever Python drops the exception that it raised.

    Python ignores exceptions in ``__del__`` and in callbacks of weak references, which Dynamo uses a lot: it prints
    ``KeyboardInterrupt``, and the program continues.
    """
    before = sys.unraisablehook

    def on_unraisable(lost: "sys.UnraisableHookArgs") -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            timer = threading.Timer(_AGAIN, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
            timer.daemon = True
            timer.start()
        else:
            before(lost)

    sys.unraisablehook = on_unraisable


def advice(arguments: Sequence[str]) -> str:
    """Return how to continue after the command with these arguments was stopped."""
    command = next((each for each in arguments if not each.startswith("-")), "")
    options = {name: _value(arguments, *name.split("/")) for name in ("--checkpoint", "-o/--output", "--strategy")}
    checkpoint, output = options["--checkpoint"], options["-o/--output"]
    if command == "train" and checkpoint:
        text = f"Run the same command with --resume to resume from {checkpoint}, if it was written."
        if "--resume" in arguments:
            text = f"Run the same command again to resume from {checkpoint}."
    elif command == "train":
        text = "Nothing was saved. Train with --checkpoint FILE; then --resume continues from that file."
    elif command == "compare":
        text = f"Run the same command again to resume from {_value(arguments, '--json') or 'compare.json'}."
    elif command == "noise":
        text = f"Run the same command again to resume from {output or 'noise.json'}."
    elif command == "tune" or (command == "search" and options["--strategy"] == "optuna"):
        text = "Run the same command again to resume the study. Finished trials are kept."
    elif options["--strategy"] == "milp":
        text = "Run the same command again: it reuses the noise that was measured, and repeats the rest."
    else:
        text = "Run the same command again to start from the beginning."
    return f"stopped. {text}"


def _value(arguments: Sequence[str], *names: str) -> str | None:
    """Return the value of an option, ``--name value`` or ``--name=value``; the last one if it is repeated."""
    found = None
    for place, each in enumerate(arguments):
        name, equals, value = each.partition("=")
        if name in names and equals:
            found = value
        elif each in names and place + 1 < len(arguments):
            found = arguments[place + 1]
    return found
