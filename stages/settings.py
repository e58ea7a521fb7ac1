"""Section `inject` of params.yaml in the terms of `textguard.faults`."""

from dataclasses import asdict, fields

from torch import nn

from stages.loading import LoadedRun
from textguard.artifacts import fingerprint
from textguard.faults import CampaignSettings, FaultModel, protect
from textguard.faults.mitigations import Mitigation
from textguard.params import InjectParams, Params
from textguard.schema.campaign import campaign_fields


def campaign_settings(inject: InjectParams) -> CampaignSettings:
    """The settings of a campaign. Which mitigation protects the model is none of them."""
    renamed = {"number_format": inject.format, "fault_model": FaultModel(**asdict(inject.faults))}
    # A grid's classifiers have to be the same each time: what differs by itself is refused.
    same = {field.name for field in fields(CampaignSettings)} - renamed.keys() - {"noise"}
    return CampaignSettings(**renamed, **{name: getattr(inject, name) for name in same})


def protected(run: LoadedRun, model: nn.Module, mitigation: Mitigation) -> nn.Module:
    """The run's model, or what folding made of it, with a mitigation; see `protect`. Raises TextguardError."""
    return protect(model, run.image, run.thresholds if mitigation == "learned" else run.bounds, mitigation)


def campaign_inputs(run: LoadedRun, params: Params) -> str:
    """A fingerprint of all that goes into a run's campaign, which its files carry. Raises InvalidArtifact."""
    learned = ["thresholds"] if params.inject.mitigation == "learned" else []
    inputs = run.checksums(["model", "data", "ranges", "bounds", *learned])
    return fingerprint(inject=campaign_fields(params.inject), head=params.head, **inputs)
