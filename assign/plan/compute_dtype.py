"""The dtype in which each operator computes and each tensor is stored, given the formats of a plan.

The executor and the memory model both use :class:`ComputeDtypes`, so the predicted bytes are those of the graph that
runs. The rules:

* Between operators a value has a dtype called its *carrier*: the narrowest torch dtype that represents both its format
  and its gradient's format exactly (autograd gives a gradient the dtype of its tensor).
* If everything that an operator reads and makes has the same dtype as in the model as loaded, the operator runs as the
  user wrote it. A plan that changes nothing therefore computes the same as no plan, bit for bit.
* Any other operator runs in a 16-bit dtype if everything it reads and makes has that dtype, and torch computes it with
  float32 accumulation inside. Otherwise its operands are widened to float32.
* Operands without a key, such as buffers and constants, do not count: they are converted to the dtype of the others.
* A conversion to another dtype in the user's code stays. If its result has a key, it converts to the carrier of that
  key.
* Stochastic rounding to bf16 or fp16 needs more bits than these have: the operator that makes such a tensor runs in
  float32, and if its gradient is rounded stochastically, the tensor is stored in float32.
* A tensor in a custom ``fp(e,m,b)`` format is stored and computed in float32: it is rounded once, as in the paper's
  simulation.
* Matrices are multiplied in the narrowest dtype that represents their elements exactly, with sums and result as above:
  float32 tensors on grids that bf16 can represent, in bf16; two tensors in scaled 8-bit formats, in 8 bits if the
  device can. Products whose result is a posit with ``:quire`` or ``:noquire`` are computed in float64.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, Protocol

from assign.formats.dtypes import FLOAT32, FLOAT64, ITEM_BYTES, NARROW
from assign.formats.parsing import parse_format
from assign.formats.rows import FORMATS, LOADED, Accumulation, Format, Storage, loaded_format
from assign.plan.keys import saved_key
from assign.plan.ops import CONVERSIONS, FLOAT32_PARAMETERS, INPUT, MATRIX_PRODUCTS, PLAIN_PRODUCTS, SIXTEEN_BIT, SLICE
from assign.plan.plan import Entry, format_pair
from assign.plan.table import Role, TensorInfo, TensorTable


class Made(Protocol):
    """Facts about an operator and the forward tensor that it makes: a row of a table, or a site of a captured graph."""

    @property
    def op(self) -> str:
        """Name of the operator."""

    @property
    def dtype(self) -> str:
        """Dtype of the tensor in the model as it was loaded."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Keys that the operator reads."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Dtypes in which it reads them; empty if each is the dtype of its tensor."""

    @property
    def opaque(self) -> bool:
        """Whether it is known to run only in the dtypes that it was written for."""

    @property
    def wide(self) -> bool:
        """Whether it computes in float32 if the plan changes any of its dtypes."""


class Value(NamedTuple):
    """Dtype of a tensor that an operator reads or makes: in the model as loaded, and under the plan."""

    loaded: str
    now: str


class ComputeDtypes:
    """Dtypes of operators and tensors under some entries. Tensors without an entry are as they were loaded."""

    def __init__(
        self,
        made: Mapping[str, Made],
        entries: Mapping[str, Entry],
        promotable: Mapping[str, Format] = MappingProxyType({}),
    ) -> None:
        """Store the arguments; dtypes are computed on demand.

        Args:
            made: every forward tensor by its key; the first one if several have the same key.
            entries: of a plan.
            promotable: keys of forward tensors that may be promoted → the format that they then get. Their carriers
                represent both formats.
        """
        self._made, self._entries, self._promotable = made, entries, promotable
        self._carriers: dict[str, str] = {}
        self._computes: dict[str, str | None] = {}

    @classmethod
    def of_table(
        cls,
        table: TensorTable,
        entries: Mapping[str, Entry],
        promotable: Mapping[str, Format] = MappingProxyType({}),
    ) -> "ComputeDtypes":
        """Return the dtypes of a table's tensors under some entries."""
        return cls(table.first_by_key, entries, promotable)

    def loaded(self, key: str) -> str:
        """Return the dtype of a forward tensor in the model as it was loaded."""
        made = self._made.get(key)
        return FLOAT32 if made is None else made.dtype

    def formats(self, key: str) -> tuple[Format, Format]:
        """Return the formats of a forward tensor and of its gradient."""
        return format_pair(self._entries, key) or (loaded_format(self.loaded(key)),) * 2

    def carrier(self, key: str) -> str:
        """Return the dtype of a forward tensor between operators."""
        if key not in self._carriers:
            formats = self.formats(key)
            later = self._promotable.get(key)
            self._carriers[key] = _carrier(*(fmt.name for fmt in (*formats, *([later] if later else []))))
        return self._carriers[key]

    def read_as(self, key: str, dtype: str) -> str:
        """Return the dtype under the plan of a tensor's value that had ``dtype`` in the model as it was loaded.

        It is the tensor's carrier, unless the user's code converted the value.
        """
        return self.carrier(key) if dtype == self.loaded(key) else dtype

    def compute(self, key: str) -> str:
        """Return the dtype in which the operator that makes ``key`` runs."""
        return self.changed(key) or self.loaded(key)

    def as_written(self, key: str) -> bool:
        """Whether the operator that makes ``key`` runs as the user wrote it: the plan changes none of its dtypes."""
        return self.changed(key) is None

    def changed(self, key: str) -> str | None:
        """Return the result of :meth:`compute`; None if the operator runs as the user wrote it."""
        if key not in self._computes:
            made = self._made.get(key)
            found = None
            if made is not None and made.op == SLICE:
                found = self.carrier(made.inputs[0])
            elif made is not None and made.op not in ("parameter", INPUT):
                found = _compute_dtype(made, list(self._operands(made).values()), Value(made.dtype, self._made_in(key)))
            self._computes[key] = found
        return self._computes[key]

    def is_identity(self, key: str, *, backward: bool) -> bool:
        """Whether rounding changes nothing: the result is on the format's grid already and keeps its dtype."""
        carrier, fmt = self.carrier(key), self.formats(key)[backward]
        explicit = not backward and saved_key(key) in self._entries
        return carrier == self.compute(key) and changes_nothing(fmt, carrier) and not explicit

    def why(self, key: str) -> str:
        """Return the rule that decided the dtype in which the operator that makes ``key`` runs, as a sentence."""
        made, dtype = self._made[key], self.compute(key)
        if self.as_written(key):
            return f"its inputs and outputs have the dtype in which the model was loaded: {dtype}"
        if dtype != FLOAT32:
            return f"its inputs and outputs are {dtype}"
        if made.wide:
            return "the model's own code requests float32"
        if made.op not in SIXTEEN_BIT:
            return "not known to sum in float32 when its operands are 16-bit"
        if self._made_in(key) == FLOAT32:
            return f"its result, {' and its gradient '.join(fmt.name for fmt in self.formats(key))}, needs float32"
        wide = next((read for read, value in self._operands(made).items() if value.now == FLOAT32), None)
        return f"it reads {wide}, which is float32" if wide else "it reads both bfloat16 and float16"

    def _operands(self, made: Made) -> dict[str, Value]:
        reads = made.reads or tuple(map(self.loaded, made.inputs))
        return {key: Value(dtype, self.read_as(key, dtype)) for key, dtype in zip(made.inputs, reads, strict=True)}

    def _made_in(self, key: str) -> str:
        """Return the dtype that is requested of the operator that makes a tensor."""
        later = self._promotable.get(key)
        forward = (self.formats(key)[0], *([later] if later else []))
        return FLOAT32 if any(map(_needs_float32, forward)) else self.carrier(key)


