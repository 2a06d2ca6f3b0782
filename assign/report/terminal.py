"""The one way to the terminal: text is shown as it is, whatever file or model it comes from.

Names of tensors, recipes and tasks come from files of strangers. A terminal would obey the escape sequences in them,
and rich the markup. Here markup is off, and characters that a terminal does not show are written out: ``\\x1b``.
"""

import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.status import Status
from rich.text import Text

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Unicode categories of what is not shown: controls, marks that turn the direction of text, half characters."""

_ALLOWED = "\n\t"


def visible(text: str) -> str:
    """The text with every character written out that a terminal would obey or hide.

    Examples:
        >>> visible("a\\x1b[31m\\u202eb")
        'a\\\\x1b[31m\\\\u202eb'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        repr(character)[1:-1] if character not in _ALLOWED and unicodedata.category(character) in _HIDDEN else character
        for character in text
    )


class Terminal(Console):
    """A console without markup, on which all text is :func:`visible`.

    Args:
        options: as of ``rich.console.Console``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text as rich's own; every string in a table comes here."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is shown of anything; text that did not come as a string is made visible here."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    def status(self, status: RenderableType, **options: Any) -> Status:
        """A line that turns while something is done; rich would read markup in a string."""
        return super().status(Text(visible(status)) if isinstance(status, str) else status, **options)
