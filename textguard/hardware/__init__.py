"""Faults as hardware has them: in stored values for good, at a bit error rate, in memory that codes protect, in arrays.

docs/faults.md says which of them to take when.
"""

from textguard.hardware.array import Array, draw_stuck, run_stuck, summarise_stuck
from textguard.hardware.costs import mitigation_costs, protection_table
from textguard.hardware.crossed import PersistentSummary, summarise_persistent
from textguard.hardware.lists import read_fault_list
from textguard.hardware.persistent import PersistentResult, run_persistent
from textguard.hardware.protection import parse_protection
from textguard.hardware.rates import RateCurve, error_rates, suggest_rates
from textguard.hardware.stored import StoredTensor, draw_persistent, stored_tensors

__all__ = [
    "Array",
    "PersistentResult",
    "PersistentSummary",
    "RateCurve",
    "StoredTensor",
    "draw_persistent",
    "draw_stuck",
    "error_rates",
    "mitigation_costs",
    "parse_protection",
    "protection_table",
    "read_fault_list",
    "run_persistent",
    "run_stuck",
    "stored_tensors",
    "suggest_rates",
    "summarise_persistent",
    "summarise_stuck",
]
