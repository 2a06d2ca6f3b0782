"""Number formats, one row of data each.

A *format* is the set of values that a tensor may have; a *dtype* is what torch stores. This module does not import
torch: dtypes are names. To add a format, add a row to ``FORMATS``, or to ``STATE_FORMATS`` if only optimizer states may
have it, to ``SAVED_FORMATS`` for saved activations only, to ``MASTER_FORMATS`` for masters only. A format whose codes
are not sign, exponent and mantissa has a *layout* (:mod:`assign.formats.posits`, :mod:`assign.formats.tables`).
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType

from assign.formats.dtypes import FORMAT_NAMES, ITEM_BYTES
from assign.formats.posits import Posit
from assign.formats.tables import Table


class Rounding(StrEnum):
    """How a value between two neighbours is rounded.

    ``EVEN`` and ``AWAY`` round to the nearest; ties go to the even one, or to the one away from zero. ``STOCHASTIC``
    rounds ``v`` between neighbours ``a < b`` to ``b`` with probability ``(v - a) / (b - a)``, so that the mean is
    ``v``. Source: arXiv 1502.02551, section 3.
    """

    EVEN = "even"
    AWAY = "away"
    STOCHASTIC = "stochastic"


class Scaling(StrEnum):
    """Whether a tensor of the format has a scale, one float32 per tensor, and which.

    ``POW2``: a power of two, so that scaling does not round. ``AMAX``: scales the largest magnitude to the largest
    value.
    """

    NONE = "none"
    POW2 = "pow2"
    AMAX = "amax"


class Accumulation(StrEnum):
    """How the products are summed that make a tensor: by a matrix product, a convolution, or their gradients.

    ``FLOAT32``: in float32, and rounded once, as by emulators. ``QUIRE``: exactly, and rounded once. ``NOQUIRE``: each
    product and each partial sum is rounded to the format, as by a processor of posits without a quire.
    """

    FLOAT32 = "float32"
    QUIRE = "quire"
    NOQUIRE = "noquire"


class Storage(StrEnum):
    """How the values of a format are stored in memory.

    ``NATIVE``: always as a torch dtype. ``PACKED``: saved activations as codes narrower than the carrier. ``EMULATED``:
    in as many bytes as the carrier.
    """

    NATIVE = "native"
    PACKED = "packed"
    EMULATED = "emulated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """The values ``±k · 2^(E - mantissa_bits)``, ``k < 2^(mantissa_bits + 1)``, from subnormals up to ``max_value``.

    A format with a ``layout`` has the values of that layout instead.

    Attributes:
        name: as written in plans, e.g. ``e4m3``, ``fp(4,3,4)``, ``e4m3:sr``, ``posit(8,2)``.
        mantissa_bits: of a value; with a layout, of the values that have most of them.
        min_exponent: exponent of the smallest normal value.
        max_value: largest finite value.
        rounding: how values between two neighbours are rounded. It changes neither the values nor their codes.
        delayed: whether the scale comes from the amax of earlier steps, so that it is known before the tensor is
            computed.
        native: the torch dtype that has exactly these values and codes, e.g. ``float8_e4m3fn``; None if there is none.
        extra_bits: mantissa bits that are stored separately from the parameter, which is rounded to the others.
        layout: how values and codes are defined if a code is not sign, exponent and mantissa; None if it is.
        accumulation: how the products are summed that make a tensor of the format. It changes neither values nor codes.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    min_exponent: int
    max_value: float
    rounding: Rounding = Rounding.EVEN
    has_inf: bool = False
    has_nan: bool = False
    scaling: Scaling = Scaling.NONE
    delayed: bool = False
    native: str | None = None
    extra_bits: int = 0
    layout: Posit | Table | None = None
    accumulation: Accumulation = Accumulation.FLOAT32

    @property
    def bits(self) -> int:
        """Number of bits of a code: sign, exponent and mantissa, or those of the layout."""
        return self.layout.bits if self.layout else 1 + self.exponent_bits + self.mantissa_bits

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest finite value."""
        return math.frexp(self.max_value)[1] - 1

    @property
    def min_normal(self) -> float:
        """Smallest positive value that is not subnormal; with a layout, the smallest positive value."""
        return math.ldexp(1.0, self.min_exponent)

    @property
    def min_subnormal(self) -> float:
        """Smallest positive value."""
        return self.layout.smallest if self.layout else math.ldexp(1.0, self.min_exponent - self.mantissa_bits)

    @property
    def overflow_threshold(self) -> float:
        """An element overflows iff ``|x|`` is at least this: half a step above ``max_value``.

        For ``e4m3`` the threshold 464 itself does not overflow: the tie goes to 448, whose mantissa is even. With
        stochastic rounding, half of the elements at the threshold overflow: see ``rounding``.
        Source: arXiv 2301.13464.
        """
        if self.layout:
            return self.layout.overflow_threshold
        return self.max_value + math.ldexp(0.5, self.max_exponent - self.mantissa_bits)

    @property
    def underflow_threshold(self) -> float:
        """An element underflows iff ``0 < |x| <=`` this, half of ``min_subnormal``. Source: arXiv 2301.13464.

        With stochastic rounding, half of the elements at the threshold underflow.
        """
        return self.layout.underflow_threshold if self.layout else self.min_subnormal / 2

    @property
    def carrier(self) -> str:
        """Narrowest torch float dtype in which every value, times any scale in ``scale_exponents``, is exact.

        With ``AMAX`` the product with the scale is rounded to the carrier, close enough to recover the code.
        """
        if self.scaled:
            return "bfloat16" if self.mantissa_bits <= FORMATS["bf16"].mantissa_bits else "float32"
        if self.native == "float64":
            return self.native
        return next((dtype for name, dtype in _CARRIERS if FORMATS[name].contains(self)), "float32")

    @property
    def scaled(self) -> bool:
        """Whether a tensor of the format has a scale."""
        return self.scaling is not Scaling.NONE

    @property
    def code_dtype(self) -> str:
        """Torch dtype of the codes of saved activations; for more than 16 bits it is the carrier."""
        if self.native in _PLAIN:
            return self.native
        if self.bits <= 8:
            return "uint8"
        return "int16" if self.bits <= 16 else "float32"

    @property
    def code_bytes(self) -> int:
        """Bytes of one code."""
        return ITEM_BYTES[self.code_dtype]

    @property
    def storage(self) -> Storage:
        """How values are stored: native, packed or emulated."""
        if self.native in _PLAIN:
            return Storage.NATIVE
        return Storage.PACKED if self.code_bytes < ITEM_BYTES[self.carrier] else Storage.EMULATED

    @property
    def scale_exponents(self) -> tuple[int, int]:
        """Lowest and highest exponent of a scale with which every value, scaled, is exact in the carrier.

        Under ``AMAX`` any number between these powers of two is a scale.
        """
        carrier = FORMATS["bf16" if self.carrier == "bfloat16" else "fp32"]
        lowest = carrier.min_exponent - carrier.mantissa_bits - (self.min_exponent - self.mantissa_bits)
        return max(lowest, FORMATS["fp32"].min_exponent), carrier.max_exponent - self.max_exponent

    @property
    def stochastic(self) -> bool:
        """Whether rounding to it needs random bits."""
        return self.rounding is Rounding.STOCHASTIC

    def contains(self, other: "Format") -> bool:
        """Whether every finite value of ``other`` is a value of this format, regardless of the rounding of both.

        A scaled format contains only itself, and only under the same scale. Another format contains a scaled one if it
        contains its values under every allowed scale.

        Examples:
            >>> FORMATS["bf16"].contains(FORMATS["e4m3"]), FORMATS["fp16"].contains(FORMATS["bf16"])
            (True, False)
        """
        if self.scaled:
            return self == replace(other, name=self.name, rounding=self.rounding)
        if self.layout:
            return other.bits <= self.bits and not other.scaled and _magnitudes(self) >= _magnitudes(other)
        lowest, highest = other.scale_exponents if other.scaled else (0, 0)
        granule = other.layout.granule if other.layout else other.min_subnormal
        return (
            self.mantissa_bits >= other.mantissa_bits
            and self.min_subnormal <= math.ldexp(granule, lowest)
            and self.max_value >= math.ldexp(other.max_value, highest)
        )


@functools.lru_cache(maxsize=32)
def _magnitudes(fmt: Format) -> frozenset[float]:
    """Return the magnitudes of all finite values of a format of up to 16 bits."""
    if fmt.layout:
        return frozenset(fmt.layout.magnitudes())
    found = {
        math.ldexp(k, exponent - fmt.mantissa_bits)
        for exponent in range(fmt.min_exponent, fmt.max_exponent + 1)
        for k in range(2 ** (fmt.mantissa_bits + 1))
    }
    return frozenset(value for value in found if value <= fmt.max_value)


_PLAIN = ("float64", "float32", "bfloat16", "float16")
_CARRIERS = (("bf16", "bfloat16"), ("fp16", "float16"))


def _float(
    name: str, exponent_bits: int, mantissa_bits: int, max_value: float, *, native: str, has_inf: bool = True
) -> Format:
    """Return a row with IEEE's exponent bias, ``2^(e-1) - 1``, ties to even and NaN; its name says how it scales."""
    scaling = next((Scaling(part) for part in name.split(":") if part in list(Scaling)), Scaling.NONE)
    return Format(
        name=name,
        exponent_bits=exponent_bits,
        mantissa_bits=mantissa_bits,
        min_exponent=2 - 2 ** (exponent_bits - 1),
        max_value=max_value,
        has_inf=has_inf,
        has_nan=True,
        scaling=scaling,
        delayed=name.endswith(":delayed"),
        native=native,
    )


