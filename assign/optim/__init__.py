"""Optimizers that store their states as a plan says, and optimizers for weights in 16 bits.

================  ============================================================
``optimizers``    Optimizers from torch, torchao or bitsandbytes.
``states``        States in the form of each library.
``updates``       SGD and AdamW for 16-bit weights.
``widening``      Round the updates of any library.
``gradients``     Gradients stored in 8 bits.
``summing``       Gradients of micro-batches, summed inside the backward pass.
``masters``       Masters with extra bits.
``extras``        State stored with a parameter.
``monitor``       Count updates lost by rounding.
================  ============================================================
"""

from assign.optim.masters import widened_weights
from assign.optim.monitor import LostUpdates
from assign.optim.optimizers import widened_state_dict
from assign.optim.updates import SGD, AdamW

__all__ = ["SGD", "AdamW", "LostUpdates", "widened_state_dict", "widened_weights"]
