"""Decide which results stay in float32 unless a plan says otherwise.

A result stays in float32 if autocast keeps it there, unless torch computes the operator on 16-bit tensors with float32
inside and nothing that follows needs the bits. Results of the loss function outside the model stay in float32 too: they
are small, and every gradient passes through them.
"""

from collections.abc import Collection

from assign.plan.keys import Key
from assign.plan.ops import FLOAT32_RESULTS, IN_16_BIT, MATRIX_PRODUCTS, SELECTING


def stays_float32(key: str, op: str, readers: Collection[str]) -> bool:
    """Whether the tensor ``key``, which ``op`` makes, stays in float32 by default.

    It does not if a matrix product reads it, because the product would then run in float32: autocast rounds there too.

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
