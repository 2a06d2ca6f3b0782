"""In which dtype an operator computes, given the formats of what it reads and makes. Pure rules, no torch.

The executor and the memory model both ask here, so that the bytes predicted are the bytes of the graph that runs.

* A value lives between operators in its *carrier*: the narrowest torch dtype that holds both its format and its
  gradient's exactly (autograd gives a gradient the dtype of its tensor).
* An operator runs in a 16-bit dtype if all it reads and makes lives there and torch computes it with float32
  accumulation inside, as autocast trusts it to; otherwise its operands are widened to float32.
* Rounding to bf16 or fp16 stochastically needs more bits than they have: the operator that makes such a tensor runs
  in float32, and where it is the gradient that is rounded so, the tensor lives there.
* A custom ``fp(e,m,b)`` tensor lives in float32 and is computed there: rounded once, as in the paper's simulation.
* But matrices are multiplied in the narrowest dtype that holds their elements exactly, sums and result as above:
  float32 tensors on grids that bf16 holds, in bf16; two tensors in scaled 8-bit formats, where the device can, in 8.
"""

from collections.abc import Iterable

from assign.plan.formats import FORMATS, Format, Storage

FLOAT32 = "float32"
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e5m2": 1, "float8_e4m3fn": 1}

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
        "hardtanh", "sigmoid", "tanh", "softplus", "softmax", "glu", "threshold", "logsigmoid", "softsign",
        "batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm",
        "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
        "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d",
        "max_pool2d_with_indices",
        "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout",
        "cat", "stack", "pad", "embedding", "gather", "index_select", "take_along_dim", "getitem", "repeat_interleave",
        "mean", "sum", "amax", "amin", "sqrt", "rsqrt", "square", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
        "tril", "triu", "unfold", "interpolate",
    }
)  # fmt: skip
"""Operators that torch computes on 16-bit tensors with float32 inside, on CPU and CUDA alike."""

FLOAT32_INSIDE = frozenset({"scaled_dot_product_attention", "interpolate"})
"""Operators that torch takes apart where no fused kernel fits, as attention with dropout; float32 between the parts."""

FLOAT32_PARAMETERS = frozenset({"batch_norm", "instance_norm"})
"""Operators whose kernels take 16-bit values beside float32 scales and running statistics."""


def carrier(forward: Format, gradient: Format, *later: Format) -> str:
    """Torch dtype that holds a tensor's value and its gradient exactly, in each of the formats they may have.

    float32 for formats that torch does not have, so that each of their values is rounded once.
    """
    formats = (forward, gradient, *later)
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


def compute_dtype(op: str, operands: Iterable[str], result: str) -> str:
    """Dtype in which ``op`` runs.

    Args:
        op: operator name as in the table.
        operands: carriers of the floating-point tensors it reads; float32 for values that no plan names.
        result: what :func:`made_in` says of the tensor it makes.
    """
    dtypes = {*operands, result}
    if len(dtypes) > 1 or FLOAT32 in dtypes or op not in SIXTEEN_BIT:
        return FLOAT32
    return dtypes.pop()


def multiply_dtype(op: str, compute: str, operands: Iterable[Format], *, fp8: bool = False) -> str:
    """Dtype in which ``op`` multiplies matrices.

    Args:
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
