"""One entry of a plan."""

from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, slots=True)
class Entry:
    """Name of one tensor's format, and whether it is the low candidate of the recipe."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    format: str
    low: bool
