"""Find the module and the line of the user's code that is running."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from assign import _torch

Frames = tuple[tuple[str, int, str], ...]
"""File, line and function of each frame, innermost last."""


class UserCode:
    """Follows the modules of a model that run.

    A module that does not belong to the model counts as part of the module that calls it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._paths: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self._paths.setdefault(id(module), []).append(name)
        self._stack: list[str | None] = []

    @property
    def module(self) -> str | None:
        """Return the path of the module that runs; None outside the model."""
        return self._stack[-1] if self._stack else None

    def _path(self, module: nn.Module) -> str | None:
        """Return the path of a called module; if layers share it, its path in the calling module."""
        names = self._paths.get(id(module))
        if names is None:
            return self.module
        caller = f"{self.module}." if self.module else ""
        inside = [name for name in names if name.startswith(caller)]
        return min(inside, key=lambda name: name.count(".")) if inside else names[0]

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Within the context, follow the modules that run."""

        def enter(module: nn.Module, _args: Any) -> None:
            self._stack.append(self._path(module))

        def leave(_module: nn.Module, _args: Any, _result: Any) -> None:
            if self._stack:
                self._stack.pop()

        hooks = nn.modules.module
        handles = [
            hooks.register_module_forward_pre_hook(enter),
            hooks.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def frames() -> Frames:
    """Return the two innermost frames outside torch and this package."""
    found: list[tuple[str, int, str]] = []
    frame: Any = sys._getframe(1)
    while frame is not None and len(found) < 2:
        if not frame.f_code.co_filename.startswith(_torch.OWN_FILES):
            found.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return tuple(reversed(found))


def place() -> str:
    """Return ``file:line`` of the innermost frame of the user's code."""
    own = frames()
    return f"{own[-1][0]}:{own[-1][1]}" if own else "unknown line"
