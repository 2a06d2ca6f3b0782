"""Docstrings as ``help()`` shows them best, made into what mkdocstrings reads."""

import ast
import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod):`([\w.]+)`")
SECTION = re.compile(r"(?<!\n)\n(?=(?:Args|Attributes|Examples|Raises|Returns|Source|Yields):)")
SOURCE = re.compile(r"^Source: .*(?:\n .*)*", re.M)
logger = griffe.get_logger("docstrings")


class House(griffe.Extension):
    """Sections apart, roles and errors as links, what an enumeration can be, defaults by value and not by name."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """All objects are known by now."""
        for name, error in pkg["errors"].classes.items():  # named in docstrings of modules that import none
            if name not in pkg.members:
                pkg.set_member(name, griffe.Alias(name, error, parent=pkg))
        for each in _all(pkg):
            if isinstance(each, griffe.Function):
                for parameter in each.parameters:
                    parameter.default = _value(parameter.default, pkg)
            if each.docstring:
                text = SOURCE.sub(lambda found: re.sub(r"\n +", " ", found[0]), each.docstring.value)
                each.docstring.value = SECTION.sub("\n\n", ROLE.sub(_linker(each), text)) + _values(each)


def _all(thing: griffe.Object) -> list[griffe.Object]:
    members = [each for each in thing.members.values() if isinstance(each, griffe.Object)]  # no aliases: seen elsewhere
    return [thing, *(each for member in members for each in _all(member))]


def _linker(scope: griffe.Object) -> Any:
    """A role becomes a link, or, where the site has no place for the object, its name; one of nothing, a warning."""

    def link(found: re.Match[str]) -> str:
        name = found[1]
        try:
            path = name if name.startswith("assign.") else scope.resolve(name)
            _ = scope.package[path.removeprefix("assign.")]
        except (griffe.NameResolutionError, KeyError):
            logger.warning("%s: there is no %r", scope.path, name)
            return f"`{name}`"
        return f'<autoref optional identifier="{path}"><code>{name}</code></autoref>'

    return link


def _values(thing: griffe.Object) -> str:
    """What a ``StrEnum`` can be, in a sentence; '' for anything else."""
    if not isinstance(thing, griffe.Class) or "StrEnum" not in map(str, thing.bases):
        return ""
    values = [ast.literal_eval(str(each.value)) for each in thing.attributes.values()]
    return "\n\nOne of " + ", ".join(f"`{each}`" for each in values) + "."


def _value(default: Any, package: griffe.Module) -> Any:
    """A default; of a constant's name the constant, where that is a literal."""
    if not isinstance(default, griffe.ExprName | griffe.ExprAttribute):
        return default
    try:
        constant = package[default.canonical_path.removeprefix("assign.")]
        value = str(constant.value) if constant.is_attribute else ""
        ast.literal_eval(value)
    except (KeyError, ValueError, SyntaxError):
        return default
    return value
