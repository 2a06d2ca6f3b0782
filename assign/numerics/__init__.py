"""Rounding and what computes with rounded values. Importing this registers the operators ``torch.ops.assign``."""

from assign.numerics import blocks, products, rounding

__all__ = ["blocks", "products", "rounding"]
