"""One entry of a plan."""

from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, slots=True)
class Entry:
    """What one tensor is given: the name of its format, and whether that is its recipe's low candidate."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    format: str
    low: bool
