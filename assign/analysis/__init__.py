"""Analyses of a trained model.

=================  ============================================================
``audit``          What would 16 bits lose?
``certificate``    Which predictions can a plan not change?
=================  ============================================================
"""
