r"""Print to the terminal: text from files and models is shown literally.

Names of tensors, recipes and tasks may come from untrusted files. A terminal would execute escape sequences in them,
and rich would interpret markup. Here markup is off, and control characters are printed as escapes, e.g. ``\x1b``.
"""

import unicodedata
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.status import Status
from rich.text import Text

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Unicode categories printed as escapes: control and format characters, surrogates, private use, line separators."""

_ALLOWED = "\n\t"


def visible(text: str) -> str:
    r"""Return the text with control and invisible characters replaced by their escapes.

    Examples:
        >>> visible("a\x1b[31m\u202eb")
        'a\\x1b[31m\\u202eb'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        repr(character)[1:-1] if character not in _ALLOWED and unicodedata.category(character) in _HIDDEN else character
        for character in text
    )


class Terminal(Console):
    """A rich console without markup that passes all text through :func:`visible`.

    Args:
        options: as for ``rich.console.Console``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert a string, such as a table cell, to a rich Text."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render anything; text inside rich objects passes through :func:`visible` here."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    def status(self, status: RenderableType, **options: Any) -> Status:
        """Show a spinner with a message. The message is a Text, because rich interprets markup in a string."""
        return super().status(Text(visible(status)) if isinstance(status, str) else status, **options)
