"""The table of facts about operators, by their names in a TensorTable: one set for each fact.

Everything that treats an operator by its name uses it: grouping, recipes, the dtype in which it computes, what its
tensors need, and the search for masks. Facts about the operators of ATen, which appear in joint graphs, are in
:mod:`assign.tracing.joint`.
"""

from collections.abc import Mapping
from types import MappingProxyType

INPUT = "input"
"""Operator name of a row that holds a part of the batch."""

SLICE = "slice"
"""Operator name of a row that is a part of the row it is made from; nothing runs for it."""

# ---- matrix products -------------------------------------------------------------------------------------------------

MATRIX_PRODUCTS = frozenset(
    {
        "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "bilinear",
        "matmul", "bmm", "mm", "mv", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention",
    }
)  # fmt: skip
"""Operators that multiply matrices: operands and result have one dtype, and products are summed in float32."""

PLAIN_PRODUCTS = frozenset({"linear", "matmul", "bmm", "mm", "addmm", "einsum"})
"""Matrix products that become ``mm``, ``addmm`` or ``bmm``, forward and backward; operands can be narrowed alone."""

GROUP_STARTS = frozenset(
    {
        "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
        "linear", "bilinear", "matmul", "mm", "bmm", "mv", "addmm", "addmv", "addbmm", "baddbmm",
        "einsum", "tensordot", "inner", "multi_dot", "chain_matmul", "grouped_mm",
        "scaled_dot_product_attention", "flex_attention", "multi_head_attention_forward",
        "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
    }
)  # fmt: skip
"""Operators that start a group: those that multiply matrices, also as one of several steps."""

# ---- the dtype in which an operator computes -------------------------------------------------------------------------

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
"""Operators that torch computes on 16-bit tensors with float32 inside, on both CPU and CUDA."""

FLOAT32_INSIDE = frozenset({"scaled_dot_product_attention", "interpolate"})
"""Operators that torch decomposes if no fused kernel fits, e.g. attention with dropout; intermediates are float32."""

FLOAT32_PARAMETERS = frozenset({"batch_norm", "instance_norm"})
"""Operators whose kernels take 16-bit values together with float32 scales and running statistics."""

CONVERSIONS = frozenset({"float", "half", "bfloat16", "double", "type", "type_as"})
"""Conversions to another dtype that have a key of their own; ``to`` has the key of its operand."""

ARITHMETIC = frozenset({"add", "sub", "rsub", "mul", "div", "pow"})
"""Operators that take a number in float32, regardless of the dtype they run in."""

# ---- what results need -----------------------------------------------------------------------------------------------

LOSS_OPS = frozenset(
    {
        "nll_loss", "nll_loss_nd", "nll_loss2d", "cross_entropy", "cross_entropy_loss", "linear_cross_entropy",
        "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div",
        "binary_cross_entropy", "binary_cross_entropy_with_logits", "gaussian_nll_loss", "poisson_nll_loss",
        "ctc_loss", "cosine_embedding_loss", "hinge_embedding_loss", "margin_ranking_loss", "multi_margin_loss",
        "multilabel_margin_loss", "multilabel_soft_margin_loss", "soft_margin_loss", "triplet_margin_loss",
        "triplet_margin_with_distance_loss",
    }
)  # fmt: skip
"""The losses of ``torch.nn.functional``: few elements, and every gradient passes through them."""

EXPONENTIATED = LOSS_OPS | {"log_softmax", "log_sigmoid", "logsigmoid", "logsumexp"}
"""Operators whose backward pass exponentiates a saved tensor: an error of half a step in 4 bits becomes a factor."""

FLOAT32_RESULTS = LOSS_OPS | frozenset(
    {
        "pow", "rsqrt", "reciprocal", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "xlogy", "logit",
        "acos", "asin", "cosh", "sinh", "tan", "erfinv", "digamma", "lgamma",
        "sum", "nansum", "prod", "cumsum", "cumprod", "logsumexp", "logcumsumexp", "trace",
        "var", "std", "var_mean", "std_mean",
        "norm", "vector_norm", "matrix_norm", "normalize", "renorm", "dist", "cdist", "pdist", "pairwise_distance",
        "cosine_similarity", "quantile", "nanquantile", "frobenius_norm", "nuclear_norm",
        "cholesky", "cholesky_inverse", "cholesky_solve", "det", "geqrf", "inverse", "logdet", "lstsq", "lu",
        "lu_solve", "matrix_exp", "orgqr", "ormqr", "pinverse", "qr", "slogdet", "svd", "triangular_solve",
        "polar", "stft", "istft",
    }
)  # fmt: skip
"""Operators whose result stays in float32, by their names in a table; so do all of ``torch.linalg``, ``torch.fft`` and
``torch.special``.

Source: autocast's float32 lists, of CUDA (``ATen/autocast_mode.h``) and of CPU, without those of ``IN_16_BIT``; we
added the variances, gamma functions and determinants.
"""

