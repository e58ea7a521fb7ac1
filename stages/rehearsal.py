"""One small batch through everything that will be done with a classifier, before hours go into its training.

It changes no result, and so no stage depends on it or on what it imports.
"""

import copy
from dataclasses import replace

import torch
from torch import nn

from textguard.params import InjectParams
from textguard.vision.recipe import Recipe
from textguard.vision.transforms import TrainingView

IMAGES = 2


def rehearse(model: nn.Module, view: TrainingView, recipe: Recipe, inject: InjectParams) -> None:
    """Train, predict and inject on a copy of the model. Raises what would be raised later; draws from no generator."""
    # Imported when it is called, so that a checkpoint is not of this code: see textguard.artifacts.work_dir.
    from stages.settings import campaign_settings
    from textguard.faults import Campaign
    from textguard.faults.profiling import loader_of
    from textguard.vision.optimisation import make_optimizer
    from textguard.vision.training import AUTOCAST

    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        images, labels = (torch.stack(part) for part in zip(*[_pair(view[(i, 0)]) for i in range(IMAGES)], strict=True))
        tried = copy.deepcopy(model).train()
        optimizer = make_optimizer(tried, recipe)
        with torch.autocast(device.type, AUTOCAST.get(recipe.precision), enabled=recipe.precision in AUTOCAST):
            loss = nn.functional.cross_entropy(tried(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        tried.eval()
        settings = replace(campaign_settings(inject), detector="off", compare_detectors=(), batch_size=IMAGES)
        profiled = dict.fromkeys((name for name, _ in tried.named_modules()), 1.0)
        campaign = Campaign(tried, loader_of(images, labels, IMAGES), settings, profiled)
        campaign.pace(sites=[campaign.engine.sites[0], campaign.engine.sites[-1]])


def _pair(sample: tuple[torch.Tensor, int]) -> tuple[torch.Tensor, torch.Tensor]:
    return sample[0], torch.tensor(sample[1])
