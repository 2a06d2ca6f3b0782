"""Load a :class:`Task` from its name on the command line."""

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from assign.errors import AssignError, TaskError, suggest
from assign.tasks.builtin import BUILTIN
from assign.tasks.task import Task, TaskOptions

_SIGNATURE = (
    "It must return an assign.Task:\n"
    "  def task() -> assign.Task:\n"
    "      return assign.Task(model=..., loss=..., train=..., evaluate=..., optimizer=..., epochs=...)"
)
_OPTIONS = tuple(field.name for field in dataclasses.fields(TaskOptions))
_FOR_EVERY_TASK = ("seed", "device", "epochs")
"""Options that training itself uses, so that a user's function need not take them."""


def load_task(spec: str, options: TaskOptions | None = None) -> Task:
    """Return the task that ``spec`` names.

    Args:
        spec: a built-in name, ``path/to/file.py:function`` or ``package.module:function``; ``path/to/file.py`` alone
            means its function ``task``. The function takes no argument, or any of the options by their names.
        options: the shell's options of the task.
    Raises:
        TaskError: there is no such name, file or function, or it does not return a task.
    """
    options = options or TaskOptions()
    torch.manual_seed(options.seed)
    if spec in BUILTIN:
        return BUILTIN[spec](options)
    target, _, function = spec.rpartition(":") if ":" in spec else (spec, "", "")
    is_file = target.endswith(".py") or "/" in target or os.path.isfile(target.replace("\0", ""))
    if not is_file and not function:
        near = suggest(spec, BUILTIN)
        raise TaskError(
            f"there is no task {spec!r}{f', did you mean {near}' if near else ''}. "
            f"Built-in: {', '.join(BUILTIN)}. Your own: path/to/file.py:function or package.module:function."
        )
    path = _checked(Path(target)) if is_file else Path(target)
    with _import_path(path.resolve().parent if is_file else Path.cwd()):
        module = _import_file(path) if is_file else _import_module(target)
        make = _find_function(module, target, function)
        task = _call(make, f"{target}:{function or 'task'}", options)
    return dataclasses.replace(task, name=task.name or spec, epochs=options.epochs or task.epochs)


def _checked(path: Path) -> Path:
    """Return the path after checking that the system accepts it.

    Raises:
        TaskError: the name is too long, contains a NUL, or is a loop of links.
    """
    try:
        path.stat()
    except FileNotFoundError:
        return path
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise TaskError(
            f"the task file {str(path)[:200]!r} cannot be read: {why}.\n"
            f"  Give path/to/file.py:function, or a built-in task: {', '.join(BUILTIN)}."
        ) from error
    return path


@contextlib.contextmanager
def _import_path(directory: Path) -> Iterator[None]:
    """Let the user's code import modules next to it in the context, as if the file was run."""
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(directory))


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        near = _nearest_files(path)
        raise TaskError(
            f"there is no task file {path}{f'; nearest: {near}' if near else ''}. "
            f"Give path/to/file.py:function, or a built-in task: {', '.join(BUILTIN)}."
        )
    name = f"assign_task_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise TaskError(f"{path} is not a Python file. Give path/to/file.py:function.")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickle look up the module of a class there
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _broken(f"importing {path}", error) from error
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _broken(f"importing {name}", error) from error
        raise TaskError(
            f"there is no module {error.name!r} to import the task {name!r} from. Install it, or run where it can be "
            f"imported; for a file give path/to/file.py:function. Built-in tasks: {', '.join(BUILTIN)}."
        ) from error
    except (Exception, SystemExit) as error:
        raise _broken(f"importing {name}", error) from error


def _find_function(module: ModuleType, target: str, name: str) -> Callable[..., Any]:
    functions = [
        key
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
    ]
    found = vars(module).get(name or "task")
    if found is None:
        there = f"Its functions: {', '.join(functions)}." if functions else "It has no functions."
        if not name:
            example = functions[0] if functions else "function"
            raise TaskError(
                f"{target}: name the function that makes the task, {target}:{example}. Without a name, 'task' is "
                f"called, but it does not exist. {there}"
            )
        near = suggest(name, functions)
        raise TaskError(f"{target} has no function {name!r}{f', did you mean {near}' if near else ''}. {there}")
    if not inspect.isfunction(found) and not callable(found):
        what = "a Task; wrap it in a function" if isinstance(found, Task) else f"a {type(found).__name__}"
        raise TaskError(f"{target}:{name or 'task'} is not a function but {what}. {_SIGNATURE}")
    result: Callable[..., Any] = found
    return result


def _call(make: Callable[..., Any], where: str, options: TaskOptions) -> Task:
    arguments = _arguments(make, where, options)
    try:
        task = make(**arguments)
    except AssignError as error:
        error.add_note(f"raised by {where}")
        raise
    except (Exception, SystemExit) as error:
        raise _broken(where, error) from error
    if not isinstance(task, Task):
        raise TaskError(f"{where} returned a {type(task).__name__}. {_SIGNATURE}")
    return task


def _arguments(make: Callable[..., Any], where: str, options: TaskOptions) -> dict[str, Any]:
    """Return the options that the function takes. An option that is given and has no effect is an error."""
    parameters = inspect.signature(make).parameters.values()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    strange = [name for name in needed if name not in _OPTIONS]
    if strange:
        raise TaskError(
            f"{where} needs {', '.join(strange)}, which assign does not pass. "
            f"A task's function may take {', '.join(_OPTIONS)}; give other parameters a default."
        )
    given = {name: getattr(options, name) for name in _OPTIONS}
    for name, value in given.items():
        if value is not None and name not in (*named, *_FOR_EVERY_TASK) and not takes_all:
            raise TaskError(f"{where} takes no {name}, but {name}={value} was given. Add a parameter {name} to it.")
    missing = [name for name in needed if given[name] is None]
    if missing:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise TaskError(f"{where} needs {', '.join(missing)}: give {flags}, or give the parameter a default.")
    return {name: value for name, value in given.items() if value is not None and (takes_all or name in named)}


def _broken(where: str, error: BaseException) -> TaskError:
    """Return the error for an exception in the user's code, with its last line there."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    at = f"\n  at: {frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line}" if frames else ""
    return TaskError(f"{where} raised {type(error).__name__}: {error}{at}")


def _nearest_files(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    return suggest(path.name, (file.name for file in path.parent.glob("*.py")))
