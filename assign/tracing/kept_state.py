"""Restore all state that running the code of a step changes, apart from its result."""

import contextlib
import copy
import random
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

_CONTAINERS = (dict, OrderedDict, list, set)  # container types of libraries may reject changes


@contextlib.contextmanager
def kept_state(model: nn.Module) -> Iterator[None]:
    """Restore a model and the random generators on exit: a step in several pieces really runs while it is traced."""
    attributes = [vars(module) for module in model.modules()]
    containers = [x for each in attributes for x in each.values() if type(x) in _CONTAINERS]
    before = [(each, copy.copy(each)) for each in (*attributes, *containers)]
    buffers = [(m, name, buffer) for m in model.modules() for name, buffer in m.named_buffers(recurse=False)]
    values = [buffer.clone() for _, _, buffer in buffers]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for container, content in before:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)
        for (module, name, buffer), value in zip(buffers, values, strict=True):
            setattr(module, name, buffer)
            if not buffer.is_meta and (buffer.layout != torch.strided or not torch.equal(buffer, value)):
                buffer.copy_(value)