# Source of e4m3 and e5m2: OCP 8-bit Floating Point Specification (OFP8) 1.0, the same as arXiv 2209.05433, table 1; of
# the scales: section 3. Delayed scales are those of NVIDIA's Transformer Engine.
FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        row.name: row
        for row in (
            _float("fp32", 8, 23, math.ldexp(2 - 2**-23, 127), native="float32"),
            _float("bf16", 8, 7, math.ldexp(2 - 2**-7, 127), native="bfloat16"),
            _float("fp16", 5, 10, 65504.0, native="float16"),
            *(
                row
                for scale in ("", ":pow2", ":amax", ":pow2:delayed", ":amax:delayed")
                for row in (
                    _float(f"e4m3{scale}", 4, 3, 448.0, native="float8_e4m3fn", has_inf=False),
                    _float(f"e5m2{scale}", 5, 2, 57344.0, native="float8_e5m2"),
                )
            ),
        )
    }
)
"""Formats of a step's tensors by name: ``fp32``, ``bf16``, ``fp16``, ``e4m3``, ``e5m2``; the last two also with a
scale, ``:pow2`` or ``:amax``, either followed by ``:delayed`` or not. :mod:`assign.formats.parsing` accepts more."""


FP64 = _float("fp64", 11, 52, math.ldexp(2 - 2**-52, 1023), native="float64")
"""Format of a tensor loaded as float64. No search chooses it for another tensor; a plan may."""

