"""Configuration of the documentation site. Build it with ``sphinx-build -W --keep-going docs site``."""

import enum
import pkgutil
import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import typer.cli
import typer.core
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from typer.main import get_command

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from assign import __version__  # noqa: E402
from assign.cli import app as command_line  # noqa: E402

logger = logging.getLogger("assign")

project = "assign"
author = "the assign developers"
release = version = __version__
language = "en"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["**/.ipynb_checkpoints"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # a test runs the notebooks; the site shows the outputs that are stored in them
nb_mime_priority_overrides = [("html", "text/html", 5), ("html", "text/plain", 10)]

html_theme = "furo"
html_title = "assign"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_class_signature = "mixed"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 78
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Source", "notes_style")]

INCLUDED = {"index": "README.md", "contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}
"""Pages whose text is a file in the root of the repository, with links as that folder needs them."""

FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.S | re.M)
ROLE = re.compile(r":(func|class|meth|mod):`([\w.]+)`")
SOURCE = re.compile(r"^Source: (.*(?:\n .*)*)", re.M)
SECTION = re.compile(r"^(Args|Attributes|Examples|Raises|Returns|Source|Yields):", re.M)


def include_pages(_app: Sphinx, name: str, source: list[str]) -> None:
    """Fill in the pages whose text has another home: files of the root, and the help of the commands."""
    if name in INCLUDED:
        text = (ROOT / INCLUDED[name]).read_text()
        for target, page in [("CONTRIBUTING.md", "contributing.md"), ("CHANGELOG.md", "changelog.md")]:
            text = text.replace(f"]({target})", f"]({page})")
        text = text.replace("](docs/", "](").replace("](benchmarks/", "](../benchmarks/")
        source[0] = f"{text}\n{source[0]}"
    elif name == "reference/commands":
        source[0] += commands()


def commands() -> str:
    """Return the help of every command in Markdown, by typer's own writer."""
    group = get_command(command_line)
    assert isinstance(group, typer.core.TyperGroup)
    with typer.Context(group, info_name="assign") as context:
        pages = [
            typer.cli.get_docs_for_click(obj=each, ctx=context, indent=1, call_prefix="assign")
            for each in group.commands.values()
        ]
    return "\n".join([f"\n{group.help}\n", *pages])


def to_restructured_text(_app: Sphinx, _what: str, name: str, thing: Any, _options: Any, lines: list[str]) -> None:
    """Rewrite a docstring for napoleon: separate sections, fences as code blocks, the values of an enumeration."""
    text = FENCE.sub(lambda found: _code_block(*found.groups()), "\n".join(lines))
    text = ROLE.sub(lambda found: _absolute(found, thing, name), text)
    text = SECTION.sub(r"\n\1:", text)
    text = re.sub(
        r"^Source: (.*(?:\n .*)*)", lambda found: "Source:\n    " + " ".join(found[1].split()), text, flags=re.M
    )
    if isinstance(thing, type) and issubclass(thing, enum.StrEnum):
        text += "\n\nOne of " + ", ".join(f"``{each.value}``" for each in thing) + "."
    lines[:] = text.splitlines()


def shorten_signature(
    _app: Sphinx, _what: str, _name: str, _thing: Any, _options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Write a default that a dataclass makes anew as ``...``, so that the signature can be parsed."""
    return signature and signature.replace("<factory>", "..."), returned


def _code_block(indent: str, language: str, body: str) -> str:
    code = textwrap.indent(textwrap.dedent(body), f"{indent}    ")
    return f"{indent}.. code-block:: {language}\n\n{code}\n"


def _absolute(role: re.Match[str], thing: Any, name: str) -> str:
    """Give a role the full path of its object, which a docstring names as its own module or class sees it."""
    module, within = getattr(thing, "__module__", ""), getattr(thing, "__qualname__", "")
    for place in ("", module, f"{module}.{within}", f"{module}.{within}".rpartition(".")[0], name.rpartition(".")[0]):
        try:
            path = _path(pkgutil.resolve_name(f"{place}.{role[2]}".lstrip(".")))
        except (ImportError, AttributeError, ValueError):
            continue
        return f":{role[1]}:`{role[2]} <{path or role[2]}>`"
    logger.warning("%s: there is no %r", name, role[2])
    return f"``{role[2]}``"


def _path(thing: Any) -> str:
    """Return the path of an object from the module that defines it; '' if it does not know that module."""
    if isinstance(thing, ModuleType):
        return thing.__name__
    parts = getattr(thing, "__module__", None), getattr(thing, "__qualname__", None)
    return ".".join(parts) if all(isinstance(each, str) for each in parts) else ""


def resolve_reference(app: Sphinx, env: Any, node: Any, content: nodes.Element) -> nodes.Element | None:
    """Link an object that is documented under another path than the one that defines it, and errors by their name."""
    if node.get("refdomain") != "py":
        return None
    documented = {_path(pkgutil.resolve_name(name)): name for name in _described(env)}
    target = node["reftarget"]
    name = documented.get(target) or documented.get(f"assign.errors.{target}")
    if name is None:
        return content
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, content)


def _described(env: Any) -> list[str]:
    return [
        name
        for name, each in env.get_domain("py").objects.items()
        if each.objtype in ("class", "function", "exception")
    ]


def setup(app: Sphinx) -> None:
    """Connect the functions above."""
    app.connect("source-read", include_pages)
    app.connect("autodoc-process-docstring", to_restructured_text, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("missing-reference", resolve_reference)
