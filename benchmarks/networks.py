"""One network of each of timm's families: which engine takes it, and what is in the way of the fast one."""

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from textguard.errors import UnsupportedModel
from textguard.faults.engines import ReplayEngine
from textguard.runtime import import_torchvision

SIDE = 64  # of images, where a network takes any


def timm_networks() -> Iterator[tuple[str, Callable[[], nn.Module], int]]:
    """The network with the shortest small-sounding name of each of timm's families: name, constructor, its own image side."""
    import_torchvision()
    import timm

    families: dict[str, list[str]] = {}
    for name in timm.list_models():
        families.setdefault(timm.model_entrypoint(name).__module__, []).append(name)
    small = ("test", "tiny", "nano", "atto", "xxs", "pico", "femto", "small", "18", "s0", "b0", "050")
    for _, names in sorted(families.items()):
        name = min(names, key=lambda one: (not any(part in one for part in small), len(one), one))
        known = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
        side = known.input_size[-1] if known else 224
        yield name, functools.partial(timm.create_model, name), side if known and known.fixed_input_size else min(side, 256)


def measure() -> dict[str, Any]:
    """How many families replay; why others run whole, and which do not run at all. Weights are random."""
    found: dict[str, Any] = {"replay": 0, "whole": {}, "not_run": {}}
    warnings.simplefilter("ignore")
    for name, build, own in timm_networks():
        torch.manual_seed(0)
        for side in (SIDE, own):
            try:
                model = build().eval()
                with torch.no_grad():
                    model(torch.zeros(2, 3, side, side))
                break
            except Exception as error:  # of timm's: a network that needs its own image size, or another input
                reason = f"{type(error).__name__}: {error}"
        else:
            found["not_run"][name] = reason[:200]
            continue
        try:
            ReplayEngine(model, torch.rand(3, side, side), batch_size=2)
            found["replay"] += 1
        except UnsupportedModel as error:
            found["whole"][name] = str(error)[:200]
        print(f"{name} at {side}: {found['whole'].get(name, 'replay')}", flush=True)
    return found
