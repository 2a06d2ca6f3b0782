"""Products of narrow matrices: their definition, and the registered operators that compute them.

Operands that a narrow dtype holds exactly are multiplied in that dtype, with sums in float32. The result has the
requested dtype and is rounded once, as with float32 arithmetic; only the order of the sum may differ.

* *bf16*: float32 matrices whose elements bf16 holds. On CUDA it is a bf16 product with a float32 result; on a CPU, a
  float32 product.
* *fp8*: the codes of two 8-bit matrices and their scales, multiplied by torch's scaled product of float8 matrices.
"""

import torch
from torch import Tensor

from assign import _torch
from assign.formats.parsing import parse_format
from assign.formats.rows import FORMATS
from assign.numerics.registry import register
from assign.numerics.rounding import decode
from assign.numerics.runtime_formats import Runtime, current_format
from assign.numerics.torch_dtypes import torch_dtype

MULTIPLE = 16
"""All sizes of fp8 products, except the rows of the first matrix, are multiples of it. Source: required by cuBLAS."""


def _product(
    a: Tensor,
    b: Tensor,
    a_format: str,
    b_format: str,
    *,
    runtime: Runtime | None = None,
    a_key: str = "",
    b_key: str = "",
) -> Tensor:
    """Return ``a @ b`` for float32 matrices, or batches of matrices, on the grids of two formats."""
    formats = current_format(a_format, runtime, a_key), current_format(b_format, runtime, b_key)
    if not all(map(FORMATS["bf16"].contains, formats)):
        return torch.matmul(a, b)
    return _torch.multiply_in_bf16(a, b)


def _scaled_product(
    a: Tensor,
    a_scale: Tensor,
    a_format: str,
    b: Tensor,
    b_scale: Tensor,
    b_format: str,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``a @ b + bias`` for the codes of two matrices; in float32 if a size is not a multiple of 16."""
    if a.shape[1] % MULTIPLE or b.shape[1] % MULTIPLE:
        wide = [
            decode(codes, name, scale=scale, dtype=torch.float32)
            for codes, scale, name in ((a, a_scale, a_format), (b, b_scale, b_format))
        ]
        return (torch.mm(*wide) if bias is None else torch.addmm(bias.float(), *wide)).to(dtype)
    first, second = (codes.view(_float8(name)) for codes, name in ((a, a_format), (b, b_format)))
    return _torch.multiply_in_fp8(first, a_scale, second, b_scale, bias, dtype)


def _float8(name: str) -> torch.dtype:
    native = parse_format(name).native
    assert native is not None
    return torch_dtype(native)


def _product_like(a: Tensor, b: Tensor, **_rest: object) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-1]))


def _scaled_like(a: Tensor, b: Tensor, dtype: torch.dtype, **_rest: object) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=dtype)


register("product", _product, _product_like)
register("scaled_product", _scaled_product, _scaled_like)
