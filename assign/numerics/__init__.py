"""Rounding, and arithmetic on rounded values, as operators ``torch.ops.assign``, which this import registers.

=====================  ============================================================
``rounding``           Quantize, encode and decode.
``kernels``            The arithmetic, written once in plain torch.
``posits``             The arithmetic of posits.
``tables``             Formats that are a table of values.
``dispatch``           Run a kernel compiled, or operator by operator.
``words``              Several narrow elements in one word.
``blocks``             Formats with a scale for each block.
``matmul``             Matrix products of rounded values.
``accumulate``         Sums of products with a quire, or rounded one by one.
``exact``              Exact sums of products.
``promotion``          Change tensors that overflow to their high format.
``delayed``            Scales from earlier steps.
``runtime_formats``    Formats and scales that change, as a graph input.
``registry``           Operators that graphs keep as one node.
``torch_dtypes``       Torch's dtypes by name.
=====================  ============================================================
"""

from assign.numerics import accumulate, blocks, matmul, rounding
from assign.numerics.delayed import DelayedScales
from assign.numerics.rounding import quantize

__all__ = ["DelayedScales", "accumulate", "blocks", "matmul", "quantize", "rounding"]
