"""Register functions as torch operators that graphs keep as one node."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import library

from assign import _torch


def register(
    name: str, function: Callable[..., Any], fake: Callable[..., Any], mutates: str = "", draws: bool = False
) -> None:
    """Register ``function`` as the operator ``assign::name``, on every device.

    Args:
        name: without the namespace.
        function: annotated as torch's ``infer_schema`` requires.
        fake: returns the result without data; called with the same arguments, by name.
        mutates: name of the argument that it writes to.
        draws: whether it draws from torch's generator.
    """
    schema = _torch.schema_of(function, (mutates,) if mutates else ())
    tags = [torch.Tag.flexible_layout, *([torch.Tag.nondeterministic_seeded] if draws else [])]
    library.define(f"assign::{name}", schema, tags=tags)
    library.impl(f"assign::{name}", "CompositeExplicitAutograd", function)
    names = inspect.signature(function)
    library.register_fake(f"assign::{name}", lambda *args, **kwargs: fake(**names.bind(*args, **kwargs).arguments))
