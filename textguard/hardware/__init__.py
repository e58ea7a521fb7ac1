"""Faults as hardware has them: in stored values for good, at a bit error rate, in memory that codes protect, in arrays."""