LOADED: Mapping[str, Format] = MappingProxyType(
    {dtype: {**FORMATS, "fp64": FP64}[name] for dtype, name in FORMAT_NAMES.items()}
)
"""Format of a tensor as it is loaded, by its torch dtype."""


def loaded_format(dtype: str) -> Format:
    """Return the format of a tensor that was loaded in a torch dtype; fp32 for dtypes that a plan cannot change."""
    return LOADED.get(dtype, FORMATS["fp32"])


# Source: the 24-bit masters of FlashOptim (arXiv 2602.23349). assign.optim.masters defines the codes.
MASTER_FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "bf16+8": Format(
            name="bf16+8",
            exponent_bits=8,
            mantissa_bits=15,
            min_exponent=-126,
            max_value=math.ldexp(2 - 2**-15, 127),
            has_inf=True,
            has_nan=True,
            extra_bits=8,
        )
    }
)
"""Formats for masters only: a bf16 parameter, and separately the rest of a longer mantissa."""


class Shared(StrEnum):
    """What the elements of a block share, besides their codes.

    ``FLOAT32``: a float32 scale. ``BF16``: a bf16 scale. ``MINIMUM``: a bf16 scale and the bf16 value of code 0.
    ``E8M0``: a power of two, one byte; code 255 is NaN. Source: OCP Microscaling Formats (MX) 1.0, section 5.4.1.
    """

    FLOAT32 = "float32 scale"
    BF16 = "bf16 scale"
    MINIMUM = "bf16 scale and minimum"
    E8M0 = "power of two (e8m0)"

    @property
    def bits(self) -> int:
        """Bits per block."""
        return {Shared.FLOAT32: 32, Shared.BF16: 16, Shared.MINIMUM: 32, Shared.E8M0: 8}[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFormat:
    """A format in blocks that share a scale, for optimizer states and saved activations. Nothing computes in it.

    Attributes:
        name: as written in plans, e.g. ``dynamic8``, ``int4:block64``, ``mxfp8:sr``.
        code: description of the values of codes.
        bits: of one code.
        block: number of consecutive elements that share a scale.
        shared: what they share.
        element: the format of a code's value, without the scale; None if a code is an integer, or a library defines it.
        rounding: how values between two codes are rounded.
    """

    name: str
    code: str
    bits: int
    block: int
    shared: Shared = Shared.FLOAT32
    element: Format | None = None
    rounding: Rounding = Rounding.EVEN

    @property
    def bits_per_element(self) -> float:
        """Bits of a code and its share of the scale."""
        return self.bits + self.shared.bits / self.block

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, with its scale or minimum."""
        return (self.block * self.bits + self.shared.bits) // 8

    @property
    def stochastic(self) -> bool:
        """Whether rounding to it needs random bits."""
        return self.rounding is Rounding.STOCHASTIC

    def bytes_of(self, elements: int) -> int:
        """Return the bytes of a tensor, scales included, with a last block of full length and without code tables."""
        return (elements + self.block - 1) // self.block * self.block_bytes

    @property
    def rule(self) -> str:
        """The conditions of :meth:`fits` in words."""
        return f"it takes at least {SMALLEST_BLOCKED} elements, and a whole number of blocks of {self.block}"

    def fits(self, elements: int) -> bool:
        """Whether an optimizer state may have this format: it is large enough, and a whole number of blocks.

        Source: both conditions are torchao's; bitsandbytes has the first.
        """
        return elements >= SMALLEST_BLOCKED and elements % self.block == 0


SMALLEST_BLOCKED = 4096
"""Elements of the smallest state stored in blocks. Source: arXiv 2110.02861; the same in torchao and bitsandbytes."""

STATE_FORMATS: Mapping[str, BlockFormat] = MappingProxyType(
    {
        row.name: row
        for row in (
            # Source: arXiv 2110.02861 with blocks of 256, as in torchao and bitsandbytes now.
            BlockFormat(name="dynamic8", code="dynamic tree of 256 values", bits=8, block=256),
            # Source: arXiv 2309.01507, as in torchao.
            BlockFormat(name="dynamic4", code="dynamic tree of 16 values; second moments linear", bits=4, block=128),
            BlockFormat(name="e4m3:block256", code="e4m3", bits=8, block=256),
        )
    }
)
"""Formats for optimizer states only: ``dynamic8``, ``dynamic4``, ``e4m3:block256``. The library that stores the states
defines the values."""


def _integers(bits: int) -> BlockFormat:
    """Return the format of ``2^bits`` values from the block's minimum to its maximum.

    Source: arXiv 2104.14129, there with blocks of 256.
    """
    return BlockFormat(
        name=f"int{bits}:block64",
        code=f"{2**bits} values from minimum to maximum",
        bits=bits,
        block=64,
        shared=Shared.MINIMUM,
    )


# Source: OCP Microscaling Formats (MX) 1.0, section 5.3.3.
_E2M1 = Format(name="e2m1", exponent_bits=2, mantissa_bits=1, min_exponent=0, max_value=6.0)


def _floats(name: str, block: int, shared: Shared, element: Format) -> BlockFormat:
    return BlockFormat(name=name, code=element.name, bits=element.bits, block=block, shared=shared, element=element)


SAVED_FORMATS: Mapping[str, BlockFormat] = MappingProxyType(
    {
        row.name: row
        for row in (
            _floats("e4m3:block64", 64, Shared.BF16, FORMATS["e4m3"]),
            _integers(8),
            _integers(4),
            _integers(2),
            # Source: OCP Microscaling Formats (MX) 1.0, table 1.
            _floats("mxfp8", 32, Shared.E8M0, FORMATS["e4m3"]),
            _floats("mxfp4", 32, Shared.E8M0, _E2M1),
        )
    }
)
"""Formats for saved activations only: ``e4m3:block64``, ``int8:block64``, ``int4:block64``, ``int2:block64``,
``mxfp8``, ``mxfp4``. :mod:`assign.numerics.blocks` defines them."""
