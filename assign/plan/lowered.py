"""Apply the rules of ``lowering`` to a whole table: the dtype of each tensor and operator, and why."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from assign.plan import lowering
from assign.plan.assignment import Entry, format_pair
from assign.plan.formats import Format, loaded_format, parse_format
from assign.plan.keys import saved_key
from assign.plan.tensors import SLICE, Role, TensorInfo, TensorTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """How one operator runs.

    Attributes:
        key: of the tensor that it makes.
        dtype: torch dtype of its operands and of what it computes; ``format``: what its result is rounded to.
        product: it multiplies matrices; ``multiplies``: the dtype of their elements when it does.
        why: the rule that decided.
    """

    key: str
    op: str
    format: str
    dtype: str
    product: bool
    multiplies: str
    why: str


@functools.cache
def _carrier(forward: str, gradient: str) -> str:
    """:func:`assign.plan.lowering.carrier` of two formats by name; a search asks for few pairs millions of times."""
    return lowering.carrier(parse_format(forward), parse_format(gradient))


class Lowered:
    """A table under some entries; tensors without one are as they were loaded."""

    def __init__(self, table: TensorTable, entries: Mapping[str, Entry]) -> None:
        self._table, self._entries = table, entries
        self._rows = table.first_by_key
        self._carriers: dict[str, str] = {}
        self._computes: dict[str, str | None] = {}

    @property
    def narrowed(self) -> bool:
        """Whether a plan has any format other than fp32, so that saved activations are packed."""
        keys = [info.key for info in self._table.tensors if info.role in (Role.WEIGHT, Role.ACTIVATION)]
        if any(saved_key(key) in self._entries for key in keys):
            return True
        return bool(self._entries) and any(fmt.name != "fp32" for key in keys for fmt in self.formats(key))

    def loaded(self, key: str) -> str:
        """Dtype of a forward tensor in the model as it was loaded."""
        info = self._rows.get(key)
        return lowering.FLOAT32 if info is None else info.dtype

    def formats(self, key: str) -> tuple[Format, Format]:
        """Of a forward tensor and of its gradient."""
        return format_pair(self._entries, key) or (loaded_format(self.loaded(key)),) * 2

    def carrier(self, key: str) -> str:
        """Dtype in which a forward tensor lives between operators."""
        if key not in self._carriers:
            forward, gradient = self.formats(key)
            self._carriers[key] = _carrier(forward.name, gradient.name)
        return self._carriers[key]

    def compute(self, key: str) -> str:
        """Dtype in which the operator that makes ``key`` runs; that of ``key`` as loaded if it runs as written."""
        return self._compute(key) or self.loaded(key)

    def as_written(self, key: str) -> bool:
        """Whether the operator that makes ``key`` runs as the user wrote it: nothing of it has changed its dtype."""
        return self._compute(key) is None

    def _compute(self, key: str) -> str | None:
        if key not in self._computes:
            info = self._rows.get(key)
            found = None
            if info is not None and info.op == SLICE:
                found = self.carrier(info.inputs[0])
            elif info is not None and info.op not in ("parameter", "input"):
                read, result = self._operands(info).values(), lowering.Value(info.dtype, self._made_in(key))
                found = lowering.compute_dtype(info.op, read, result, opaque=info.opaque, wide=info.wide)
            self._computes[key] = found
        return self._computes[key]

    def is_identity(self, key: str, *, backward: bool) -> bool:
        """Whether rounding changes nothing: what the operator makes is on the format's grid and stays where it is."""
        carrier, fmt = self.carrier(key), self.formats(key)[backward]
        explicit = not backward and saved_key(key) in self._entries
        return carrier == self.compute(key) and lowering.changes_nothing(fmt, carrier) and not explicit

    def operators(self, *, fp8: bool = False) -> tuple[Operator, ...]:
        """Every operator of the forward pass, in order; its backward pass runs in the same dtype.

        Args:
            fp8: the device multiplies 8-bit matrices.
        """
        made = [
            info for info in self._table.tensors if info.role is Role.ACTIVATION and info.op not in ("input", SLICE)
        ]
        return tuple(
            Operator(
                key=info.key,
                op=info.op,
                format=self.formats(info.key)[0].name,
                dtype=self.compute(info.key),
                product=info.op in lowering.MATRIX_PRODUCTS,
                multiplies=lowering.multiply_dtype(info.op, self.compute(info.key), self._matrices(info), fp8=fp8),
                why=self._why(info),
            )
            for info in made
        )

    def _matrices(self, info: TensorInfo) -> list[Format]:
        """Formats of what a product multiplies."""
        keys = info.inputs[-2:] if info.op == "addmm" else info.inputs[:2]
        return [self.formats(key)[0] for key in keys]

    def _operands(self, info: TensorInfo) -> dict[str, lowering.Value]:
        """What an operator reads: a user's conversion stays what it was."""
        reads = info.reads or tuple(self.loaded(key) for key in info.inputs)
        own = zip(info.inputs, reads, strict=True)
        return {
            key: lowering.Value(dtype, self.carrier(key) if dtype == self.loaded(key) else dtype) for key, dtype in own
        }

    def _made_in(self, key: str) -> str:
        return lowering.made_in(self.carrier(key), self.formats(key)[0])

    def _why(self, info: TensorInfo) -> str:
        dtype, result, operands = self.compute(info.key), self._made_in(info.key), self._operands(info)
        if self.as_written(info.key):
            return f"all it reads and makes has the dtype in which the model was loaded: {dtype}"
        if dtype != lowering.FLOAT32:
            return f"all it reads and makes lives in {dtype}"
        if info.wide:
            return "the model's own code asks for float32"
        if info.op not in lowering.SIXTEEN_BIT:
            return "not known to sum in float32 when its operands are 16-bit"
        if result == lowering.FLOAT32:
            return f"its result, {' and its gradient '.join(fmt.name for fmt in self.formats(info.key))}, needs float32"
        wide = next((key for key, value in operands.items() if value.now == lowering.FLOAT32), None)
        return f"it reads {wide}, which lives in float32" if wide else "it reads both bfloat16 and float16"
