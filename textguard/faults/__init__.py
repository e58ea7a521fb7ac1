"""Fault injection for any PyTorch classifier; it knows nothing of text, pipelines or reports.

`textguard.assessment` goes from a model and a DataLoader to the resilience of each layer. What it is made of is exported here.
"""

from textguard.estimates.channels import summarise_channels
from textguard.estimates.summary import summarise
from textguard.faults.campaign import Campaign, CampaignResult, CampaignSettings
from textguard.faults.damage import FaultModel
from textguard.faults.engines import make_engine
from textguard.faults.exact import enumerate_layer
from textguard.faults.execution import run_campaign
from textguard.faults.formats import parse_format
from textguard.faults.guided import draw_guided
from textguard.faults.inputs import prepare
from textguard.faults.mitigations import learn_thresholds, protect, unprotected
from textguard.faults.plans import draw_plan
from textguard.faults.profiling import eligible_images, image_chances, profile_activations, profile_ranges
from textguard.faults.sampling import Design, run_design
from textguard.faults.task import Task, make_task

__all__ = [
    "Campaign",
    "CampaignResult",
    "CampaignSettings",
    "Design",
    "FaultModel",
    "Task",
    "draw_guided",
    "draw_plan",
    "eligible_images",
    "enumerate_layer",
    "image_chances",
    "learn_thresholds",
    "make_engine",
    "make_task",
    "parse_format",
    "prepare",
    "profile_activations",
    "profile_ranges",
    "protect",
    "run_campaign",
    "run_design",
    "summarise",
    "summarise_channels",
    "unprotected",
]
