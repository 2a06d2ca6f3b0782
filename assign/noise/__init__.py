"""Measure how much rounding a tensor changes the gradient of a training step."""
