"""Plans in the training loops of other libraries, one module per library."""
