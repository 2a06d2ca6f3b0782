"""Read JSON files strictly: a pydantic schema checks each file, and errors say where it is wrong and what is allowed.

A file is refused if it is too large or nested too deeply, or has a duplicate key, a number that is not finite or out of
range, or a string that UTF-8 cannot encode.
"""

import errno
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from assign.atomic_write import is_stdout, write_whole
from assign.errors import AssignError

MOST_BYTES = 2**26
"""Largest size of a file. The noise of 4,000 tensors in four formats on 8 batches takes 8 MB."""

MOST_LEVELS = 64
"""Deepest nesting of lists and objects; files of this package have at most 8 levels."""

LARGEST_WHOLE = 2**64
"""Whole numbers n must satisfy -LARGEST_WHOLE <= n < LARGEST_WHOLE, the range of torch's seeds."""

LARGEST = 1e150
"""Largest magnitude of a float: its square, and sums and deviations of such numbers, are finite."""

MOST_ELEMENTS = 2**53
"""Largest number of elements or bytes: a float64, and so JavaScript, represents it exactly."""

Count = Annotated[int, Field(ge=0, le=MOST_ELEMENTS)]
Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]

_NAMED = 3  # facts named in an error before "and n more"
_LONGEST = 100  # characters of a file that an error quotes

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of file.

    Attributes:
        name: name of the kind in errors, e.g. ``plan``.
        error: class of the errors.
        advice: what to do if a file is not of this kind.
    """

    name: str
    error: type[AssignError]
    advice: str

    def read(self, path: str | os.PathLike[str]) -> str:
        """Return the text of a file, decoded as UTF-8.

        Raises:
            AssignError: the file is missing, cannot be read, is too large, or is not UTF-8.
        """
        where = shown(os.fspath(path))
        try:
            with open(path, "rb") as file:
                content = file.read(MOST_BYTES + 1)
            if len(content) > MOST_BYTES:
                raise self.error(
                    f"{where} is not a {self.name}: it is larger than {MOST_BYTES >> 20} MiB, the largest size "
                    f"that is read. {self.advice}"
                )
            return content.decode("utf-8-sig")
        except FileNotFoundError:
            raise self.error(f"there is no {self.name} {where}. {self.advice}") from None
        except IsADirectoryError:
            raise self.error(f"{where} is a directory, not a {self.name}. {self.advice}") from None
        except UnicodeDecodeError:
            raise self.error(f"{where} is not a {self.name}: it is not text in UTF-8. {self.advice}") from None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = getattr(error, "strerror", None) or error
            raise self.error(f"cannot read the {self.name} {where}: {reason}. {self.advice}") from error

    def parse(self, text: str, where: str) -> Any:
        """Return the data in JSON text, after applying the limits of this module.

        Raises:
            AssignError: the text is not JSON or exceeds a limit.
        """

        def refuse(what: str) -> AssignError:
            return self.error(f"{where} is not a {self.name}: {what}. {self.advice}")

        try:
            data = json.loads(text, **_hooks(refuse))
        except json.JSONDecodeError as error:
            raise self.error(
                f"{where} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}, "
                f"of {len(text.splitlines())} lines. A truncated file has this error. {self.advice}"
            ) from None
        except RecursionError:
            raise refuse(f"its lists and objects are nested deeper than {MOST_LEVELS} levels") from None
        _check_levels(data, refuse)
        return data

    def validate(self, schema: TypeAdapter[T], text: str, where: str) -> T:
        """Validate text that :meth:`parse` has accepted, and return the object that the schema makes of it.

        Raises:
            AssignError: the data does not match the schema; names the places and what is allowed there.
        """
        try:
            return schema.validate_json(text, strict=True)
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False)
            lines = [
                f"{place(fact['loc'])}: {shown(fact['msg'].removeprefix('Value error, '))}" for fact in found[:_NAMED]
            ]
            if len(found) > _NAMED:
                lines.append(f"and {len(found) - _NAMED} more")
            raise self.error(f"{where} is not a valid {self.name}:\n  " + "\n  ".join([*lines, self.advice])) from None
        except AssignError as error:  # an object of the file refuses its own values
            raise self.error(f"{where} is not a valid {self.name}:\n  {error}") from error

    def load(self, schema: TypeAdapter[T], text: str, where: str) -> T:
        """Apply :meth:`parse`, then :meth:`validate`, and return the object."""
        self.parse(text, where)
        return self.validate(schema, text, where)

    def write(self, path: str | os.PathLike[str], text: str) -> None:
        """Write a file atomically.

        Raises:
            AssignError: the file cannot be written.
        """
        try:
            write_whole(path, text)
        except OSError as error:
            raise self.unwritable(path, error) from error

    def unwritable(self, path: str | os.PathLike[str], error: OSError) -> AssignError:
        """Return the error for a file that cannot be written."""
        if error.errno == errno.EPIPE and is_stdout(path):
            return self.error(f"cannot write the {self.name} to standard output: the process that read it has ended.")
        return self.error(
            f"cannot write the {self.name} {path}: {error.strerror or error}. "
            "Give a regular file in a directory that exists and that you may write to."
        )


def twice(values: Iterable[T]) -> T | None:
    """Return the first value that occurs a second time, or None."""
    seen = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None


def place(names: Iterable[str | int]) -> str:
    """Return a place in a file as text for an error message: ``tensors → fc.weight``."""
    return " → ".join(shown(str(name)) for name in names) or "the file"


def shown(text: str) -> str:
    """Return text from a file, shortened for an error message."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text):,} characters)"


def _hooks(refuse: Callable[[str], AssignError]) -> dict[str, Any]:
    """Return the hooks that ``json.loads`` calls for objects and numbers."""

    def unique(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise refuse(f"it has the key {shown(repr(twice(name for name, _ in pairs)))} twice; keep one of the two")
        return found

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise refuse(f"it holds the number {shown(number)}, and only finite ones are allowed")
        if abs(value) > LARGEST:
            raise refuse(f"it holds the number {shown(number)}, and only numbers up to ±{LARGEST:g} are allowed")
        return value

    def whole(number: str) -> int:
        if len(number) <= 21 and -LARGEST_WHOLE <= (value := int(number)) < LARGEST_WHOLE:
            return value
        raise refuse(f"it holds the number {shown(number)}, and only whole numbers up to ±2**64 are allowed")

    return {"object_pairs_hook": unique, "parse_constant": finite, "parse_float": finite, "parse_int": whole}


_SURROGATE = re.compile("[\ud800-\udfff]")


def _check_levels(data: Any, refuse: Callable[[str], AssignError]) -> None:
    r"""Refuse data nested too deeply, and lone surrogates (``\ud800``), which UTF-8 cannot encode."""
    level = [data]
    for _ in range(MOST_LEVELS):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value.keys()
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str) and not value.isascii() and _SURROGATE.search(value):
                raise refuse(f"it holds the text {shown(ascii(value))}, which contains half of a surrogate pair")
        if not below:
            return
        level = below
    raise refuse(f"its lists and objects are nested deeper than {MOST_LEVELS} levels")
