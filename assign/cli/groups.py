"""Turn groups of options, declared as dataclasses, into options of a command."""

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, cast

import typer

from assign.options import Shell, help_of, nested, shell_of

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Without:
    """Annotation of a group: fields that the command does not offer, which keep their defaults."""

    names: tuple[str, ...]


def without(*names: str) -> Without:
    """Return the annotation for a group whose fields ``names`` are not options of the command."""
    return Without(names)


@dataclass(frozen=True, slots=True)
class Former:
    """Annotation of a group whose options still work, but are not shown in the help of the command."""


def expand_groups(command: _F) -> _F:
    """Replace each parameter of a command that is a dataclass by one option per field.

    The command is called with the objects, built from the values of the options. A field that two groups share is one
    option, and its value goes into both. Names, types and defaults are those of the fields; the help is the docstring
    of the dataclass.
    """
    signature = inspect.signature(command, eval_str=True)
    groups = {
        name: _Group.of(parameter.annotation)
        for name, parameter in signature.parameters.items()
        if _class_of(parameter.annotation) is not None
    }
    parameters: dict[str, inspect.Parameter] = {}
    for name, parameter in signature.parameters.items():
        own = [parameter] if name not in groups else _options(groups[name].options, groups[name])
        for each in own:
            known = parameters.get(each.name, each)
            assert known.default == each.default, f"two options {each.name} with different defaults"
            parameters.setdefault(each.name, each.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def call(**values: Any) -> Any:
        objects = {name: _build(group.options, group, values) for name, group in groups.items()}
        plain = {name: value for name, value in values.items() if name in signature.parameters}
        return command(**{**plain, **objects})

    call.__signature__ = signature.replace(parameters=[*parameters.values()])  # type: ignore[attr-defined]  # not declared, but typer reads it
    call.__annotations__ = {name: each.annotation for name, each in parameters.items()}
    return cast(_F, call)


def _class_of(annotation: Any) -> Any:
    """Return the dataclass of a group, or None."""
    plain = typing.get_args(annotation)[0] if typing.get_origin(annotation) is Annotated else annotation
    return plain if dataclasses.is_dataclass(plain) else None


@dataclass(frozen=True, slots=True)
class _Group:
    """A parameter of a command that stands for several options."""

    options: Any
    skipped: frozenset[str]
    hidden: bool

    @classmethod
    def of(cls, annotation: Any) -> "_Group":
        more = typing.get_args(annotation)[1:] if typing.get_origin(annotation) is Annotated else ()
        skipped = frozenset(name for each in more if isinstance(each, Without) for name in each.names)
        return cls(_class_of(annotation), skipped, any(isinstance(each, Former) for each in more))


def _fields(options: Any, group: _Group) -> "list[dataclasses.Field[Any]]":
    return [f for f in dataclasses.fields(options) if f.name not in group.skipped and not shell_of(f).hidden]


def _build(options: Any, group: _Group, values: Mapping[str, Any]) -> Any:
    """Build the object of a group, and those in it; an option that is left out keeps the field's default."""
    made = {}
    for field in _fields(options, group):
        if inner := nested(field):
            made[field.name] = _build(inner, group, values)
        elif values[field.name] is not None:
            made[field.name] = values[field.name]
    return options(**made)


def _options(options: Any, group: _Group) -> Iterator[inspect.Parameter]:
    words, hints = help_of(options), typing.get_type_hints(options)
    for field in _fields(options, group):
        if inner := nested(field):
            yield from _options(inner, group)
            continue
        shell = shell_of(field)
        info = typer.Option(
            *shell.flags,
            help=words.get(field.name),  # none if docstrings are stripped
            metavar=shell.metavar,
            min=shell.minimum,
            hidden=group.hidden,
        )
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_default(field),
            annotation=Annotated[_value_type(shell, hints[field.name], field), info],
        )


def _value_type(shell: Shell, hint: Any, field: "dataclasses.Field[Any]") -> Any:
    """Return the type of the option's value: that of the field, or optional if the default is not such a value."""
    value = shell.type or hint
    if _default(field) is None and not isinstance(value, types.UnionType):
        return value | None
    return value


def _default(field: "dataclasses.Field[Any]") -> Any:
    """Return the default of an option: None if the field's default is empty or made by a factory."""
    return None if field.default is dataclasses.MISSING or field.default == () else field.default
