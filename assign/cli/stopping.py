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

    def hear(lost: "sys.UnraisableHookArgs") -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            timer = threading.Timer(_AGAIN, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
            timer.daemon = True
            timer.start()
        else:
            before(lost)

    sys.unraisablehook = hear


def advice(arguments: Sequence[str]) -> str:
    """Return how to continue after the command with these arguments was stopped."""
    command = next((each for each in arguments if not each.startswith("-")), "")
    options = {name: _value(arguments, *name.split("/")) for name in ("--checkpoint", "-o/--output", "--strategy")}
    checkpoint, output = options["--checkpoint"], options["-o/--output"]
    if command == "train" and checkpoint:
        go_on = f"Run the same command with --resume to go on from {checkpoint}, if it was written before."
        if "--resume" in arguments:
            go_on = f"Run the same command again to go on from {checkpoint}."
    elif command == "train":
        go_on = "Nothing was kept. Train with --checkpoint FILE, and --resume goes on from that file."
    elif command == "compare":
        go_on = f"Run the same command again: it goes on from {_value(arguments, '--json') or 'compare.json'}."
    elif command == "noise":
        go_on = f"Run the same command again: it goes on from {output or 'noise.json'}."
    elif command == "tune" or (command == "search" and options["--strategy"] == "optuna"):
        go_on = "Run the same command again to resume the study: the trials that are done are kept."
    elif options["--strategy"] == "milp":
        go_on = "Run the same command again: it goes on with the noise that was measured, and does the rest anew."
    else:
        go_on = "Run the same command again to start from the beginning."
    return f"stopped. {go_on}"


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
