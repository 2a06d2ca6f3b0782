"""Rounding, and arithmetic on rounded values, as operators ``torch.ops.assign``, registered by this import.

=====================  ============================================================
``rounding``           Quantize, encode and decode.
``kernels``            The arithmetic, written once in plain torch.
``dispatch``           How it runs: compiled, or piece by piece.
``words``              Two 16-bit values in one word.
``blocks``             Formats with a scale for each block.
``matmul``             Matrix products of rounded values.
``promotion``          Tensors that overflow get their high format.
``delayed``            Scales from earlier steps.
``runtime_formats``    Both, as an input of a graph.
``registry``           Operators that graphs keep as one node.
``torch_dtypes``       Torch's dtypes by name.
=====================  ============================================================
"""

from assign.numerics import blocks, matmul, rounding
from assign.numerics.delayed import DelayedScales
from assign.numerics.rounding import quantize

__all__ = ["DelayedScales", "blocks", "matmul", "quantize", "rounding"]
