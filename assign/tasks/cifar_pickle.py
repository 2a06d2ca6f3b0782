"""Read the batch files of CIFAR's Python version, which are pickles of one layout, without unpickling them.

A pickle is a program for a stack machine. The ones of CIFAR build a dictionary of strings, lists of integers and arrays
of bytes. The machine here knows only the opcodes needed for that. It calls and imports nothing from the file, and
passes only bytes and a shape to NumPy.
"""

import pickletools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

_DTYPES = {"u1": np.uint8, "i4": np.int32, "i8": np.int64}
_DTYPE_STATE = (None, None, None, -1, -1, 0)
"""End of the pickled state of a plain dtype: no fields, no item size, no flags."""


class _Mark:
    """The object that the opcode ``MARK`` puts on the stack."""


_MARK = _Mark()


@dataclass(frozen=True, slots=True)
class _Global:
    """A global name that unpickling would import."""

    name: str


@dataclass(frozen=True, slots=True)
class _DType:
    code: str


@dataclass(slots=True)
class _Array:
    """An array, without a value until its state is set."""

    value: np.ndarray[Any, Any] | None = None


def read_pickle(content: bytes) -> dict[str, Any]:
    """Return the dictionary of a batch file; its values are strings, bytes, lists and arrays.

    Raises:
        ValueError: the file has another layout; says what it contains.
    """
    machine = _Machine()
    for instruction, argument, _ in pickletools.genops(content):
        machine.run(instruction.name, argument)
    if len(machine.stack) != 1 or not isinstance(machine.stack[0], dict):
        raise ValueError("it is not a dictionary")
    found = {}
    for key, value in machine.stack[0].items():
        found[key.decode("latin1") if isinstance(key, bytes) else key] = _finished(value)
    return found


def _finished(value: Any) -> Any:
    if not isinstance(value, _Array):
        return value
    if value.value is None:
        raise ValueError("it holds an array without contents")
    return value.value


class _Machine:
    """A stack and a memo; :meth:`run` executes one opcode."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._memory: dict[int, Any] = {}

    def run(self, name: str, argument: Any) -> None:
        """Execute one opcode.

        Raises:
            ValueError: CIFAR's files do not use it, or its operands are missing.
        """
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _PUTS:
            self._memory[len(self._memory) if name == "MEMOIZE" else argument] = self._top()
        elif name in _GETS:
            if argument not in self._memory:
                raise ValueError("it asks for a value that it does not have")
            self.stack.append(self._memory[argument])
        elif name == "GLOBAL":
            self.stack.append(_Global(argument.replace(" ", ".")))
        elif name in _STEPS:
            _STEPS[name](self)
        elif name not in _NOTHING:
            raise ValueError(f"it has the instruction {name}, which these files do not use")

    def _top(self) -> Any:
        if not self.stack:
            raise ValueError("it asks for a value that it does not have")
        return self.stack[-1]

    def _pop(self) -> Any:
        top = self._top()
        self.stack.pop()
        return top

    def _marked(self) -> list[Any]:
        """Pop and return the values above the last mark."""
        found = []
        while (value := self._pop()) is not _MARK:
            found.append(value)
        return found[::-1]

    def _tuple(self, length: int) -> None:
        self.stack.append(tuple([self._pop() for _ in range(length)][::-1]))

    def _extend(self, values: Iterable[Any]) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise ValueError("it appends to a value that is not a list")
        target.extend(values)

    def _set(self, pairs: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, dict) or len(pairs) % 2:
            raise ValueError("it sets items of a value that is not a dictionary")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, (str, bytes)):
                raise ValueError("it has a key that is not a string")
            target[key] = value

    def append(self) -> None:
        value = self._pop()
        self._extend([value])

    def set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set([key, value])

    def make_dictionary(self) -> None:
        pairs = self._marked()
        self.stack.append({})
        self._set(pairs)

    def name_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("it names an import with a value that is not a string")
        self.stack.append(_Global(f"{module}.{name}"))

    def call(self) -> None:
        """Replace a call by its result, for the four functions that CIFAR's files call."""
        arguments, function = self._pop(), self._pop()
        name = function.name if isinstance(function, _Global) else type(function).__name__
        made = _FUNCTIONS.get(name.replace("numpy._core", "numpy.core"))
        if made is None:
            raise ValueError(f"it holds {name!r}, which is not an array")
        self.stack.append(made(arguments if isinstance(arguments, tuple) else ()))

    def build(self) -> None:
        """Set the state of an array or a dtype."""
        state = self._pop()
        target = self._top()
        if isinstance(target, _Array):
            target.value = _array(state)
        elif not isinstance(target, _DType) or not _is_plain(state):
            raise ValueError("it has a dtype that is not plain bytes or whole numbers")


