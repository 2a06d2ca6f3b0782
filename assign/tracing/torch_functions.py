"""Names of torch functions that a recording treats specially."""

import operator

METADATA = frozenset(
    {
        "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point", "is_complex",
        "element_size", "storage_offset", "get_device", "is_signed", "is_same_size", "__len__", "__hash__",
        "is_inference", "is_conj", "is_neg", "shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes",
        "is_cuda", "is_cpu", "is_mps", "is_xpu", "is_meta", "is_sparse", "is_sparse_csr", "is_quantized", "is_nested",
        "is_mkldnn", "names",
    }
)  # fmt: skip
"""Methods and attributes that work on a tensor without data."""

OF_AUTOGRAD = frozenset({"requires_grad", "is_leaf", "grad_fn", "output_nr", "_version", "retains_grad"})
SIZED = frozenset({"view", "reshape", "expand", "repeat", "new_zeros", "new_ones", "new_empty", "permute", "unflatten"})
"""Methods that take sizes one by one."""
TENSOR_ATTRIBUTES = frozenset({"T", "mT", "H", "mH", "real", "imag"})
ON_VALUES = frozenset(
    {
        "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__",
        "__repr__", "__format__", "__array__", "__deepcopy__", "__reduce_ex__", "data_ptr", "storage",
        "untyped_storage", "is_nonzero", "equal", "allclose", "backward", "grad", "__set__",
    }
)  # fmt: skip
"""Functions that need the values of their tensors."""

ON_LEAVES = frozenset({"register_hook", "retain_grad", "register_post_accumulate_grad_hook", "requires_grad_"})
"""Functions that change how autograd treats a tensor: they need a real tensor."""

DRAWING = frozenset(
    {
        "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli",
        "multinomial", "poisson", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
        "feature_alpha_dropout", "feature_dropout", "rrelu", "gumbel_softmax", "scaled_dot_product_attention",
        "multi_head_attention_forward", "lstm", "gru", "rnn_tanh", "rnn_relu", "fractional_max_pool2d",
        "fractional_max_pool3d", "normal_", "uniform_", "bernoulli_", "random_", "exponential_", "cauchy_",
        "log_normal_", "geometric_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_",
        "xavier_normal_", "orthogonal_", "sparse_", "manual_seed", "seed", "get_rng_state", "set_rng_state",
    }
)  # fmt: skip
"""Functions that draw random numbers, or read or set the generator: they run in the order of the user's code."""

REFLECTED = {
    "__rsub__": operator.sub, "__rdiv__": operator.truediv, "__rtruediv__": operator.truediv, "__rpow__": operator.pow,
    "__rmul__": operator.mul, "__radd__": operator.add, "__rmatmul__": operator.matmul, "__rmod__": operator.mod,
    "__rfloordiv__": operator.floordiv,
}  # fmt: skip