def _compute_dtype(made: Made, operands: Sequence[Value], result: Value) -> str | None:
    """Return the dtype in which an operator runs; None if it runs as the user wrote it."""
    if all(value.loaded == value.now for value in (*operands, result)):
        return None
    if made.opaque:
        return result.loaded
    if made.op in CONVERSIONS:
        return result.now
    counted = operands[:1] if made.op in FLOAT32_PARAMETERS else operands
    dtypes = {*(value.now for value in counted), result.now}
    if FLOAT64 in dtypes:
        return FLOAT64
    return FLOAT32 if made.wide or len(dtypes) > 1 or made.op not in SIXTEEN_BIT else dtypes.pop()


@functools.cache
def _carrier(forward: str, gradient: str, later: str = "") -> str:
    """Return :func:`carrier` of formats by name; cached, because a search asks for the same few millions of times."""
    return carrier(parse_format(forward), parse_format(gradient), *([parse_format(later)] if later else []))


def carrier(forward: Format, gradient: Format, *later: Format) -> str:
    """Return the torch dtype that represents a tensor and its gradient exactly, in each format they may have.

    It is float32 for formats that torch does not have, so that each of their values is rounded once.
    """
    formats = (forward, gradient, *later)
    if any(fmt.carrier == FLOAT64 for fmt in formats):
        return FLOAT64
    if any(fmt.native is None for fmt in formats) or _needs_float32(gradient):
        return FLOAT32
    dtypes = {fmt.carrier for fmt in formats}
    if len(dtypes) == 1:
        return dtypes.pop()
    return next((dtype for dtype in NARROW if all(map(LOADED[dtype].contains, formats))), FLOAT32)


