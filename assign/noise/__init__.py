"""Measure how rounding a tensor changes the gradient of a training step.

=======================  ============================================================
``measure``              Noise of all tensors and formats, in a file.
``options``              Options of a measurement.
``estimators``           Noise on one batch: first-order, or one tensor at a time.
``instrumented_step``    A step whose tensors can be changed.
``relu_flips``           Noise of sign changes at relu.
``perturb``              Round a tensor as a plan would.
=======================  ============================================================
"""
