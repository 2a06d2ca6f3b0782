"""Write output files atomically. Only regular files are written, and they are checked before the work starts.

A reader sees the old file or the new one, never a part of one, even if the process is killed. For a link, the file that
it points to is replaced. ``-`` is standard output.
"""

import contextlib
import errno
import functools
import hashlib
import operator
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

STDOUT = "-"
"""The path that means standard output."""

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}


def is_stdout(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` means standard output."""
    return os.fspath(path) == STDOUT


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8 to ``path`` atomically; see :func:`replacing`.

    Raises:
        OSError: the file cannot be written; nothing is left behind, and the old file is as it was.
    """
    if is_stdout(path):
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    with replacing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces ``path`` when the block ends without an error.

    The mode of an existing file is kept. Temporary files of killed processes are removed.

    Raises:
        OSError: the file cannot be written; nothing is left behind, and the old file is as it was.
    """
    target, mode = _target(path)
    remove_leftovers(path)
    temporary, descriptor = _create(target, 0o666 if mode is None else mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if mode is not None:
                temporary.chmod(mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_writable(path: str | os.PathLike[str]) -> None:
    """Check that ``path`` can be written, without changing it.

    Raises:
        OSError: it is not a regular file, its directory does not exist or cannot be written, or it cannot be written.
    """
    if is_stdout(path):
        return
    target, _ = _target(path)
    remove_leftovers(path)
    temporary, descriptor = _create(target, 0o600)
    os.close(descriptor)
    temporary.unlink()


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove temporary files for ``path`` that killed processes left; those of running processes are locked."""
    target = Path(os.path.realpath(path))
    prefix = _prefix(target)
    with contextlib.suppress(OSError):
        for name in os.listdir(target.parent):
            if name.startswith(prefix) and name.endswith(_SUFFIX):
                _remove_unlocked(target.with_name(name))


_SUFFIX = ".tmp"


def _prefix(target: Path) -> str:
    """Return the prefix of temporary names. Its length is fixed, since a long name leaves no room for a suffix."""
    return f".assign-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]}-"


def _target(path: str | os.PathLike[str]) -> tuple[Path, int | None]:
    """Resolve links; return the file and its mode, None if it does not exist yet."""
    try:
        found = os.stat(path)  # raises for a loop of links and for a name that is too long
    except FileNotFoundError:
        return Path(os.path.realpath(path)), None
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, str(error)) from None
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file")
    if not os.access(path, os.W_OK):
        raise OSError(errno.EACCES, "it is not writable")
    return Path(os.path.realpath(path)), stat.S_IMODE(found.st_mode)


def _create(target: Path, mode: int) -> tuple[Path, int]:
    """Create a temporary file in the directory of ``target``; return its path and a descriptor that holds its lock."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _flags("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY")
    while True:
        temporary = target.with_name(f"{_prefix(target)}{secrets.token_hex(8)}{_SUFFIX}")
        descriptor = os.open(temporary, flags, mode)
        with contextlib.suppress(OSError):  # a file system without locks
            _lock(descriptor)
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)  # another process took it for a leftover before it was locked


def _remove_unlocked(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | _flags("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"))
    try:
        _lock(descriptor, wait=False)
        path.unlink()
    except BlockingIOError:
        pass  # its process is running
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool = True) -> None:
    """Lock an open file.

    Raises:
        BlockingIOError: another process has locked it, and this one does not wait.
        OSError: the file system, or Windows, has no such locks.
    """
    try:
        import fcntl
    except ImportError:
        raise OSError(errno.ENOTSUP, "this system has no locks of whole files") from None
    fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def _flags(*names: str) -> int:
    """Combine flags of ``os.open``, leaving out those that this system does not have."""
    return functools.reduce(operator.or_, (getattr(os, name, 0) for name in names))
