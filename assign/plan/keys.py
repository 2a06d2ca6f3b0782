"""Keys: the names of tensors in tables, plans and noise tables. Only this module makes and parses them.

The key of a weight is its name in PyTorch, ``layer1.0.conv1.weight``. The key of an activation is the path of its
module and its operator, ``layer1.0/relu``; the second such operator of the module is ``layer1.0/relu#2``. The batch is
``/input``, and activations of the loss function are in the module ``loss``. A suffix names a part of a tensor: its
gradient, its saved copy, or what is stored between steps (:class:`Part`).
"""

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

LOSS = "loss"
"""Module of the activations that the loss function computes outside of the model."""

INPUT = "/input"
"""Key of the batch's first tensor."""

_MODULE_END, _NUMBER = "/", "#"


class Part(StrEnum):
    """The part of a tensor that a key names; the value is the suffix of such a key.

    ``STATE`` is followed by the name of the optimizer's state.
    """

    TENSOR = ""
    GRADIENT = ".grad"
    SAVED = ".saved"
    MASTER = ".master"
    STORED_GRADIENT = ".grad.stored"
    STATE = ".optim."
    BUFFER = ".buffer"


_OF_WEIGHT = (Part.MASTER, Part.STORED_GRADIENT, Part.STATE)
_IN_MODEL = (Part.MASTER, Part.STORED_GRADIENT, Part.BUFFER)


@dataclass(frozen=True, slots=True)
class Key:
    """A parsed key. ``str(key)`` is its text in files.

    Attributes:
        name: of the weight, activation or buffer.
        part: the part of it that the key names.
        state: name of the optimizer's state; ``''`` for other parts.
    """

    name: str
    part: Part = Part.TENSOR
    state: str = ""

    def __str__(self) -> str:
        return f"{self.name}{self.part}{self.state}"

    @classmethod
    def of(cls, text: str, part: Part) -> Self:
        """Parse a key of a known part."""
        if part is Part.STATE:
            name, _, state = text.rpartition(part)
            return cls(name, part, state)
        return cls(text.removesuffix(part), part)

    @classmethod
    def of_step(cls, text: str) -> Self:
        """Parse the key of a tensor of the step itself: a weight, an activation, a gradient or a saved copy."""
        for part in (Part.GRADIENT, Part.SAVED):
            if text.endswith(part):
                return cls.of(text, part)
        return cls(text)

    @classmethod
    def parse(cls, text: str, tensors: Collection[str]) -> Self:
        """Parse any key of a plan.

        A module may be called ``master``, ``optim`` or ``buffer``. So a suffix for something stored counts only after
        the name of a weight in ``tensors``, and ``.buffer`` only if no such weight has a gradient.

        Args:
            text: the key as plans and tables write it.
            tensors: keys of the plan or table.
        """
        for part in _OF_WEIGHT:
            if part in text:
                key = cls.of(text, part)
                if str(key) == text and key.name in tensors and not key.is_activation:
                    return key
        if text.endswith(Part.BUFFER):
            key = cls.of(text, Part.BUFFER)
            if key.name and not key.is_activation and grad_key(text) not in tensors:
                return key
        return cls.of_step(text)

    @property
    def is_of_weight(self) -> bool:
        """Whether it is stored between steps for a weight: a master, a stored gradient or an optimizer state."""
        return self.part in _OF_WEIGHT

    @property
    def is_in_model(self) -> bool:
        """Whether it is stored between steps in the model itself: a master, a stored gradient or a buffer."""
        return self.part in _IN_MODEL

    @property
    def is_activation(self) -> bool:
        """Whether ``name`` is that of an activation."""
        return _MODULE_END in self.name

    @property
    def is_input(self) -> bool:
        """Whether ``name`` is that of a tensor of the batch."""
        return self.first == INPUT

    @property
    def is_of_loss(self) -> bool:
        """Whether ``name`` is that of an activation that the loss function computes."""
        return self.name.startswith(f"{LOSS}{_MODULE_END}")

    @property
    def module(self) -> str:
        """Path of the module that the tensor belongs to; ``''`` for the root."""
        return self.name.partition(_MODULE_END)[0] if self.is_activation else self.name.rpartition(".")[0]

    @property
    def first(self) -> str:
        """Name of the first such operator of the module: ``name`` without its number."""
        return self.name.partition(_NUMBER)[0]

    @property
    def is_repeated(self) -> bool:
        """Whether an operator of this kind ran before in the same module."""
        return _NUMBER in self.name


def activation_key(module: str, operator: str, number: int = 1) -> str:
    """Return the key of the ``number``-th activation that such an operator makes in a module."""
    stem = f"{module}{_MODULE_END}{operator}"
    return stem if number == 1 else f"{stem}{_NUMBER}{number}"


def base_key(key: str) -> str:
    """Return the key of the weight or activation that a tensor of the step belongs to."""
    return Key.of_step(key).name


def is_saved_key(key: str) -> bool:
    """Whether ``key`` is that of a saved activation."""
    return Key.of_step(key).part is Part.SAVED


def is_grad_key(key: str) -> bool:
    """Whether ``key`` is that of a gradient in the step."""
    return Key.of_step(key).part is Part.GRADIENT


def grad_key(key: str) -> str:
    """Return the key of the gradient of ``key``."""
    return str(Key(key, Part.GRADIENT))


def saved_key(key: str) -> str:
    """Return the key of the saved copy of activation ``key``."""
    return str(Key(key, Part.SAVED))


def master_key(key: str) -> str:
    """Return the key of the master weight of weight ``key``."""
    return str(Key(key, Part.MASTER))


def stored_grad_key(key: str) -> str:
    """Return the key of the gradient of weight ``key`` as the optimizer reads it."""
    return str(Key(key, Part.STORED_GRADIENT))


def state_key(key: str, state: str) -> str:
    """Return the key of an optimizer state of weight ``key``, e.g. ``fc.weight.optim.exp_avg``."""
    return str(Key(key, Part.STATE, state))


def buffer_key(name: str) -> str:
    """Return the key of a buffer that the step updates, e.g. ``bn.running_mean.buffer``."""
    return str(Key(name, Part.BUFFER))
