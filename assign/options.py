"""Describe options once: fields of frozen dataclasses, which Python users build and the shell offers as options.

A field's help in the shell is its entry under ``Attributes:`` in the docstring of its class. :func:`option` adds what
only the shell needs, and the keyword that the field replaced in the previous version.
"""

import dataclasses
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from assign.errors import AssignError

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Shell:
    """What the shell needs to know about a field.

    Attributes:
        flags: names of the option. Default: made from the field's name.
        type: type of the option's value. Default: the field's annotation.
        metavar: name of the value in the help.
        minimum: smallest allowed value.
        hidden: whether the shell does not offer the field.
        former: keywords of the previous version that the field replaces. Default: the field's name.
    """

    flags: tuple[str, ...] = ()
    type: Any = None
    metavar: str | None = None
    minimum: int | None = None
    hidden: bool = False
    former: tuple[str, ...] = ()


def option(*flags: str, **more: Any) -> dict[str, Shell]:
    """Return the metadata of a field, for ``dataclasses.field(metadata=…)``; the arguments are those of Shell."""
    return {"shell": Shell(flags=flags, **more)}


def shell_of(field: "dataclasses.Field[Any]") -> Shell:
    """Return the metadata that :func:`option` gave a field."""
    found: Shell = field.metadata.get("shell", Shell())
    return found


def nested(field: "dataclasses.Field[Any]") -> Any:
    """Return the dataclass of the object that a field holds, or None if it holds another value."""
    made = field.default_factory
    return made if isinstance(made, type) and dataclasses.is_dataclass(made) else None


def help_of(options: type) -> dict[str, str]:
    """Return the help of every field: its entry under ``Attributes:``, without code markup.

    A field that the class inherits is described in the class that declares it.
    """
    found: dict[str, str] = {}
    for declared in reversed(options.__mro__):
        found |= _help_of_own(declared)
    return found


def _help_of_own(options: type) -> dict[str, str]:
    text = inspect.cleandoc(options.__doc__ or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if line and not line.startswith("    "):
            break
        if start := re.match(r"    (\w+): ", line):
            name = start[1]
            found[name] = line[start.end() :]
        elif name and line.strip():
            found[name] += " " + line.strip()
    return {name: words.replace("``", "") for name, words in found.items()}


def accept_former(*replaced: str, **groups: type) -> Callable[[_F], _F]:
    """Return a decorator that keeps keywords which moved into an object for one version, with a FutureWarning.

    Args:
        replaced: keywords of the previous version that have no effect any more, because a Step contains their values.
        groups: parameter of the function → dataclass whose fields were parameters before.
    Returns:
        A decorator that keeps the function's signature.
    """

    def decorate(function: _F) -> _F:
        own = inspect.signature(function).parameters
        places = {name: (group, *path) for group, options in groups.items() for name, path in _paths(options)}
        former = {name: place for name, place in places.items() if name not in own}

        @functools.wraps(function)
        def call(*arguments: Any, **keywords: Any) -> Any:
            given = {name: keywords.pop(name) for name in (*former, *replaced) if name in keywords}
            if given:
                where = f"assign.{function.__name__}"
                kept = {name: value for name, value in given.items() if name not in replaced}
                keywords |= _objects(where, kept, former, groups, keywords)
                if len(kept) < len(given):
                    dropped = ", ".join(f"{name}=" for name in given if name not in kept)
                    text = f"{where}: {dropped} is not needed: give what assign.trace returned in place of the model."
                    warnings.warn(text, FutureWarning, stacklevel=2)
            return function(*arguments, **keywords)

        return cast(_F, call)

    return decorate


def _paths(options: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield every keyword that a field of a dataclass replaces, with the path of names to that field."""
    for field in dataclasses.fields(options):
        inner = nested(field)
        for name in shell_of(field).former or (field.name,):
            yield name, (field.name,)
        for name, path in _paths(inner) if inner else ():
            yield name, (field.name, *path)


def _objects(
    where: str,
    given: Mapping[str, Any],
    former: Mapping[str, tuple[str, ...]],
    groups: Mapping[str, type],
    keywords: Mapping[str, Any],
) -> dict[str, Any]:
    """Build the objects that replace former keywords.

    Raises:
        AssignError: an object and one of the keywords that it replaces are both given.
    """
    built = {}
    for group in dict.fromkeys(former[name][0] for name in given):
        paths = {former[name][1:]: value for name, value in given.items() if former[name][0] == group}
        names = ", ".join(f"{name}=" for name in given if former[name][0] == group)
        spelling = f"{group}={_spelled(groups[group], paths)}"
        other = keywords.get(group)
        if other is not None and not isinstance(other, (groups[group], str)):
            text = f"{where}: {names} has no effect together with {group}=, and will be an error in the next version."
            warnings.warn(text, FutureWarning, stacklevel=3)
            continue
        if other is not None:
            raise AssignError(
                f"{where}: {group}= and {names} are both given.\n"
                f"  Allowed: one object with all of them.\n  Write {spelling}."
            )
        text = f"{where}: {names} will be removed in the next version. Write {spelling}."
        warnings.warn(text, FutureWarning, stacklevel=3)
        built[group] = _built(groups[group], paths)
    return built


def _inner(options: Any, paths: Mapping[tuple[str, ...], Any]) -> dict[str, tuple[Any, dict[tuple[str, ...], Any]]]:
    """Return the parts of ``paths`` that lead into a nested object, by the name of its field."""
    found: dict[str, tuple[Any, dict[tuple[str, ...], Any]]] = {}
    for path, value in paths.items():
        if len(path) > 1:
            kind = nested(options.__dataclass_fields__[path[0]])
            found.setdefault(path[0], (kind, {}))[1][path[1:]] = value
    return found


def _built(options: Any, paths: Mapping[tuple[str, ...], Any]) -> Any:
    own = {path[0]: value for path, value in paths.items() if len(path) == 1}
    return options(**own, **{name: _built(kind, each) for name, (kind, each) in _inner(options, paths).items()})


def _spelled(options: Any, paths: Mapping[tuple[str, ...], Any]) -> str:
    own = [f"{path[0]}=…" for path in paths if len(path) == 1]
    own += [f"{name}={_spelled(kind, each)}" for name, (kind, each) in _inner(options, paths).items()]
    return f"{options.__name__}({', '.join(own)})"
