"""The command line: parse arguments, print tables, write JSON. It has no logic of its own.

This module imports nothing slow, so that Ctrl-C works before torch, which takes seconds, is imported.
"""

import os
import signal
import sys
from typing import Any

from assign.cli.stopping import advice, repeat_lost_interrupts
from assign.cli.streams import check_streams, guard_streams
from assign.errors import AssignError
from assign.passwords import mask_text

__all__ = ["app", "main"]

_INTERRUPTED = 130  # 128 plus the number of SIGINT, as in shells


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from assign.cli import commands

    return commands.app


def main() -> None:
    """Entry point of the shell.

    An AssignError prints one message and ends with exit status 2; Ctrl-C prints one message and ends with 130.
    """
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it is ignored, as by nohup
    if interruptible:
        signal.signal(signal.SIGINT, _stop_importing)
    guard_streams()
    status = 0
    try:
        from assign.cli import commands

        if interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            repeat_lost_interrupts()
        commands.app()
    except KeyboardInterrupt:
        status = _INTERRUPTED
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1 if leaving.code else 0
    except AssignError as error:
        _print_error("\n  ".join([f"error: {error}", *getattr(error, "__notes__", ())]))
        status = 2
    except OSError as error:  # about a file, not handled anywhere else
        _print_error(
            f"error: {'a file' if error.filename is None else repr(error.filename)} cannot be used: "
            f"{error.strerror or error}.\n  Give another file, or correct the cause named here."
        )
        status = 2
    if interruptible:
        signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # the command has ended; a signal would only interrupt Python's own shutdown
    if status == _INTERRUPTED:
        _print_error(_advice())
    sys.exit(check_streams(status))


def _stop_importing(_signal: int, _frame: Any) -> None:
    """End the process immediately. Only imports have run, and a module being imported could catch an exception."""
    os.write(2, f"{_advice()}\n".encode())
    os._exit(_INTERRUPTED)


def _advice() -> str:
    return advice(sys.argv[1:])


def _print_error(text: str) -> None:
    from assign.report.terminal import Terminal

    Terminal(stderr=True, soft_wrap=True).print(mask_text(text), style="red", highlight=False)
