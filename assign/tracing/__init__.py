"""A model, its loss and a batch become a table of tensors."""
