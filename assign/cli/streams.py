"""Standard output and standard error as they are: closed, full, or unable to show every character."""

import contextlib
import errno
import os
import sys
from typing import Any, TextIO


class Guarded:
    """A stream whose first failure is kept; nothing is written to it afterwards, and the command goes on.

    A training of hours must not be lost because its table cannot be shown.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """As of any stream; after a failure nothing happens."""
        if self.failure is None:
            try:
                return self._stream.write(text)
            except OSError as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        """As of any stream; after a failure nothing happens."""
        if self.failure is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._fail(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _fail(self, error: OSError) -> None:
        self.failure = error
        with contextlib.suppress(OSError):  # what is in the buffer goes nowhere, now and when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def guard_streams() -> None:
    """Make ``sys.stdout`` and ``sys.stderr`` take every text, whatever they are."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this process
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process runs
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        setattr(sys, name, Guarded(stream))


def check_streams(status: int) -> int:
    """The exit status: 2 where standard output could not be written, which is said; 1 where nobody reads it."""
    stream = sys.stdout
    if not isinstance(stream, Guarded):
        return status
    stream.flush()
    if stream.failure is None or status:
        return status
    if stream.failure.errno == errno.EPIPE:
        return 1
    sys.stderr.write(
        f"error: standard output cannot be written: {stream.failure.strerror or stream.failure}.\n"
        "  The command went on without it, and files that were asked for are written.\n"
        "  Free some space, or send the output elsewhere.\n"
    )
    return 2
