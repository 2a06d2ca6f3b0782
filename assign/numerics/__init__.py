"""Rounding, and arithmetic on rounded values, as operators ``torch.ops.assign``, registered by this import."""

from assign.numerics import blocks, products, rounding

__all__ = ["blocks", "products", "rounding"]
