"""Run methods of a planned model other than its call under the plan, too."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from assign import _torch

_FRAMEWORKS = ("torch", "lightning", "pytorch_lightning")
"""Packages whose modules have methods for the training loop, not for the model's computation."""


def methods_of(kind: type[nn.Module]) -> Iterator[str]:
    """Yield the names of methods that compute: public, of the model's own classes, and not calling the model."""
    seen = set(dir(nn.Module))
    for each in kind.__mro__:
        own = issubclass(each, nn.Module) and each.__module__.partition(".")[0] not in _FRAMEWORKS
        for name, function in vars(each).items() if own else ():
            if name not in seen and not name.startswith("_") and isinstance(function, FunctionType):
                seen.add(name)
                if not _calls_itself(function):
                    yield name


def planned_method(
    name: str, plain: Callable[[nn.Module], nn.Module], compiled: Callable[[], Callable[..., Any]]
) -> Callable[..., Any]:
    """Return the method ``name`` of a planned model: under the plan if an argument is a tensor, else the plain method.

    Args:
        name: name of the method, which the plain model has too.
        plain: returns the model without the plan.
        compiled: makes the method under the plan, as a function of the planned model and the arguments.
    Returns:
        A function for the body of the planned model's class.
    """

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(leaf, Tensor) for leaf in _torch.pytree.tree_leaves((args, kwargs))):
            return compiled()(self, *args, **kwargs)
        return getattr(plain(self), name)(*args, **kwargs)

    method.__name__ = name
    return method


def _calls_itself(function: FunctionType) -> bool:
    """Whether a method calls the model (``self(x)``), which is planned already; True if its source is not available."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return True
    names = function.__code__.co_varnames
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return not names or any(isinstance(called, ast.Name) and called.id == names[0] for called in calls)
