"""Predict the memory of a training step from its table. Nothing here imports torch.

==============  ============================================================
``estimate``    Bytes and low ratio of a step under a plan.
``replay``      The schedule of a step under a plan.
``deltas``      What changes of entries change in bytes.
``profile``     Bytes by moment and tensor, for pictures.
==============  ============================================================
"""
