"""Predict the memory of a training step from its table. Nothing here imports torch.

==============  ============================================================
``estimate``    Bytes and low ratio of a step under a plan.
``replay``      The schedule of a step under a plan.
``deltas``      Changes in bytes due to changes of entries.
``profile``     Bytes by moment and tensor, for charts.
==============  ============================================================
"""
