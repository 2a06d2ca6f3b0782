"""Keep a command running when standard output or standard error is closed, full, or limited to ASCII."""

import contextlib
import errno
import os
import sys
from typing import Any, TextIO


class Guarded:
    """A text stream that does not raise: after the first OSError it discards all output.

    A long training must not be lost because its result cannot be printed.

    Attributes:
        failure: the first error; None if there was none.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Write ``text``, unless an earlier call has failed; return its length."""
        if self.failure is None:
            try:
                return self._stream.write(text)
            except OSError as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, unless an earlier call has failed."""
        if self.failure is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._fail(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _fail(self, error: OSError) -> None:
        self.failure = error
        with contextlib.suppress(OSError):  # the buffer is discarded, also when Python flushes it at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def guard_streams() -> None:
    """Replace ``sys.stdout`` and ``sys.stderr`` by streams that never raise on output.

    A closed stream becomes the null device, and characters that the encoding does not have become ``?``.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the process that started this one
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for as long as the process runs
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        setattr(sys, name, Guarded(stream))


def check_streams(status: int) -> int:
    """Return the exit status: ``status``; if output was lost, 1 for a closed pipe, else 2 with a message."""
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
        "  The command finished without it and wrote the files that were requested.\n"
        "  Free some space, or send the output elsewhere.\n"
    )
    return 2
