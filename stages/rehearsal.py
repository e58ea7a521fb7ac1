"""One small batch through everything that will be done with a classifier, before hours go into its training.

And a look at the networks and data that params.yaml names, before anything runs. It changes no result, and so no stage depends
on it or on what it imports.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from textguard.errors import UnsupportedModel
from textguard.params import CloseupParams, InjectParams, Params
from textguard.vision.recipe import Recipe
from textguard.vision.transforms import TrainingView

if TYPE_CHECKING:
    from textguard.faults.mitigations import Mitigation

IMAGES, CLASSES = 2, 10


def rehearse(model: nn.Module, view: TrainingView, recipe: Recipe, inject: InjectParams, closeup: CloseupParams) -> None:
    """Train, predict, inject and look on a copy of the model. Raises what would be raised later; draws from no generator."""
    # Imported when it is called, so that a checkpoint is not of this code: see textguard.artifacts.work_dir.
    from textguard.vision.optimisation import make_optimizer
    from textguard.vision.training import AUTOCAST

    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        pairs = [_pair(view[(number % len(view), 0)]) for number in range(IMAGES)]
        images, labels = (torch.stack(part) for part in zip(*pairs, strict=True))
        tried = copy.deepcopy(model).train()
        optimizer = make_optimizer(tried, recipe)
        with torch.autocast(device.type, AUTOCAST.get(recipe.precision), enabled=recipe.precision in AUTOCAST):
            loss = nn.functional.cross_entropy(tried(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        # Not with what that step made of it: its outputs may be anything, as the rate is meant for a whole batch.
        with _as_after_training(), np.errstate(invalid="ignore"):
            _use(copy.deepcopy(model).eval(), images.to(device), labels.to(device), inject, closeup)


def look_up(params: Params) -> None:
    """Build each network that has no name of its own here, and call each function of own data.

    Raises UnknownName for networks that are in no library; InvalidParameter for what is wrong with own code; UnsupportedModel
    for a network that a mitigation of section hardware cannot be used with, which its stage would say after the training.
    """
    from stages.under_faults import of_section_hardware
    from textguard.vision.backbones import BACKBONES, build_backbone
    from textguard.vision.datasets import is_own, own_parts

    for dataset in params.datasets.values():
        if is_own(dataset.source):
            own_parts(dataset.source)
    for backbone in params.backbones.values():
        if backbone.network not in BACKBONES:
            with torch.random.fork_rng(devices=[]):
                model = build_backbone(backbone.network, CLASSES, backbone.image_size, backbone.drop_path).eval()
            for mitigation in params.hardware.mitigations:
                with of_section_hardware():
                    _protect(model, torch.zeros(3, backbone.image_size, backbone.image_size), mitigation)


def _use(model: nn.Module, images: Tensor, labels: Tensor, inject: InjectParams, closeup: CloseupParams) -> None:
    """What the stages evaluate, ranges, inject and closeup do with a classifier, in this order."""
    from stages.settings import campaign_settings
    from textguard.closeup import CamModel, count_magnitudes, damaged_states
    from textguard.faults import Campaign
    from textguard.faults.execution import no_records
    from textguard.faults.profiling import loader_of, observer
    from textguard.vision.classifiers import PlainHeadClassifier, TextGuidedClassifier
    from textguard.vision.evaluation import measure_cost

    image, loader, settings = (
        images[0],
        loader_of(images, labels, IMAGES),
        replace(campaign_settings(inject), batch_size=IMAGES),
    )
    measure_cost(model, image)
    # The ranges are made up: an untrained network's own may be anything, NaN included.
    profiled = dict.fromkeys((site.layer for site in observer(model, image, settings.kinds).sites), 1.0)
    protected = _protect(model, image, inject.mitigation)
    campaign = Campaign(protected, loader, settings, profiled)
    campaign.pace(sites=[campaign.engine.sites[0], campaign.engine.sites[-1]])
    count_magnitudes(campaign.engine, loader, 1.0)
    try:
        traced = {"kinds": settings.kinds, "number_format": settings.stored_as, "profiled": profiled}
        cam = CamModel(protected, image, **traced, smallest=closeup.smallest_map)
    except UnsupportedModel:
        return  # the stage does without a map, and says so in its results
    latent = isinstance(model, TextGuidedClassifier | PlainHeadClassifier)
    without = sum(site.kind == "Linear" for site in cam.sites[-2 if latent else -1 :])
    flips = cam.draw_flips(closeup.weight_flips, without, closeup.seed)
    states = damaged_states(cam, flips, no_records(), settings.fault_model, settings.detector, profiled)
    for damaged, fault in states.values():
        with damaged():
            cam.look(images[:1], labels[:1], inject.batch_size, fault)


def _protect(model: nn.Module, image: Tensor, mitigation: "Mitigation") -> nn.Module:
    """The model with a mitigation, whose ranges are made up."""
    from textguard.faults import protect
    from textguard.faults.graph import TracedModel
    from textguard.faults.mitigations import activations

    try:
        bounds = dict.fromkeys(activations(TracedModel(model, image)).values(), (-1.0, 1.0))
    except UnsupportedModel:
        bounds = {}
    # Learned thresholds are one per channel, and there are none yet: what they need of a network is what one range needs.
    # Where there is nothing to bound, `protect` says so, and of which mitigation.
    return protect(model, image, bounds, "clip_to_zero" if mitigation == "learned" and bounds else mitigation)


@contextmanager
def _as_after_training() -> Iterator[None]:
    """Only training asks torch for deterministic operations alone, which not every operation has."""
    strict = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict)


def _pair(sample: tuple[Tensor, int]) -> tuple[Tensor, Tensor]:
    return sample[0], torch.tensor(sample[1])
