"""Measure how rounding a tensor changes the gradient of a training step.

=======================  ============================================================
``measure``              All tensors and formats, to a file.
``options``              How to measure.
``estimators``           One batch: first-order, or one tensor at a time.
``instrumented_step``    A step whose tensors can be changed.
``relu_flips``           The noise of signs that change at relu.
``perturb``              Round a tensor as a plan would.
=======================  ============================================================
"""
