"""Which results stay in float32 unless a plan says otherwise.

A result stays in float32 where autocast keeps it there, unless torch already computes the operator on 16-bit tensors
with float32 inside and nothing that follows needs the bits. Whatever a loss function computes outside the model stays
in float32 too: it is small, and every gradient passes through it.
"""

from collections.abc import Collection

from assign.plan.keys import Key
from assign.plan.ops import FLOAT32_RESULTS, IN_16_BIT, MATRIX_PRODUCTS, SELECTING


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
        return op not in SELECTING and op not in IN_16_BIT
    return op in FLOAT32_RESULTS or op.startswith(("linalg_", "fft_", "special_"))
