"""Optimizers whose states follow a plan, and optimizers for weights stored in 16 bits.

================  ============================================================
``optimizers``    States as the plan says, from torch, torchao or bitsandbytes.
``states``        These, in the form of each library.
``updates``       SGD and AdamW for 16-bit weights.
``widening``      Round the updates of any library.
``gradients``     Stored in 8 bits.
``masters``       With extra bits.
``beside``        What is kept of a parameter.
``monitor``       Updates lost by rounding.
================  ============================================================
"""

from assign.optim.masters import widened_weights
from assign.optim.monitor import LostUpdates
from assign.optim.optimizers import widened_state_dict
from assign.optim.updates import SGD, AdamW

__all__ = ["SGD", "AdamW", "LostUpdates", "widened_state_dict", "widened_weights"]
