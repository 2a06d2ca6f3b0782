"""Facts about operators that need more precision than a low or 16-bit format.

A result stays in float32 where autocast keeps it there, unless torch already computes the operator on 16-bit tensors
with float32 inside and nothing that follows needs the bits. Whatever a loss function computes outside the model stays
in float32 too: it is small, and every gradient passes through it.
"""

from collections.abc import Collection, Mapping
from types import MappingProxyType

from assign.plan.keys import Key
from assign.plan.lowering import MATRIX_PRODUCTS
from assign.plan.tensors import SLICE

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
"""Operators whose backward pass takes the exponential of a saved tensor: half a step of 4 bits would be a factor."""

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

Source: autocast's float32 lists, of CUDA (``ATen/autocast_mode.h``) and of CPU, without those of ``IN_16_BIT``; the
variances, gamma functions and determinants are ours.
"""

IN_16_BIT: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            ("layer_norm", "native_layer_norm", "rms_norm", "group_norm", "softmax", "softmin", "softplus"),
            "its kernel takes 16-bit tensors and computes in float32; the result has magnitudes near 1",
        ),
        "log_softmax": "its kernel computes in float32; recipes have a row of their own for it",
        **dict.fromkeys(
            ("interpolate", "upsample", "grid_sample"),
            "its result is a mean of a few neighbours, which is computed in float32",
        ),
        **dict.fromkeys(
            (
                "avg_pool3d", "adaptive_avg_pool3d", "max_pool3d", "adaptive_max_pool3d", "fractional_max_pool2d",
                "fractional_max_pool3d", "max_unpool2d", "max_unpool3d", "pad", "fake_quantize_per_tensor_affine",
            ),
            "autocast names it for want of a 16-bit kernel on CPU; here it computes in float32 where there is none",
        ),
        "view_as_complex": "a view; complex tensors have no format",
    }
)  # fmt: skip
"""What autocast keeps in float32 and we do not: operator → reason."""

MOVING = frozenset(
    {
        SLICE, "getitem", "setitem", "cat", "concat", "stack", "hstack", "vstack", "gather", "index_select", "select",
        "take_along_dim", "masked_select", "index_put", "scatter", "masked_scatter", "pad", "tril", "triu", "unfold",
        "repeat_interleave", "embedding", "sort", "topk", "where", "masked_fill",
    }
)  # fmt: skip
"""Operators that compute no number: what they make needs the precision of what they read."""

SINGULAR: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("log", "log2", "log10", "logit", "sqrt", "rsqrt", "reciprocal", "binary_cross_entropy"), (0,)),
        "div": (1,),
        "xlogy": (1,),
        "pow": (0,),
        "gaussian_nll_loss": (2,),
    }
)
"""Operators with a pole, in value or derivative: positions of the operands that a format must not round to it."""

PERIODIC = frozenset({"sin", "cos", "tan", "sinc", "polar"})
"""Operators that repeat: few bits leave nothing of an argument beyond a few periods, as of a Fourier embedding."""

SHIFTS = frozenset({"add", "sub", "rsub", "neg", "mul", "div", "abs", "clamp", "clamp_min", "clamp_max"})
"""Operators between a tensor and a pole: with scalars, they pass on how near to it the tensor comes."""


def stays_float32(key: str, op: str, readers: Collection[str]) -> bool:
    """Whether the tensor ``key``, which ``op`` makes, stays in float32 by default.

    Not where a matrix product reads it, which would then run in float32: autocast rounds there too.

    Args:
        key: of a tensor in the forward pass.
        op: name of the operator.
        readers: operators that read it.
    """
    if op in MATRIX_PRODUCTS or not MATRIX_PRODUCTS.isdisjoint(readers):
        return False
    if Key(key).is_of_loss:
        return op not in MOVING and op not in IN_16_BIT
    return op in FLOAT32_RESULTS or op.startswith(("linalg_", "fft_", "special_"))
