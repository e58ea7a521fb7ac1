"""One call from any PyTorch classifier and its data to what faults do in it, and one object that holds all that was found.

from textguard.assessment import assess
"""

from textguard.assessment.advice import Advice, advise, measure_mitigations
from textguard.assessment.assessing import assess
from textguard.assessment.result import Assessment

load = Assessment.load

__all__ = ["Advice", "Assessment", "advise", "assess", "load", "measure_mitigations"]