def _is_plain(state: Any) -> bool:
    """Whether this is the state of a plain integer dtype."""
    if not isinstance(state, tuple) or len(state) != 8:
        return False
    version, order, *rest = state
    return (
        version == 3
        and order in ("|", "<")
        and all(type(a) is type(b) and a == b for a, b in zip(rest, _DTYPE_STATE, strict=True))
    )


def _dtype(arguments: tuple[Any, ...]) -> _DType:
    code = arguments[0] if len(arguments) == 3 and arguments[1:] == (0, 1) else None
    if not isinstance(code, str) or code not in _DTYPES:
        raise ValueError("it has a dtype that is not plain bytes or whole numbers")
    return _DType(code)


def _array(state: Any) -> np.ndarray[Any, Any]:
    """Build an array from its state: version, shape, dtype, whether it is in Fortran order, bytes."""
    if not isinstance(state, tuple) or len(state) != 5 or state[0] != 1:
        raise ValueError("it has an array of another layout")
    _, shape, dtype, by_columns, content = state
    return _filled(content, dtype, shape, "F" if by_columns is True else "C")


def _from_buffer(arguments: tuple[Any, ...]) -> _Array:
    if len(arguments) != 4:
        raise ValueError("it has an array of another layout")
    return _Array(_filled(*arguments))


def _filled(content: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    content = content.encode("latin1") if isinstance(content, str) else content
    whole = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
    if not isinstance(content, (bytes, bytearray)) or not isinstance(dtype, _DType) or not whole or len(shape) > 4:
        raise ValueError("it has an array of another layout")
    values = np.frombuffer(bytes(content), dtype=_DTYPES[dtype.code])
    return values.reshape(shape, order="F" if order == "F" else "C")


def _encode(arguments: tuple[Any, ...]) -> bytes:
    if len(arguments) != 2 or not isinstance(arguments[0], str) or arguments[1] != "latin1":
        raise ValueError("it encodes a string with an encoding other than latin1")
    return arguments[0].encode("latin1")


_FUNCTIONS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "numpy.core.multiarray._reconstruct": lambda _: _Array(),
    "numpy.core.numeric._frombuffer": _from_buffer,
    "numpy.dtype": _dtype,
    "_codecs.encode": _encode,
}
_NOTHING = {"PROTO", "FRAME", "STOP"}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "MARK": lambda: _MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_PUTS, _GETS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}, {"GET", "BINGET", "LONG_BINGET"}
_STEPS: dict[str, Callable[[_Machine], None]] = {
    "TUPLE": lambda m: m.stack.append(tuple(m._marked())),
    "TUPLE1": lambda m: m._tuple(1),
    "TUPLE2": lambda m: m._tuple(2),
    "TUPLE3": lambda m: m._tuple(3),
    "LIST": lambda m: m.stack.append(m._marked()),
    "DICT": _Machine.make_dictionary,
    "APPEND": _Machine.append,
    "APPENDS": lambda m: m._extend(m._marked()),
    "SETITEM": _Machine.set_item,
    "SETITEMS": lambda m: m._set(m._marked()),
    "STACK_GLOBAL": _Machine.name_global,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
}
