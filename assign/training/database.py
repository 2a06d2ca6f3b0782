"""Open the database of a study, possibly from several processes at once, and translate its errors to StudyError."""

import contextlib
import os
import re
import sqlite3
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback

from assign.errors import AssignError, StudyError
from assign.passwords import mask_argument, mask_text

_WAIT = 60.0
"""Seconds that a process waits while another one writes."""

_LONGEST_PAUSE = 5.0
"""Longest pause between two attempts in seconds; the first pause is 0.1 s, and each is twice the one before."""

_OPTUNA, _PACKAGE = Path(optuna.__file__).parent, Path(__file__).parents[1]

_LOCKED = re.compile(r"locked|concurrent", re.IGNORECASE)
"""Parts of the errors that databases raise when another process writes."""

_CREATED = re.compile(r"already exists|duplicate|unique", re.IGNORECASE)
"""Parts of the errors that databases raise when two processes create the same tables at the same time. This cannot
happen with a file, because :func:`exclusive` locks it: such an error then means that the database is damaged."""


class Database(RDBStorage):
    """Optuna's storage, except that a heartbeat that cannot be written is skipped instead of raising."""

    def record_heartbeat(self, trial_id: int) -> None:
        """Record the heartbeat of a running trial."""
        with contextlib.suppress(StorageInternalError):
            super().record_heartbeat(trial_id)


def check_storage(storage: str | Path) -> str:
    """Return the storage as a string: the URL of a database, or the path of a file.

    Raises:
        StudyError: the file's directory does not exist.
    """
    text = str(storage)
    if not _is_url(text) and not os.path.isdir(os.path.dirname(os.path.abspath(text))):
        raise StudyError(f"tune: there is no directory for {text}. Make it, or give a file in a directory that exists.")
    return text


def open_database(storage: str, heartbeat: int) -> Database:
    """Open the database and create missing tables.

    Args:
        storage: what :func:`check_storage` returned.
        heartbeat: seconds between two heartbeats of a running trial.
    Raises:
        StudyError: the database cannot be reached or used, or its driver is not installed.
    """
    deadline, pause = time.monotonic() + _WAIT, 0.1
    while True:
        try:
            with exclusive(storage):
                return _open(storage, heartbeat)
        except ImportError as error:
            raise StudyError(
                f"tune: the driver of the storage {mask_argument(storage)} is not installed: {error}\n"
                "  For postgresql: pip install 'precision-assign[postgresql]'. Or give a file, which needs no driver."
            ) from error
        except Exception as error:  # whatever the driver raises
            busy = _LOCKED.search(str(error)) or (_is_url(storage) and _CREATED.search(str(error)))
            if busy and time.monotonic() < deadline:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            raise StudyError(
                f"tune: the storage {mask_argument(storage)} cannot be used: {_why(error)}\n"
                "  Give a file, or the URL of a database that can be reached: postgresql://user:password@host/name."
            ) from error


def _open(storage: str, heartbeat: int) -> Database:
    options: dict[str, Any] = {}
    if not _is_url(storage):  # opened by its path: in a URL some characters have another meaning

        def connect() -> sqlite3.Connection:
            return sqlite3.connect(storage, timeout=_WAIT, check_same_thread=False)

        options["engine_kwargs"] = {"creator": connect}
    found = Database(
        storage if _is_url(storage) else "sqlite:///study",
        heartbeat_interval=heartbeat,
        grace_period=2 * heartbeat,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
        **options,
    )
    if found.engine.dialect.name == "sqlite":
        _lock_before_reading(found)
    return found


def _lock_before_reading(database: Database) -> None:
    """Make each transaction take SQLite's write lock when it begins.

    SQLite ignores ``SELECT … FOR UPDATE``, which Optuna uses to claim a trial: two processes could read the same
    waiting trial, and both would train it.
    """
    from sqlalchemy import event  # imported here because it is slow; it comes with Optuna

    def begin(connection: Any) -> None:
        connection.connection.dbapi_connection.isolation_level = None  # Python starts no transactions itself
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    database.engine.dispose()
    event.listen(database.engine, "begin", begin)


@contextlib.contextmanager
def exclusive(storage: str) -> Iterator[None]:
    """Hold a lock in the context that only one process of this machine can hold for files of the same directory.

    A database with a URL has its own locks, so nothing is locked for it; neither on systems without ``fcntl``.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    if _is_url(storage):
        yield
        return
    directory = os.open(os.path.dirname(os.path.abspath(storage)), os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without such locks
            fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


@contextlib.contextmanager
def explained(storage: str) -> Iterator[None]:
    """Convert errors of a database that cannot be read or written, and Optuna's own errors about it, to StudyError.

    Raises:
        StudyError: the database cannot be read or written.
    """
    try:
        yield
    except Exception as error:
        if not _is_of_storage(error):
            raise
        raise StudyError(
            f"tune: the storage {mask_argument(storage)} cannot be read or written any more: {_why(error)}\n"
            "  Allowed: an undamaged database that can be written to, on a disk with free space.\n"
            "  Free some space, or make the database available. Then run the same command again to resume; the trials "
            "that are done are kept. If the database is damaged, give another --storage."
        ) from error


def _is_url(storage: str) -> bool:
    return "://" in storage


def _is_of_storage(error: BaseException) -> bool:
    """Whether an error comes from the database, or from Optuna about rows that it cannot read."""
    from sqlalchemy.exc import SQLAlchemyError

    if isinstance(error, StorageInternalError | SQLAlchemyError | sqlite3.Error):
        return True
    folders = (Path(frame.filename).parents for frame in reversed(traceback.extract_tb(error.__traceback__)))
    innermost = next((each for each in folders if _OPTUNA in each or _PACKAGE in each), ())
    return _OPTUNA in innermost and not isinstance(error, AssignError)


def _why(error: BaseException) -> str:
    """Return the first line of the database's own error message."""
    chain: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in chain:
        chain.append(each)
        each = each.__cause__ or each.__context__
    cause = next((e for e in reversed(chain) if isinstance(e, sqlite3.Error)), None) or next(
        (e for e in reversed(chain) if type(e).__module__.startswith(("sqlalchemy", "psycopg"))), error
    )
    return mask_text((str(cause).splitlines() or [type(cause).__name__])[0])