IN_16_BIT: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            ("layer_norm", "native_layer_norm", "rms_norm", "group_norm", "softmax", "softmin", "softplus"),
            "its kernel takes 16-bit tensors and computes in float32; the result has magnitudes near 1",
        ),
        "log_softmax": "its kernel computes in float32; recipes have a separate row for it",
        **dict.fromkeys(
            ("interpolate", "upsample", "grid_sample"),
            "its result is a mean of a few neighbours, which is computed in float32",
        ),
        **dict.fromkeys(
            (
                "avg_pool3d", "adaptive_avg_pool3d", "max_pool3d", "adaptive_max_pool3d", "fractional_max_pool2d",
                "fractional_max_pool3d", "max_unpool2d", "max_unpool3d", "pad", "fake_quantize_per_tensor_affine",
            ),
            "autocast lists it because the CPU lacks a 16-bit kernel; here it computes in float32 where there is none",
        ),
        "view_as_complex": "a view; complex tensors have no format",
    }
)  # fmt: skip
"""Operators that autocast keeps in float32 and this package does not → reason."""

SINGULAR: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("log", "log2", "log10", "logit", "sqrt", "rsqrt", "reciprocal", "binary_cross_entropy"), (0,)),
        "div": (1,),
        "xlogy": (1,),
        "pow": (0,),
        "gaussian_nll_loss": (2,),
    }
)
"""Operators with a pole, in value or derivative → positions of the operands that must not be rounded to the pole."""

PERIODIC = frozenset({"sin", "cos", "tan", "sinc", "polar"})
"""Periodic operators: with few bits, an argument of more than a few periods, as in a Fourier embedding, is useless."""

# ---- operators that pass values on -----------------------------------------------------------------------------------

SAME_VALUES = frozenset(
    {"contiguous", "clone", "reshape", "flatten", "to", "detach", "flip", "roll", "repeat", "permute"}
)
"""Operators whose result has the values of their first argument: no new site, the same key."""

SELECTING = frozenset(
    {
        SLICE, "getitem", "setitem", "cat", "concat", "stack", "hstack", "vstack", "gather", "index_select", "select",
        "take_along_dim", "masked_select", "index_put", "scatter", "masked_scatter", "pad", "tril", "triu", "unfold",
        "repeat_interleave", "embedding", "sort", "topk", "where", "masked_fill",
    }
)  # fmt: skip
"""Operators that only select values: their results need the precision of their inputs."""

SHIFTS = frozenset({"add", "sub", "rsub", "neg", "mul", "div", "abs", "clamp", "clamp_min", "clamp_max"})
"""Operators between a tensor and a pole: with scalars, they preserve how close the tensor is to it."""

CARRY_MASKS = SAME_VALUES | frozenset(
    {
        SLICE, "add", "sub", "rsub", "mul", "div", "neg", "abs", "where", "masked_fill", "masked_scatter",
        "maximum", "minimum", "max", "min", "cat", "stack", "getitem", "setitem", "index_put", "index_select",
        "gather", "scatter", "pad", "tril", "triu", "copy", "clamp", "repeat_interleave", "view", "expand",
        "expand_as", "unsqueeze", "squeeze", "transpose", "view_as", "reshape_as", "type", "type_as", "float",
        "broadcast_to", "unfold", "select", "narrow", "split", "chunk", "unbind", "movedim", "swapaxes", "T", "mT",
    }
)  # fmt: skip
"""Operators whose result is a mask if one of their arguments is one."""

MASK_FROM_CONSTANT = frozenset({"add", "sub", "rsub", "mul", "div"})
"""Operators that make a mask from a constant with a number, as in ``(1 - mask) * -1e9``."""

# ---- numbers among the arguments -------------------------------------------------------------------------------------

WRITTEN: Mapping[str, tuple[int, ...]] = {
    "masked_fill": (2,), "full": (1,), "new_full": (2,), "full_like": (1,), "fill": (1,), "where": (1, 2), "pad": (3,),
    "tensor": (0,), "new_tensor": (1,), "scalar_tensor": (0,), "index_fill": (3,), "scatter": (3,), "setitem": (2,),
}  # fmt: skip
"""Operators that write a number into a tensor → positions of the number in the arguments."""

WRITTEN_BY_NAME = ("value", "fill_value", "other")
"""Names of these arguments as keywords."""

BOUNDS: Mapping[str, tuple[int, ...]] = {
    "clamp": (1, 2), "clip": (1, 2), "clamp_min": (1,), "clamp_max": (1,), "hardtanh": (1, 2), "nan_to_num": (1, 2, 3),
}  # fmt: skip
"""Operators that limit values → positions of their bounds in the arguments."""
