"""Rules for the dtype in which an operator computes, given the formats of its inputs and outputs.

The executor and the memory model both ask here, so that the bytes predicted are the bytes of the graph that runs.

* A value lives between operators in its *carrier*: the narrowest torch dtype that holds both its format and its
  gradient's exactly (autograd gives a gradient the dtype of its tensor).
* An operator of which nothing that it reads or makes has another dtype than in the model as it was loaded runs as the
  user wrote it. So a plan that changes nothing computes what the model computes without one, bit for bit.
* Any other operator runs in a 16-bit dtype if all it reads and makes lives there and torch computes it with float32
  accumulation inside, as autocast trusts it to; otherwise its operands are widened to float32.
* Operands that no plan names, as buffers and constants, have no say: they are converted to what the others are in.
* A conversion of the user's to another dtype stays; where its result has a key, it converts to that one's carrier.
* Rounding to bf16 or fp16 stochastically needs more bits than they have: the operator that makes such a tensor runs
  in float32, and where it is the gradient that is rounded so, the tensor lives there.
* A custom ``fp(e,m,b)`` tensor lives in float32 and is computed there: rounded once, as in the paper's simulation.
* But matrices are multiplied in the narrowest dtype that holds their elements exactly, sums and result as above:
  float32 tensors on grids that bf16 holds, in bf16; two tensors in scaled 8-bit formats, where the device can, in 8.
"""

from collections.abc import Iterable
from typing import NamedTuple

from assign.plan.formats import FORMATS, ITEM_BYTES, Format, Storage

FLOAT32, FLOAT64 = "float32", "float64"

MATRIX_PRODUCTS = frozenset(
    {
        "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "bilinear",
        "matmul", "bmm", "mm", "mv", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention",
    }
)  # fmt: skip
"""Operators that multiply matrices, operands and result in one dtype, products summed in float32."""

PLAIN_PRODUCTS = frozenset({"linear", "matmul", "bmm", "mm", "addmm", "einsum"})
"""Those that become ``mm``, ``addmm`` or ``bmm``, forward and backward, whose operands can be narrowed on their own."""

SIXTEEN_BIT = MATRIX_PRODUCTS | frozenset(
    {
        "add", "sub", "mul", "div", "neg", "abs", "maximum", "minimum", "where", "masked_fill", "clamp", "lerp",
        "relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "hardswish", "hardsigmoid",
        "hardtanh", "sigmoid", "tanh", "softplus", "softmax", "log_softmax", "glu",
        "threshold", "logsigmoid", "softsign",
        "batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm",
        "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d",
        "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d",
        "max_pool2d_with_indices",
        "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout",
        "setitem", "copy", "fill", "zero",
        "cat", "stack", "pad", "embedding", "gather", "index_select", "take_along_dim", "getitem", "repeat_interleave",
        "mean", "sum", "amax", "amin", "sqrt", "rsqrt", "square", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
        "tril", "triu", "unfold", "interpolate",
    }
)  # fmt: skip
"""Operators that torch computes on 16-bit tensors with float32 inside, on CPU and CUDA alike."""

FLOAT32_INSIDE = frozenset({"scaled_dot_product_attention", "interpolate"})
"""Operators that torch takes apart where no fused kernel fits, as attention with dropout; float32 between the parts."""

CONVERSIONS = frozenset({"float", "half", "bfloat16", "double", "type", "type_as"})
"""Operators that are conversions to another dtype, and have a key of their own; ``to`` has its operand's."""

FLOAT32_PARAMETERS = frozenset({"batch_norm", "instance_norm"})
"""Operators whose kernels take 16-bit values beside float32 scales and running statistics."""


def carrier(forward: Format, gradient: Format, *later: Format) -> str:
    """Torch dtype that holds a tensor's value and its gradient exactly, in each of the formats they may have.

    float32 for formats that torch does not have, so that each of their values is rounded once.
    """
    formats = (forward, gradient, *later)
    if any(fmt.carrier == FLOAT64 for fmt in formats):
        return FLOAT64
    if any(fmt.native is None for fmt in formats) or _needs_float32(gradient):
        return FLOAT32
    dtypes = {fmt.carrier for fmt in formats}
    if len(dtypes) == 1:
        return dtypes.pop()
    narrow = ((name, FORMATS[row]) for name, row in (("bfloat16", "bf16"), ("float16", "fp16")))
    return next((name for name, row in narrow if all(map(row.contains, formats))), FLOAT32)


def made_in(carrier: str, *forward: Format) -> str:
    """Dtype that the operator which makes a tensor is asked for.

    Args:
        carrier: of the tensor.
        forward: each format that the tensor, not its gradient, may have.
    """
    return FLOAT32 if any(map(_needs_float32, forward)) else carrier


def _needs_float32(fmt: Format) -> bool:
    """Whether a value that a 16-bit operator makes is on the grid of ``fmt`` already, nothing left to be rounded."""
    return fmt.stochastic and fmt.storage is Storage.NATIVE


def changes_nothing(fmt: Format, dtype: str) -> bool:
    """Whether rounding values of a dtype to a format leaves them as they are: its own, or a wider one."""
    return fmt.native == dtype or (fmt.native in (FLOAT32, FLOAT64) and ITEM_BYTES[fmt.native] >= ITEM_BYTES[dtype])


class Value(NamedTuple):
    """What an operator reads or makes: its dtype in the model as it was loaded, and under the plan."""

    loaded: str
    now: str


def compute_dtype(
    op: str, operands: Iterable[Value], result: Value, *, opaque: bool = False, wide: bool = False
) -> str | None:
    """Dtype in which ``op`` runs; None: as the user wrote it.

    Args:
        op: operator name as in the table.
        operands: those of the floating-point tensors it reads that have keys.
        result: what it makes; ``now`` is what :func:`made_in` says of it.
        opaque: it is known to run only as it was written: each operand is in the dtype that it was loaded in.
        wide: it computes in float32 wherever the plan changes anything of it.
    """
    read = list(operands)
    if all(value.loaded == value.now for value in (*read, result)):
        return None
    if opaque:
        return result.loaded
    if op in CONVERSIONS:
        return result.now
    if op in FLOAT32_PARAMETERS:
        read = read[:1]
    dtypes = {*(value.now for value in read), result.now}
    if FLOAT64 in dtypes:
        return FLOAT64
    return FLOAT32 if wide or len(dtypes) > 1 or op not in SIXTEEN_BIT else dtypes.pop()


def multiply_dtype(op: str, compute: str, operands: Iterable[Format], *, fp8: bool = False) -> str:
    """Dtype in which ``op`` multiplies matrices.

    Args:
        op: name of the operator.
        compute: what :func:`compute_dtype` says.
        operands: formats of the matrices.
        fp8: the device multiplies 8-bit matrices.
    """
    formats = list(operands)
    if op not in PLAIN_PRODUCTS or not formats:
        return compute
    if compute == FLOAT32:
        return "bfloat16" if all(map(FORMATS["bf16"].contains, formats)) else compute
    return "float8" if fp8 and op != "bmm" and all(map(is_float8, formats)) else compute


def is_float8(fmt: Format) -> bool:
    """Whether a tensor's codes and its scale can be multiplied as they are."""
    return fmt.scaled and fmt.native is not None and fmt.native.startswith("float8")
