"""Read the README and the pages of the documentation: their blocks of code and the commands in them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [
        README,
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "docs").glob("[!n_]*/*.md")),
    ]
}
"""Text of every page by its path from the root; the notebooks have a test of their own."""

_FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.S | re.M)
_ROW = re.compile(r"^\| `(assign [^`]+)` \|", re.M)
_NAMED = re.compile(r"# (\w+\.py)\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A block of code: its language, its text, and the line of its page at which it begins."""

    page: str
    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The name under which a reader saves the block, given in its first line; None if there is none."""
        named = _NAMED.match(self.text)
        return named and named[1]


def blocks(page: str, *languages: str) -> list[Block]:
    """Return the blocks of a page in these languages, in their order; all of them if no language is given."""
    text = PAGES[page]
    return [
        Block(page=page, language=found[1], text=found[2], line=text.count("\n", 0, found.start()) + 2)
        for found in _FENCE.finditer(text)
        if not languages or found[1] in languages
    ]


def shell_lines(page: str) -> list[str]:
    """Return every command of a page's blocks for a shell: continued lines are joined, ``&&`` separates commands."""
    lines = [line for block in blocks(page, "sh") for line in block.text.replace("\\\n", " ").splitlines()]
    return [part.strip() for line in lines for part in line.partition(" #")[0].split("&&") if part.strip()]


def commands(page: str, program: str) -> list[str]:
    """Return the commands of a page that begin with ``program``: those of its blocks, then those of its tables."""
    return [each for each in [*shell_lines(page), *_ROW.findall(PAGES[page])] if each.split()[0] == program]


def prose(page: str) -> str:
    """Return the text of a page without its blocks of code."""
    return _FENCE.sub("", PAGES[page])
