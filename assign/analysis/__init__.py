"""Analyses of a trained model.

=================  ============================================================
``audit``          What would 16 bits lose?
``certificate``    Which predictions can a plan not change?
=================  ============================================================
"""

from assign.analysis.audit import audit_constants, audit_range
from assign.analysis.certificate import certify

__all__ = ["audit_constants", "audit_range", "certify"]
