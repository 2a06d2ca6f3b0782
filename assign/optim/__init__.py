"""Optimizers whose states follow a plan, and optimizers for weights stored in 16 bits."""

from assign.optim.updates import SGD, AdamW

__all__ = ["SGD", "AdamW"]
