"""The shell: arguments in, tables and JSON out; no logic of its own.

Nothing heavy is imported here, so that Ctrl-C is obeyed from the first line on: torch alone takes seconds to import.
"""

import os
import signal
import sys
from typing import Any

from assign.cli.secrets import mask_text
from assign.cli.streams import check_streams, guard_streams
from assign.errors import AssignError

__all__ = ["app", "main"]

_INTERRUPTED = 130  # 128 and the number of SIGINT, as shells have it


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from assign.cli import commands

    return commands.app


def main() -> None:
    """Entry point: an AssignError is one message and exit status 2; Ctrl-C is one message and exit status 130."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it is ignored, as by nohup
    if interruptible:
        signal.signal(signal.SIGINT, _stop_importing)
    guard_streams()
    status = 0
    try:
        from assign.cli import commands

        if interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        commands.app()
    except KeyboardInterrupt:
        status = _INTERRUPTED
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1 if leaving.code else 0
    except AssignError as error:
        _say("\n  ".join([f"error: {error}", *getattr(error, "__notes__", ())]))
        status = 2
    except OSError as error:  # of a file that nothing nearer knows more about
        _say(
            f"error: {'a file' if error.filename is None else repr(error.filename)} cannot be used: "
            f"{error.strerror or error}.\n  Give another file, or mend what is said here."
        )
        status = 2
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done; it would only disturb how Python ends
    if status == _INTERRUPTED:
        _say(_advice())
    sys.exit(check_streams(status))


def _stop_importing(_signal: int, _frame: Any) -> None:
    """End at once: nothing has begun, and whatever is being imported could swallow an exception."""
    os.write(2, f"{_advice()}\n".encode())
    os._exit(_INTERRUPTED)


def _advice() -> str:
    from assign.cli.stopping import advice

    return advice(sys.argv[1:])


def _say(text: str) -> None:
    from assign.report.terminal import Terminal

    Terminal(stderr=True, soft_wrap=True).print(mask_text(text), style="red", highlight=False)
