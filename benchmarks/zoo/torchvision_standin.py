"""An empty ``torchvision`` where there is none.

timm imports torchvision for the image transforms of ``timm.data`` and for one class that its models are compared with,
never to compute: a CPU build of torch that no torchvision wheel fits can therefore run all of its models without it.
"""

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

_MODULES = (
    "ops", "ops.misc", "models", "models.feature_extraction", "transforms", "transforms.functional", "transforms.v2",
    "transforms.v2.functional", "datasets", "utils", "io",
)  # fmt: skip


class _Names(type):
    """Of a class: any name is an attribute whose value is that name, as of an enumeration."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("_"):
            raise AttributeError(name)
        return name


class _Empty(types.ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Names(name, (), {})


def install() -> None:
    """Put the empty modules into ``sys.modules`` if torchvision is missing."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return
    for name in ("torchvision", *(f"torchvision.{each}" for each in _MODULES)):
        module = _Empty(name)
        module.__path__ = []
        module.__version__ = "0.0.0"
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)