def _needs_float32(fmt: Format) -> bool:
    """Whether values must be float32 to be rounded to the format: in its own dtype nothing is left to round."""
    return fmt.stochastic and fmt.storage is Storage.NATIVE


def changes_nothing(fmt: Format, dtype: str) -> bool:
    """Whether rounding values of a dtype to a format leaves them as they are."""
    return fmt.native == dtype or (fmt.native in (FLOAT32, FLOAT64) and ITEM_BYTES[fmt.native] >= ITEM_BYTES[dtype])


def multiply_dtype(op: str, compute: str, operands: Iterable[Format], *, fp8: bool = False) -> str:
    """Return the dtype in which ``op`` multiplies matrices.

    Args:
        op: name of the operator.
        compute: the dtype in which it computes.
        operands: formats of the matrices.
        fp8: whether the device multiplies 8-bit matrices.
    """
    formats = list(operands)
    if op not in PLAIN_PRODUCTS or not formats:
        return compute
    if compute == FLOAT32:
        return "bfloat16" if all(map(FORMATS["bf16"].contains, formats)) else compute
    return "float8" if fp8 and op != "bmm" and all(map(is_float8, formats)) else compute


def is_float8(fmt: Format) -> bool:
    """Whether a tensor's codes and its scale can be multiplied without decoding."""
    return fmt.scaled and fmt.native is not None and fmt.native.startswith("float8")


def is_narrowed(table: TensorTable, entries: Mapping[str, Entry]) -> bool:
    """Whether a plan has any format other than fp32, so that saved activations are packed."""
    if not entries:
        return False
    dtypes = ComputeDtypes.of_table(table, entries)
    keys = [info.key for info in table.tensors if info.role in (Role.WEIGHT, Role.ACTIVATION)]
    if any(saved_key(key) in entries for key in keys):
        return True
    return any(fmt.name != "fp32" for key in keys for fmt in dtypes.formats(key))


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """How one operator runs.

    Attributes:
        key: of the tensor that it makes.
        op: name of the operator.
        format: of its result.
        dtype: torch dtype of its operands and computation.
        product: whether it multiplies matrices.
        multiplies: dtype of the elements that it multiplies.
        why: the rule that decided.
    """

    key: str
    op: str
    format: str
    dtype: str
    product: bool
    multiplies: str
    why: str


def operators(table: TensorTable, entries: Mapping[str, Entry], *, fp8: bool = False) -> tuple[Operator, ...]:
    """Return every operator of the forward pass, in order; its backward pass runs in the same dtype.

    Args:
        table: of the model.
        entries: of a plan.
        fp8: whether the device multiplies 8-bit matrices.
    """
    dtypes = ComputeDtypes.of_table(table, entries)
    made = [info for info in table.tensors if info.role is Role.ACTIVATION and info.op not in (INPUT, SLICE)]

    def multiplies(info: TensorInfo) -> str:
        matrices = info.inputs[-2:] if info.op == "addmm" else info.inputs[:2]
        formats = [dtypes.formats(key)[0] for key in matrices]
        result = dtypes.formats(info.key)[0]
        if info.op in MATRIX_PRODUCTS and result.accumulation is not Accumulation.FLOAT32:
            return FLOAT64
        return multiply_dtype(info.op, dtypes.compute(info.key), formats, fp8=fp8)

    return tuple(
        Operator(
            key=info.key,
            op=info.op,
            format=dtypes.formats(info.key)[0].name,
            dtype=dtypes.compute(info.key),
            product=info.op in MATRIX_PRODUCTS,
            multiplies=multiplies(info),
            why=dtypes.why(info.key),
        )
        for info in made
    )
