"""Capture the training step of a model as a table of tensors."""
