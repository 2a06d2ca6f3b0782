"""Predict the memory of a training step from its table. Nothing here imports torch.

==============  ============================================================
``estimate``    Replay the schedule of a step under a plan.
``deltas``      What changes of entries change in bytes.
``profile``     Bytes by moment and tensor, for pictures.
==============  ============================================================
"""
