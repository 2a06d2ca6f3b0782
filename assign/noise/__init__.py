"""How much rounding a tensor perturbs what a training step computes."""
